"""Command-line options shared by benchmarks that run methods on workloads."""

import argparse
import json
import os
from typing import Any

import torch

from benchmarks.lib import methods
from benchmarks.lib.workload import DTYPES, TINY, TOY, Workload


def add_workload(parser: argparse.ArgumentParser, models: list[str] | None, sequence: int, batch: int) -> None:
    """Add the options of a workload and its device; without ``--models`` if ``models`` is None."""
    if models is not None:
        parser.add_argument(
            "--models",
            nargs="+",
            default=models,
            help=f"presets of lomo_ds.models, {TOY} (16 narrow layers) or {TINY} (6); {' '.join(models)} by default",
        )
    parser.add_argument("--sequence", type=int, default=sequence, help=f"tokens of a row; {sequence} by default")
    parser.add_argument("--batch", type=int, default=batch, help=f"rows for each rank; {batch} by default")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if each rank has a GPU, else cpu"
    )
    parser.add_argument("--precision", choices=sorted(DTYPES), help="bf16 on CUDA and fp32 on the CPU by default")
    parser.add_argument("--tiled_logits", action="store_true", help="let lomo_ds compute the logits in tiles")
    parser.add_argument(
        "--lomo", type=json_object, default={}, metavar="JSON",
        help='further parameters of LOMO in the DeepSpeed config, for example \'{"gather_granularity": "layer"}\'',
    )  # fmt: skip


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object from the command line."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def resolve(args: argparse.Namespace, parser: argparse.ArgumentParser, max_ranks: int) -> None:
    """Replace ``auto`` by the device and precision in use, and exit with an error message on invalid options."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.device_count() >= max_ranks else "cpu"
    if args.device == "cuda" and torch.cuda.device_count() < max_ranks:
        parser.error(
            f"--device cuda needs a GPU for each of {max_ranks} ranks, got {torch.cuda.device_count()} GPUs; "
            "use --device cpu, or fewer ranks"
        )
    os.environ["DS_ACCELERATOR"] = args.device  # deepspeed reads it at import, also in this process
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    try:
        for method in [*args.methods, *(getattr(args, "vs", None) or []), *getattr(args, "accumulating", [])]:
            methods.unavailability(method, 1)
    except ValueError as error:
        parser.error(str(error))


def build_workload(args: argparse.Namespace, model: str, checkpointing: bool) -> Workload:
    """Build the workload that the options describe, for one model."""
    return Workload(
        model,
        args.sequence,
        args.batch,
        args.precision,
        checkpointing,
        args.tiled_logits,
        lomo=dict(args.lomo),
    )


def methods_help(default: list[str]) -> str:
    """Return the help text of an option that takes methods."""
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in methods.DESCRIPTIONS.items())
    return (
        f"any of {meanings}. The suffix {methods.CLIP} clips the global norm; for lomo_ds's own, {methods.INT8} "
        f"stores weights in int8, {methods.QUANTIZED_GATHER} gathers them in int8, and {methods.LAYERED} runs all "
        f"micro-batches of a step inside each layer. {' '.join(default)} by default"
    )


def pluralize(count: int, noun: str) -> str:
    """Return a number with its noun, for example ``1 rank`` or ``2 ranks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
