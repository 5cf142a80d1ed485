"""What a run is, as far as its memory and its time depend on it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lomo_ds.config.lomo_config import GatherGranularity, StashDevice, UpdateSchedule, Weights
from lomo_ds.errors import ConfigError
from lomo_ds.numerics import int8
from lomo_ds.numerics.precision import DTYPES, Precision

Offload = Literal["none", "cpu", "nvme"]
Optimizer = Literal["lomo", "adamw", "sgd"]


@dataclass(frozen=True)
class Settings:
    """A run of ``gpus`` data-parallel ranks under ZeRO-3.

    Attributes:
        gpus: ranks, one on each GPU.
        hosts: machines they are spread over evenly.
        sequence: tokens of a row.
        batch: rows of a rank in a micro-batch.
        accumulation: micro-batches of a step.
        precision: of weights and gradients.
        optimizer: LOMO, or torch.optim's on DeepSpeed's own ZeRO-3, with fp32 master weights.
        fused: whether those optimizers step without temporaries, as ``launch/train.py`` lets them.
        update_schedule, stash_device, gather_granularity: see ``LomoConfig``.
        gradient_clipping: limit on the global norm; 0 for none.
        clip_group_norm: limit on the norm of each decoder layer.
        gradient_checkpointing: whether activations are computed again in backward.
        tiled_logits: whether logits are computed a tile at a time; None: wherever the model allows it.
        offload_param: where a rank's shards lie, if not on its GPU.
        weights: see ``LomoConfig``.
        activation_offload: whether activation checkpoints lie in host memory.
        persistence_threshold, prefetch_bucket_size, max_live_parameters, max_reuse_distance, reduce_bucket_size: of
            DeepSpeed's ``zero_optimization`` (the first four with ``stage3_``, or ``stage3_param_``), in elements.
    """

    gpus: int = 1
    hosts: int = 1
    sequence: int = 1024
    batch: int = 1
    accumulation: int = 1
    precision: Precision = "bf16"
    optimizer: Optimizer = "lomo"
    fused: bool = True
    update_schedule: UpdateSchedule = "auto"
    stash_device: StashDevice = "auto"
    gradient_clipping: float = 1.0
    clip_group_norm: float | None = None
    gradient_checkpointing: bool = False
    tiled_logits: bool | None = None
    gather_granularity: GatherGranularity = "auto"
    offload_param: Offload = "none"
    weights: Weights = "auto"
    activation_offload: bool = False
    persistence_threshold: int = 100_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    reduce_bucket_size: int = 500_000_000

    def __post_init__(self) -> None:
        for name in ("gpus", "hosts", "batch", "accumulation"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.sequence >= 2, "seq", "at least 2", self.sequence)
        limit = self.gradient_clipping
        _require(0 <= limit < math.inf, "gradient_clipping", "at least 0, and finite", limit)
        if self.gpus % self.hosts:
            raise ConfigError(
                f"hosts have as many GPUs each, got {self.gpus} on {self.hosts} hosts; give a divisor of {self.gpus}"
            )
        if self.activation_offload and not self.gradient_checkpointing:
            raise ConfigError(
                "activation_offload moves the checkpoints of gradient checkpointing to host memory; "
                "add gradient_checkpointing, or leave it out"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, gradients and activations."""
        return DTYPES[self.precision]

    @property
    def gpus_of_a_host(self) -> int:
        """Ranks that share one machine's memory."""
        return self.gpus // self.hosts

    @property
    def tokens(self) -> int:
        """Of all ranks in a step."""
        return self.gpus * self.batch * self.accumulation * self.sequence

    @property
    def resident(self) -> bool:
        """Whether parameters stay whole on the one GPU, and nothing is gathered; see ``ResidentGathering``."""
        return self.optimizer == "lomo" and self.gpus == 1 and self.offload_param == "none" and not self.int8_weights

    @property
    def int8_weights(self) -> bool:
        """Whether shards are kept in eight bits."""
        return self.weights == "int8"

    def shard_numel(self, numel: int) -> int:
        """Elements of a rank's partition of a parameter, padding included."""
        return -(-numel // self.gpus)

    def stored_bytes(self, numel: int) -> int:
        """Of ``numel`` elements of a shard, as it lies between its uses."""
        return int8.quantized_bytes(numel) if self.int8_weights else numel * self.dtype.itemsize

    def but(self, **changes: Any) -> "Settings":
        """The same with some changes."""
        return dataclasses.replace(self, **changes)


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {got!r}")
