"""A plan: one run on one machine, its bytes, its seconds, and whether it fits."""

import dataclasses
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from lomo_ds.config.lomo_config import LomoConfig
from lomo_ds.errors import ConfigError
from lomo_ds.memory.budget import HOST_SHARE
from lomo_ds.models import can_tile_logits, load_config, meta_model
from lomo_ds.planner.machine import Machine
from lomo_ds.planner.moments import Rehearsal
from lomo_ds.planner.rehearsal import rehearse
from lomo_ds.planner.seconds import Seconds, count_seconds
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.step_bytes import Memory, count_memory
from lomo_ds.update.schedules import Choice, choose_schedule
from lomo_ds.update.schedules.gradient_footprint import gradient_footprint
from lomo_ds.zero3.gathering import choose_granularity, largest_use, reach_of_offload

GIB = 2**30


class PlannedModel:
    """A model's configuration, and every rehearsal of it so far: plans that differ elsewhere share them.

    Args:
        config: of any causal language model.
        name: what to call it.
    """

    def __init__(self, config: PretrainedConfig, name: str = "model", trust_remote_code: bool = False) -> None:
        self.config = config
        self.name = name
        self.trust_remote_code = trust_remote_code
        self.empty = meta_model(config, torch.bfloat16, trust_remote_code)
        self.numel = sum(parameter.numel() for parameter in self.empty.parameters())
        self.can_tile = can_tile_logits(self.empty)
        self.rehearsals: dict[tuple[object, ...], tuple[Rehearsal, Rehearsal]] = {}

    @classmethod
    def of(cls, name: str, trust_remote_code: bool = False) -> "PlannedModel":
        """The model of a folder, or a preset.

        Raises:
            ModelError: there is no such model.
        """
        return cls(load_config(name, trust_remote_code), name, trust_remote_code)

    def rehearse(self, settings: Settings, granularity: str) -> Rehearsal:
        """A micro-batch of ``settings``, whose parameters are gathered by ``module`` or by ``layer``."""
        key = (
            settings.batch,
            settings.sequence,
            settings.precision,
            settings.gradient_checkpointing,
            settings.resident,
            settings.tiled_logits,
            settings.optimizer == "lomo",
        )
        if key not in self.rehearsals:
            found = rehearse(self.config, settings, self.trust_remote_code)
            self.rehearsals[key] = found, found.by_layer()
        return self.rehearsals[key][granularity == "layer"]


@dataclass(frozen=True)
class Plan:
    """What a run takes, and what it gives.

    Attributes:
        choice: the update schedule that the settings come to, and why.
        granularity: what is gathered at once; ``auto`` where nothing is.
        numel: parameters of the model.
        memory: of each rank.
    """

    model: str
    settings: Settings
    machine: Machine
    choice: Choice
    granularity: str
    numel: int
    tiled: bool
    memory: Memory
    seconds: Seconds

    @property
    def gpu_bytes(self) -> int:
        """What a GPU needs."""
        return self.memory.peak

    @property
    def pinned_host_bytes(self) -> dict[str, int]:
        """By kind, of all ranks of a host."""
        return {kind: size * self.settings.gpus_of_a_host for kind, size in self.memory.host.items()}

    @property
    def host_bytes(self) -> int:
        """What a host's ranks pin together."""
        return sum(self.pinned_host_bytes.values())

    @property
    def usable_host_bytes(self) -> int:
        """What they may pin; the rest stays with the operating system and the data loader."""
        return int(HOST_SHARE * self.machine.host_memory)

    @property
    def fits_gpu(self) -> bool:
        """Whether a GPU has what it needs."""
        return self.gpu_bytes <= self.machine.gpu_memory

    @property
    def fits_host(self) -> bool:
        """Whether a host has what its ranks pin."""
        return self.host_bytes <= self.usable_host_bytes

    @property
    def fits(self) -> bool:
        """Whether it fits in every memory."""
        return self.fits_gpu and self.fits_host

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.settings.tokens / self.seconds.step

    def __str__(self) -> str:
        """In one line."""
        host = f" and {gib(self.host_bytes)} GiB of host memory" if self.host_bytes else ""
        rate = f"bound by {self.seconds.bound_in_words}, about {rounded(self.tokens_per_second)} tokens/s"
        if not self.fits:
            return f"does not fit: {self.lack}"
        need = gib(self.gpu_bytes) if self.gpu_bytes >= GIB / 10 else f"{self.gpu_bytes / 2**20:.1f} MiB"
        memory = f"{need} of {gib(self.machine.gpu_memory)} GiB a"
        if self.machine.device == "cpu":  # whose speed nobody has stated
            return f"{memory} rank"
        return f"{memory} GPU{host}, {rate}"

    @property
    def lack(self) -> str:
        """What there is too little of, in words."""
        lacks = []
        if not self.fits_gpu:
            lacks.append(f"{gib(self.gpu_bytes)} GiB on a GPU of {gib(self.machine.gpu_memory)} GiB")
        if not self.fits_host:
            lacks.append(
                f"{gib(self.host_bytes)} GiB pinned in host memory, of whose {gib(self.machine.host_memory)} GiB "
                f"{gib(self.usable_host_bytes)} may be"
            )
        return " and ".join(lacks)


def plan(model: PlannedModel, settings: Settings, machine: Machine, by_name: bool = False) -> Plan:
    """What a run of ``settings`` takes on ``machine``, decided as the engine decides.

    Args:
        by_name: whether ``memory.sizes`` are wanted, which takes a while.

    Raises:
        ConfigError: the settings contradict each other.
        ModelError: the model cannot be rehearsed.
    """
    _refuse(settings, machine)
    shards = sum(settings.shard_numel(parameter.numel()) for parameter in model.empty.parameters())
    stored = settings.stored_bytes(shards)
    on_gpu, on_host = (stored, 0) if settings.offload_param == "none" else (0, stored)
    if settings.offload_param == "nvme":
        on_host = 0
    free_gpu = max(0, machine.gpu_memory - machine.context - on_gpu)
    free_host = max(0, machine.host_memory // settings.gpus_of_a_host - on_host)
    granularity = _granularity(model, settings, free_gpu)
    choice = _choice(settings, shards, free_gpu, free_host)
    if machine.device == "cpu":
        choice = dataclasses.replace(choice, stash_device="gpu")  # the one memory there is; see build_schedule
    kept = gradient_footprint(choice, settings.clip_group_norm is not None, _stash_dtype(settings))
    rehearsal = model.rehearse(settings, granularity)
    memory = count_memory(rehearsal, _with_reach(model, settings, granularity), machine, kept, by_name)
    seconds = count_seconds(rehearsal, settings, machine, kept, memory)
    return Plan(model.name, settings, machine, choice, granularity, model.numel, rehearsal.tiled, memory, seconds)


def refuse_what_does_not_fit_host(found: Plan, way_out: str | None) -> None:
    """Refuse a run that would pin more host memory than there is, before it has pinned any.

    Args:
        way_out: the smallest change that fits, in words, see ``advise``.

    Raises:
        ConfigError: need, have, and the way out.
    """
    if found.fits_host:
        return
    kinds = ", ".join(f"{gib(size)} GiB of {kind}" for kind, size in found.pinned_host_bytes.items())
    raise ConfigError(
        f"the ranks of a host would pin {gib(found.host_bytes)} GiB of its memory ({kinds}), and of its "
        f"{gib(found.machine.host_memory)} GiB {gib(found.usable_host_bytes)} may be; "
        f"{way_out or 'no change that the planner knows makes it fit'}"
    )


def gib(size: int) -> str:
    """In GiB, with a digit behind the point."""
    return f"{size / GIB:.1f}"


def rounded(value: float) -> str:
    """To two digits, which is more than an estimate knows; all of it below ten."""
    return f"{value:.2g}" if value < 10 else f"{float(f'{value:.2g}'):.0f}"


def _granularity(model: PlannedModel, settings: Settings, free: int) -> str:
    if settings.resident:
        return "auto"
    if settings.optimizer != "lomo":
        return "module"
    return choose_granularity(settings.gather_granularity, model.empty.to(settings.dtype), free)


def _with_reach(model: PlannedModel, settings: Settings, granularity: str) -> Settings:
    """How far ahead is gathered, where nobody asked for that."""
    if settings.offload_param != "cpu" or settings.optimizer != "lomo":
        return settings
    largest = largest_use(model.empty, granularity)
    prefetch, live = reach_of_offload(settings.prefetch_bucket_size, settings.max_live_parameters, largest)
    asked = Settings.__dataclass_fields__
    if settings.prefetch_bucket_size == asked["prefetch_bucket_size"].default:
        settings = settings.but(prefetch_bucket_size=prefetch)
    if settings.max_live_parameters == asked["max_live_parameters"].default:
        settings = settings.but(max_live_parameters=live)
    return settings


def _choice(settings: Settings, shard_numel: int, free_gpu: int, free_host: int) -> Choice:
    if settings.optimizer != "lomo":
        return Choice("deepspeed", "gpu", "gradients of all parameters are kept")
    stash_dtype = _stash_dtype(settings) or settings.dtype
    try:
        return choose_schedule(
            LomoConfig(
                lr=1.0,
                update_schedule=settings.update_schedule,
                stash_device=settings.stash_device,
                clip_group_norm=settings.clip_group_norm,
            ),
            settings.gradient_clipping,
            settings.precision == "fp16",
            settings.accumulation,
            shard_numel * stash_dtype.itemsize,
            free_gpu,
            free_host,
        )
    except ConfigError as error:  # it fits nowhere, which the plan shows
        return Choice("stash", "cpu" if settings.stash_device == "cpu" else "gpu", str(error))


def _stash_dtype(settings: Settings) -> torch.dtype | None:
    return torch.float32 if settings.accumulation > 1 else None


def _refuse(settings: Settings, machine: Machine) -> None:
    if settings.offload_param == "nvme" and not machine.nvme:
        raise ConfigError("offload_param nvme needs to know how fast the disk is; give --nvme, 3GB/s for one")
    if settings.int8_weights and settings.offload_param == "nvme":
        raise ConfigError("weights int8 cannot lie on NVMe; plan them with --offload_param cpu")
    asked = settings.update_schedule
    if settings.optimizer != "lomo":
        if settings.int8_weights or settings.offload_param == "nvme":
            raise ConfigError("weights in eight bits and on a disk are LOMO's; plan them with --optim lomo")
        return
    if asked == "immediate" and (settings.gradient_clipping or settings.precision == "fp16"):
        raise ConfigError(
            "update_schedule immediate updates weights before the global norm or an overflow is known; plan it with "
            "--gradient_clipping 0 and not in fp16, or use stash or two_pass"
        )
    if asked in ("immediate", "two_pass") and settings.accumulation > 1:
        raise ConfigError(
            f"update_schedule {asked} keeps no gradients to add up, got accumulation {settings.accumulation}; use stash"
        )
    if settings.clip_group_norm is not None and settings.gradient_clipping:
        raise ConfigError(
            "only one kind of clipping can be in force, got gradient_clipping and clip_group_norm; give "
            "--gradient_clipping 0 with the other"
        )
