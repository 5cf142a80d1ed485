"""The command line of ``launch/plan.py``."""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from lomo_ds.config.lomo_config import GatherGranularity, StashDevice, UpdateSchedule, Weights
from lomo_ds.errors import ConfigError
from lomo_ds.numerics.precision import Precision
from lomo_ds.planner.advice import advise
from lomo_ds.planner.machine import Machine, parse_bytes, parse_rate
from lomo_ds.planner.plan import PlannedModel, plan_run
from lomo_ds.planner.report import format_peak, format_plan, plan_as_dict
from lomo_ds.planner.settings import Offload, Optimizer, Settings
from lomo_ds.planner.suggest import suggested_ds_config

DESCRIPTION = """\
Will a model fit, what will bound its step, and what is the smallest change that makes it fit; without a GPU.

Memory is as it is sold: GB and GiB are the same. Seconds are those of a machine that keeps busy, an upper bound on
speed.
"""


def main(argv: list[str]) -> None:
    """Plan, print, and write what was suggested.

    Raises:
        LomoError: what was asked for makes no sense, or the model cannot be read.
    """
    given = _parser().parse_args(argv)
    model = PlannedModel.load(given.model, given.trust_remote_code)
    found = plan_run(model, _settings(given), _machine(given), by_name=given.moments)
    if given.moments:
        print(format_peak(found))
        return
    advice = advise(found, model)
    print(json.dumps(plan_as_dict(found, advice), indent=1) if given.json else format_plan(found, advice))
    if given.suggest is not None:
        _write(given.suggest, suggested_ds_config(advice.plan if advice else found, given.nvme_path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("--model", required=True, help="a preset (7b, 13b, 30b, 65b, ...) or a folder with a config.json")
    add("--gpus", type=int, default=1, help="in all; 1 by default")
    add("--hosts", type=int, default=1, help="machines they are in; 1 by default")
    add("--gpu_memory", default="24GB", help="of each; 24GB by default")
    add("--host_memory", default="128GB", help="of each machine; 128GB by default")
    add("--pcie", default="16GB/s", help="between a GPU and its host, either way; 16GB/s by default")
    add("--gpu_link", help="between GPUs, where it is not --pcie")
    add("--nvme", help="of a machine's disk, 3GB/s for one; without it nothing is put there")
    add("--tflops", type=float, default=71.0, help="of a GPU in bf16; 71 by default, an RTX 3090's")
    add("--utilisation", type=float, default=0.5, help="share of them that a step gets; 0.5 by default")
    add("--seq", type=int, default=1024, help="tokens of a row; 1024 by default")
    add("--batch", type=int, default=1, help="rows of a GPU in a micro-batch; 1 by default")
    add("--accumulation", type=int, default=1, help="micro-batches of a step; 1 by default")
    add("--precision", choices=get_args(Precision), default="bf16", help="bf16 by default")
    add("--optim", choices=get_args(Optimizer), default="lomo", help="lomo by default")
    add("--update_schedule", choices=get_args(UpdateSchedule), default="auto", help="auto by default")
    add("--stash_device", choices=get_args(StashDevice), default="auto", help="auto by default")
    add("--gather_granularity", choices=get_args(GatherGranularity), default="auto", help="auto by default")
    add(
        "--prefetch_bucket_size",
        type=int,
        help="elements gathered ahead, as in the DeepSpeed config, whose default it has",
    )
    add("--gradient_clipping", type=float, default=1.0, help="of the global norm, 0 for none; 1 by default")
    add("--clip_group_norm", type=float, help="of each layer's norm instead")
    add("--gradient_checkpointing", action="store_true", help="compute activations again in backward")
    add("--tiled_logits", choices=("true", "false"), help="by default true wherever the model allows it")
    add("--offload_param", choices=get_args(Offload), default="none", help="where shards lie off the GPU; none")
    add("--weights", choices=get_args(Weights), default="auto", help="int8: shards in eight bits; auto by default")
    add("--activation_offload", action="store_true", help="activation checkpoints in host memory")
    add("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    add("--suggest", type=Path, metavar="FILE", help="write the DeepSpeed config of the plan, or of what makes it fit")
    add("--nvme_path", help="folder that --suggest writes into a config with parameters on NVMe")
    add("--moments", action="store_true", help="print which tensors make up the peak, the largest first, and no plan")
    add("--json", action="store_true", help="print JSON")
    return parser


def _machine(given: argparse.Namespace) -> Machine:
    return Machine(
        gpu_memory=parse_bytes(given.gpu_memory, "gpu_memory"),
        host_memory=parse_bytes(given.host_memory, "host_memory"),
        pcie=parse_rate(given.pcie, "pcie"),
        gpu_link=parse_rate(given.gpu_link, "gpu_link") if given.gpu_link else 0.0,
        nvme=parse_rate(given.nvme, "nvme") if given.nvme else 0.0,
        flops=given.tflops * 1e12,
        utilisation=given.utilisation,
    )


def _settings(given: argparse.Namespace) -> Settings:
    ahead = {} if given.prefetch_bucket_size is None else {"prefetch_bucket_size": given.prefetch_bucket_size}
    return Settings(
        gpus=given.gpus,
        hosts=given.hosts,
        sequence=given.seq,
        batch=given.batch,
        accumulation=given.accumulation,
        precision=given.precision,
        optimizer=given.optim,
        update_schedule=given.update_schedule,
        stash_device=given.stash_device,
        gather_granularity=given.gather_granularity,
        gradient_clipping=0.0 if given.clip_group_norm is not None else given.gradient_clipping,
        clip_group_norm=given.clip_group_norm,
        gradient_checkpointing=given.gradient_checkpointing,
        tiled_logits=None if given.tiled_logits is None else given.tiled_logits == "true",
        offload_param=given.offload_param,
        weights=given.weights,
        activation_offload=given.activation_offload,
        **ahead,
    )


def _write(file: Path, ds_config: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--suggest {file} cannot be written: {error.strerror}") from None
