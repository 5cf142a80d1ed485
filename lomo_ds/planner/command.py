"""The command line of ``launch/plan.py``: the arguments of ``launch/train.py``, and those that describe the machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lomo_ds.config.arguments import TrainArguments, help_text, parse
from lomo_ds.config.ds_config import finalize_config, resolve_config
from lomo_ds.config.parameter import parameter
from lomo_ds.data import SIDE_BY_SIDE
from lomo_ds.errors import ConfigError
from lomo_ds.models import scale_rope, sequence_length, set_attention
from lomo_ds.planner.advice import advise
from lomo_ds.planner.bigger_step import find_bigger_step
from lomo_ds.planner.plan import PlannedModel, plan_run
from lomo_ds.planner.report import format_peak, format_plan, plan_as_dict, suggested_plan
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.suggest import settings_as, suggested_ds_config
from lomo_ds.planner.timeline_files import TimelineFiles
from lomo_ds.simulate.machine import Machine, parse_bytes, parse_rate


@dataclass(frozen=True, kw_only=True)
class PlanArguments(TrainArguments):
    """Will a model fit, what will bound its step, and what is the smallest change that makes it fit; without a GPU.

    Takes the arguments of launch/train.py. Memory is as it is sold: GB and GiB are the same. Seconds are those of a
    simulated step; they are as good as the stated speeds of the machine.
    """

    train_file: list[str] | None = parameter(None, "Not read by a plan.")  # type: ignore[assignment]
    output_dir: str = parameter("", "Not written by a plan.")
    num_gpus: int = parameter(1, "GPUs of each machine, as of the deepspeed launcher.", at_least=1)
    num_nodes: int = parameter(1, "Machines, as of the deepspeed launcher.", at_least=1)
    gpu_memory: str = parameter("24GB", "Memory of a GPU.")
    host_memory: str = parameter("128GB", "Memory of a machine.")
    pcie: str = parameter("16GB/s", "Rate between a GPU and its host, in each direction.")
    gpu_link: str | None = parameter(None, "Rate between GPUs, where it is not that of --pcie.")
    nvme: str | None = parameter(None, "Rate of a machine's disk, such as 3GB/s; without it the plan uses no disk.")
    tflops: float = parameter(71.0, "Peak TFLOP/s of a GPU in bf16; 71 is an RTX 3090's.", above=0)
    utilisation: float = parameter(0.6, "Share of the peak that matrix products reach.", above=0, at_most=1)
    memory_bandwidth: str = parameter("936GB/s", "Rate of GPU memory; 936GB/s is an RTX 3090's.")
    launch_microseconds: float = parameter(40.0, "Time in which the host launches one kernel.", above=0)
    suggest: str | None = parameter(None, "File to write the DeepSpeed config to, of the plan or of the one that fits.")
    nvme_path: str | None = parameter(None, "Folder that --suggest writes into a config with parameters on NVMe.")
    timeline: str | None = parameter(
        None,
        "PNG file to draw a simulated step to, of the plan or of the one that fits; a Chrome trace goes beside it.",
    )
    moments: bool = parameter(False, "Print the tensors that make up the peak, the largest first, and no plan.")
    json: bool = parameter(False, "Print JSON.")

    @property
    def machine(self) -> Machine:
        """The machine that the arguments describe."""
        return Machine(
            gpu_memory=parse_bytes(self.gpu_memory, "gpu_memory"),
            host_memory=parse_bytes(self.host_memory, "host_memory"),
            pcie=parse_rate(self.pcie, "pcie"),
            gpu_link=parse_rate(self.gpu_link, "gpu_link") if self.gpu_link else 0.0,
            nvme=parse_rate(self.nvme, "nvme") if self.nvme else 0.0,
            flops=self.tflops * 1e12,
            utilisation=self.utilisation,
            memory_bandwidth=parse_rate(self.memory_bandwidth, "memory_bandwidth"),
            launch_seconds=self.launch_microseconds * 1e-6,
        )


def main(argv: list[str]) -> None:
    """Plan, print, and write the suggested DeepSpeed config.

    Raises:
        LomoError: the arguments contradict each other, or the model cannot be read.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(PlanArguments, "plan.py"))
        return
    arguments, explicit = parse(PlanArguments, argv)
    files = None if arguments.timeline is None else _timeline_files(arguments)
    machine = arguments.machine
    model = PlannedModel.load(arguments.model_name_or_path, arguments.trust_remote_code)
    settings = plan_settings(arguments, explicit, model, Settings)
    result = plan_run(model, settings, machine, by_name=arguments.moments)
    if arguments.moments:
        print(format_peak(result))
        return
    advice = advise(result, model)
    bigger = find_bigger_step(advice.plan if advice else result, model)
    best = suggested_plan(result, advice, bigger)
    if not arguments.json:
        print(format_plan(result, advice, bigger), flush=True)
    step = None if files is None else files.write(best, model, is_suggestion=best is not result)
    if arguments.json:
        print(json.dumps(plan_as_dict(result, advice, bigger) | {"timeline": step and step.as_dict()}, indent=1))
    elif step is not None:
        print(f"\n{step}\n{files}")
    if arguments.suggest is not None:
        _write(Path(arguments.suggest), suggested_ds_config(best, arguments.nvme_path))


def plan_settings(
    arguments: PlanArguments, explicit: frozenset[str], model: PlannedModel, kind: type[Settings]
) -> Settings:
    """Return the settings of the job that ``launch/train.py`` would start with the same arguments.

    Args:
        explicit: names of the arguments that the user set, rather than left at their default.
        kind: the class of the settings.

    Raises:
        ConfigError: the job would be refused.
    """
    gpus = arguments.num_gpus * arguments.num_nodes
    ds_config, arguments, _ = resolve_config(arguments, explicit, gpus, "bf16")
    if arguments.rope_scaling is not None:
        scale_rope(model.config, arguments.rope_scaling, arguments.max_seq_length)
    if arguments.attn_implementation in ("sdpa", "eager"):  # flash attention keeps what sdpa keeps
        set_attention(model.config, arguments.attn_implementation, arguments.precision)
    return settings_as(
        kind,
        finalize_config(ds_config, arguments, total_steps=1, model_config=model.config, world_size=gpus),
        gpus=gpus,
        hosts=arguments.num_nodes,
        sequence=sequence_length(model.config, arguments.max_seq_length),
        documents=arguments.packing_strategy_of(is_text=False) in SIDE_BY_SIDE,  # the data are not read
        attention=arguments.attn_implementation,
        gradient_checkpointing=arguments.gradient_checkpointing,
        tiled_logits=arguments.tiled_logits,
        activation_offload=arguments.activation_offload,
    )


def _timeline_files(arguments: PlanArguments) -> TimelineFiles:
    files = TimelineFiles(Path(str(arguments.timeline)))
    if arguments.moments:
        raise ConfigError("--moments prints no plan, so it has no timeline; leave out --moments or --timeline")
    if arguments.suggest is not None and Path(arguments.suggest).resolve() == files.trace.resolve():
        raise ConfigError(f"--suggest and --timeline would both write {files.trace}; give one of them another name")
    return files


def _write(file: Path, ds_config: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--suggest {file} cannot be written: {error.strerror}") from None
