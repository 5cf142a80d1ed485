"""The plan of a training run: its memory, its time per step, and whether it fits the machine."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from lomo_ds.errors import ConfigError
from lomo_ds.memory.budget import HOST_SHARE
from lomo_ds.models import can_tile_logits, load_config, meta_model, without_flash_attention
from lomo_ds.models.layered import reason_not_layered
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.step_memory import StepMemory, estimate_memory
from lomo_ds.planner.step_time import StepTime, estimate_time
from lomo_ds.planner.trace import trace_step
from lomo_ds.planner.trace_events import StepTrace
from lomo_ds.simulate.machine import Machine
from lomo_ds.update.accumulation import AccumulationChoice, choose_accumulation, needs_layers
from lomo_ds.update.schedules import Choice, choose_schedule
from lomo_ds.update.schedules.gradient_footprint import gradient_footprint
from lomo_ds.zero3.gathering import choose_granularity, largest_gather_numel, prefetch_limits, prefetches_next_gather

GIB = 2**30


class PlannedModel:
    """A model to plan for. It caches its step traces, so that plans with the same forward and backward share one.

    Args:
        config: configuration of any causal language model.
        name: name of the model in plans.
    """

    def __init__(self, config: PretrainedConfig, name: str = "model", trust_remote_code: bool = False) -> None:
        self.config = without_flash_attention(config)
        self.name = name
        self.trust_remote_code = trust_remote_code
        self.meta_model = meta_model(self.config, torch.bfloat16, trust_remote_code)
        self.numel = sum(parameter.numel() for parameter in self.meta_model.parameters())
        self.can_tile = can_tile_logits(self.meta_model)
        self.reason_not_layered = reason_not_layered(self.meta_model)
        self.traces: dict[tuple[object, ...], tuple[StepTrace, StepTrace]] = {}

    @classmethod
    def load(cls, name: str, trust_remote_code: bool = False) -> "PlannedModel":
        """Load the configuration of a model folder or of a preset.

        Raises:
            ModelError: there is no such model.
        """
        return cls(load_config(name, trust_remote_code), name, trust_remote_code)

    def trace(self, settings: Settings, granularity: str) -> StepTrace:
        """Return the trace of ``trace_step``, as seen when parameters are gathered by ``module`` or by ``layer``."""
        key = (
            settings.batch,
            settings.sequence,
            settings.masked,
            settings.precision,
            settings.gradient_checkpointing,
            settings.resident,
            settings.tiled_logits,
            not settings.is_baseline,
            settings.joined,
            settings.communication_data_type,
        )
        if key not in self.traces:
            trace = trace_step(self.config, settings, self.trust_remote_code)
            self.traces[key] = trace, trace.by_layer()
        return self.traces[key][granularity == "layer" or settings.joined > 1]


@dataclass(frozen=True)
class Plan:
    """The predicted memory and speed of one run on one machine.

    Attributes:
        choice: the update schedule that the settings select, and the reason.
        accumulation: how the gradients of several micro-batches are added up, and the reason.
        granularity: ``module`` or ``layer``, the unit of gathering; ``auto`` if nothing is gathered.
        numel: number of parameter elements of the model.
        tiled: whether logits are computed in tiles.
        memory: memory of each rank.
        time: time of a step.
    """

    model: str
    settings: Settings
    machine: Machine
    choice: Choice
    accumulation: AccumulationChoice
    granularity: str
    numel: int
    tiled: bool
    memory: StepMemory
    time: StepTime

    @property
    def is_joined(self) -> bool:
        """Return whether several micro-batches pass through the model together."""
        return self.accumulation.layered and self.settings.accumulation_steps > 1

    @property
    def recomputes(self) -> bool:
        """Return whether layers keep only their inputs until backward."""
        return self.settings.gradient_checkpointing or self.is_joined

    @property
    def gpu_bytes(self) -> int:
        """Peak bytes of one GPU."""
        return self.memory.peak

    @property
    def pinned_host_bytes(self) -> dict[str, int]:
        """Bytes by kind that all ranks of a host pin together."""
        return {kind: size * self.settings.gpus_per_host for kind, size in self.memory.host.items()}

    @property
    def host_bytes(self) -> int:
        """Bytes that all ranks of a host pin together."""
        return sum(self.pinned_host_bytes.values())

    @property
    def usable_host_bytes(self) -> int:
        """Bytes that may be pinned on a host; the rest is left to the operating system and the data loader."""
        return int(HOST_SHARE * self.machine.host_memory)

    @property
    def fits_gpu(self) -> bool:
        """Return whether the run fits in GPU memory."""
        return self.gpu_bytes <= self.machine.gpu_memory

    @property
    def fits_host(self) -> bool:
        """Return whether the run fits in host memory."""
        return self.host_bytes <= self.usable_host_bytes

    @property
    def fits(self) -> bool:
        """Return whether the run fits in both GPU and host memory."""
        return self.fits_gpu and self.fits_host

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together."""
        return self.settings.tokens / self.time.total

    def __str__(self) -> str:
        """Summarize the plan in one line."""
        host = f" and {gib(self.host_bytes)} GiB of host memory" if self.host_bytes else ""
        rate = f"bound by {self.time.bottleneck_name}, about {rounded(self.tokens_per_second)} tokens/s"
        if not self.fits:
            return f"does not fit: {self.shortfall}"
        need = gib(self.gpu_bytes) if self.gpu_bytes >= GIB / 10 else f"{self.gpu_bytes / 2**20:.1f} MiB"
        memory = f"{need} of {gib(self.machine.gpu_memory)} GiB a"
        if self.machine.device == "cpu":  # its speed is unknown
            return f"{memory} rank"
        return f"{memory} GPU{host}, {rate}"

    @property
    def shortfall(self) -> str:
        """The memory that is too small, in words; empty if the run fits."""
        parts = []
        if not self.fits_gpu:
            parts.append(f"{gib(self.gpu_bytes)} GiB on a GPU of {gib(self.machine.gpu_memory)} GiB")
        if not self.fits_host:
            parts.append(
                f"{gib(self.host_bytes)} GiB of pinned host memory, but only {gib(self.usable_host_bytes)} of "
                f"{gib(self.machine.host_memory)} GiB may be pinned"
            )
        return " and ".join(parts)


def plan_run(model: PlannedModel, settings: Settings, machine: Machine, by_name: bool = False) -> Plan:
    """Predict the memory and speed of a run of ``settings`` on ``machine``, with the engine's own choices.

    If ``accumulation`` or ``gather_granularity`` is auto, and only a leaner choice fits, the plan has that.

    Args:
        by_name: fill in ``memory.sizes``, which takes longer.

    Raises:
        ConfigError: parameters are offloaded to a disk whose speed ``machine`` does not have; or the update schedule
            cannot accumulate gradients.
        ModelError: the model cannot be traced.
    """
    plan = _plan(model, settings, machine, by_name)
    for changes in [] if plan.fits else _leaner_choices(plan):
        try:
            leaner = _plan(model, settings.but(**changes), machine, by_name)
        except ConfigError:
            continue
        if leaner.fits:
            accumulation = leaner.accumulation
            if plan.is_joined and not accumulation.layered:
                accumulation = AccumulationChoice(False, f"layered accumulation would need {plan.shortfall}")
            return dataclasses.replace(leaner, settings=settings, accumulation=accumulation)
    return plan


def _leaner_choices(plan: Plan) -> Iterator[dict[str, str]]:
    """Yield what can be chosen in place of ``auto`` where that needs too much memory."""
    if plan.is_joined and plan.settings.accumulation == "auto":
        yield {"accumulation": "stash"}
    if plan.granularity == "layer" and plan.settings.gather_granularity == "auto":
        yield {"gather_granularity": "module"}


def _plan(model: PlannedModel, settings: Settings, machine: Machine, by_name: bool) -> Plan:
    """Predict the memory and speed of a run, see ``plan_run``."""
    if settings.offload_param == "nvme" and not machine.nvme:
        raise ConfigError("offload_param nvme needs the speed of the disk; give --nvme, for example 3GB/s")
    shards = sum(settings.shard_numel(parameter.numel()) for parameter in model.meta_model.parameters())
    stored = settings.stored_bytes(shards)
    on_gpu, on_host = (stored, 0) if settings.offload_param == "none" else (0, stored)
    if settings.offload_param == "nvme":
        on_host = 0
    free_gpu = max(0, machine.gpu_memory - machine.context - on_gpu)
    free_host = max(0, machine.host_memory // settings.gpus_per_host - on_host)
    granularity = _granularity(model, settings, free_gpu)
    accumulation = _accumulation(model, settings, granularity)
    resolved = settings.but(accumulation=accumulation.name)
    choice = _choice(resolved, shards, free_gpu, free_host)
    if machine.device == "cpu":
        choice = dataclasses.replace(choice, stash_device="gpu")  # host memory is the only memory, as in build_schedule
    footprint = gradient_footprint(choice, settings.clip_group_norm is not None, resolved.stash_dtype)
    trace = model.trace(resolved, granularity)
    limited = _with_prefetch_limits(model, resolved, granularity)
    memory = estimate_memory(trace, limited, machine, footprint, by_name)
    time = estimate_time(trace, limited, machine, footprint, memory)
    return Plan(
        model.name, settings, machine, choice, accumulation, granularity, model.numel, trace.tiled, memory, time
    )


def check_host_memory(plan: Plan, advice: str | None) -> None:
    """Raise if a run would pin more host memory than allowed, before it has pinned any.

    Args:
        advice: the smallest change that fits, in words; see ``advise``.

    Raises:
        ConfigError: the run does not fit; the message gives the need, the limit and the advice.
    """
    if plan.fits_host:
        return
    kinds = ", ".join(f"{gib(size)} GiB of {kind}" for kind, size in plan.pinned_host_bytes.items())
    raise ConfigError(
        f"the ranks of a host would pin {gib(plan.host_bytes)} GiB of its memory ({kinds}), but only "
        f"{gib(plan.usable_host_bytes)} of its {gib(plan.machine.host_memory)} GiB may be pinned; "
        f"{advice or 'no change that the planner knows makes it fit'}"
    )


def gib(size: int) -> str:
    """Format bytes in GiB with one decimal."""
    return f"{size / GIB:.1f}"


def rounded(value: float) -> str:
    """Format an estimate with two significant digits."""
    return f"{value:.2g}" if value < 10 else f"{float(f'{value:.2g}'):.0f}"


def _granularity(model: PlannedModel, settings: Settings, free: int) -> str:
    if settings.resident:
        return "auto"
    if settings.is_baseline:
        return "module"
    layered = needs_layers(settings.accumulation, settings.accumulation_steps, model.reason_not_layered)
    return choose_granularity(settings.gather_granularity, model.meta_model.to(settings.dtype), free, layered)


def _accumulation(model: PlannedModel, settings: Settings, granularity: str) -> AccumulationChoice:
    if settings.is_baseline:
        return AccumulationChoice(False, "gradients of all parameters are kept")
    return choose_accumulation(settings.accumulation, model.reason_not_layered, granularity)


def _with_prefetch_limits(model: PlannedModel, settings: Settings, granularity: str) -> Settings:
    """Set the prefetch limits that the engine sets, unless the user has changed them."""
    if settings.is_baseline or not prefetches_next_gather(settings.offload_param, granularity):
        return settings
    largest = largest_gather_numel(model.meta_model, granularity)
    prefetch, live = prefetch_limits(settings.prefetch_bucket_size, settings.max_live_parameters, largest)
    fields = Settings.__dataclass_fields__
    if settings.prefetch_bucket_size == fields["prefetch_bucket_size"].default:
        settings = settings.but(prefetch_bucket_size=prefetch)
    if settings.max_live_parameters == fields["max_live_parameters"].default:
        settings = settings.but(max_live_parameters=live)
    return settings


def _choice(settings: Settings, shard_numel: int, free_gpu: int, free_host: int) -> Choice:
    if settings.is_baseline:
        return Choice("deepspeed", "gpu", "gradients of all parameters are kept")
    stash_dtype = settings.stash_dtype or settings.dtype
    try:
        return choose_schedule(
            settings,
            settings.gradient_clipping,
            settings.precision == "fp16",
            settings.accumulation_steps // settings.joined,
            shard_numel * stash_dtype.itemsize,
            free_gpu,
            free_host,
        )
    except ConfigError as error:
        if settings.update_schedule in ("immediate", "two_pass"):
            raise
        # the stash fits nowhere, which the plan shows
        return Choice("stash", "cpu" if settings.stash_device == "cpu" else "gpu", str(error))
