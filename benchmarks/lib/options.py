"""The options that benchmarks of methods on workloads share."""

import argparse
import json
import os
from typing import Any

import torch

from benchmarks.lib import methods
from benchmarks.lib.workload import DTYPES, TINY, TOY, Workload


def add_workload(parser: argparse.ArgumentParser, models: list[str] | None, sequence: int, batch: int) -> None:
    """What is trained on which device; ``models`` None leaves the models to another option."""
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
    parser.add_argument("--tiled_logits", action="store_true", help="let lomo_ds compute the logits a tile at a time")
    parser.add_argument(
        "--lomo", type=settings, default={}, metavar="JSON",
        help='further parameters of LOMO in the DeepSpeed config, for example \'{"gather_granularity": "layer"}\'',
    )  # fmt: skip


def settings(text: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, got {text!r}")
    return found


def settle(given: argparse.Namespace, parser: argparse.ArgumentParser, most_ranks: int) -> None:
    """Resolve ``auto``, and end with a sentence where something cannot be."""
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.device_count() >= most_ranks else "cpu"
    if given.device == "cuda" and torch.cuda.device_count() < most_ranks:
        parser.error(
            f"--device cuda needs a GPU for each of {most_ranks} ranks, and there are {torch.cuda.device_count()}; "
            "use --device cpu, or fewer ranks"
        )
    os.environ["DS_ACCELERATOR"] = given.device  # deepspeed chooses when it is imported, here too
    given.precision = given.precision or ("bf16" if given.device == "cuda" else "fp32")
    try:
        for method in [*given.methods, *(getattr(given, "vs", None) or [])]:
            methods.objection(method, 1)
    except ValueError as error:
        parser.error(str(error))


def workload(given: argparse.Namespace, model: str, checkpointing: bool) -> Workload:
    """The workload of the options for one model."""
    return Workload(
        model,
        given.sequence,
        given.batch,
        given.precision,
        checkpointing,
        given.tiled_logits,
        lomo=dict(given.lomo),
    )


def methods_help(default: list[str]) -> str:
    """What methods there are."""
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in methods.MEANINGS.items())
    return (
        f"any of {meanings}. {methods.CLIP} behind a name clips the global norm, {methods.INT8} behind lomo_ds's own "
        f"keeps weights in eight bits, {methods.QUANTIZED_GATHER} gathers them so. {' '.join(default)} by default"
    )


def told(count: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
