"""Settings of a run that its memory and step time depend on."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lomo_ds.config.arguments import Attention
from lomo_ds.config.lomo_config import OPTIMIZERS, LomoParameters, OptimizerName
from lomo_ds.config.parameter import parameter, validate_fields
from lomo_ds.errors import ConfigError
from lomo_ds.models.attention import FLASH
from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.numerics.precision import DTYPES, Precision

Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Settings(LomoParameters):
    """A run of ``gpus`` data-parallel ranks under ZeRO-3; made by ``settings_of`` from a DeepSpeed config.

    Attributes:
        gpus: ranks, one on each GPU.
        hosts: machines that the ranks are distributed over evenly.
        sequence: tokens per row.
        batch: rows per micro-batch and rank.
        accumulation_steps: micro-batches per step.
        documents: whether a row holds several documents that must not see each other.
        attention: implementation of attention; None for the model's own.
        precision: precision of weights and gradients.
        optimizer: one that updates during backward, or torch.optim's on DeepSpeed's own ZeRO-3, with fp32 master
            weights.
        fused: whether those optimizers step without temporaries, as in ``launch/train.py``.
        gradient_clipping: limit on the global norm; 0 for none.
        gradient_checkpointing: whether activations are recomputed in backward.
        tiled_logits: whether logits are computed a tile at a time; None to decide by the model.
        offload_param: device that shards are offloaded to between uses.
        activation_offload: whether activation checkpoints are kept in host memory.
        zero_quantized_weights: whether shards are quantized to int8 for gathers.
        communication_data_type: precision that gradients are reduced in; None to keep theirs.
        persistence_threshold, prefetch_bucket_size, max_live_parameters, max_reuse_distance, reduce_bucket_size:
            elements, see ``suggest.ZERO_FIELDS`` for their names in a DeepSpeed config.
    """

    gpus: int = parameter(1, at_least=1)
    hosts: int = parameter(1, at_least=1)
    sequence: int = parameter(1024, at_least=2)
    batch: int = parameter(1, at_least=1)
    accumulation_steps: int = parameter(1, at_least=1)
    documents: bool = False
    attention: Attention | None = None
    precision: Precision = "bf16"
    optimizer: OptimizerName = "lomo"
    fused: bool = True
    gradient_clipping: float = parameter(1.0, at_least=0)
    gradient_checkpointing: bool = False
    tiled_logits: bool | None = None
    offload_param: Offload = "none"
    activation_offload: bool = False
    zero_quantized_weights: bool = False
    communication_data_type: Precision | None = None
    persistence_threshold: int = 100_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    reduce_bucket_size: int = 500_000_000

    def __post_init__(self) -> None:
        validate_fields(self, "")
        if self.gpus % self.hosts:
            raise ConfigError(f"every host must have the same number of GPUs, got {self.gpus} on {self.hosts} hosts")

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights, gradients and activations."""
        return DTYPES[self.precision]

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Data type that gradients are reduced in."""
        return DTYPES[self.communication_data_type or self.precision]

    @property
    def stash_dtype(self) -> torch.dtype | None:
        """Data type of stashed gradient shards; None for the one they arrive in."""
        if self.accumulation_steps > self.joined:
            return torch.float32
        return DTYPES[self.communication_data_type] if self.communication_data_type else None

    @property
    def gpus_per_host(self) -> int:
        """Number of ranks that share one machine's memory."""
        return self.gpus // self.hosts

    @property
    def tokens(self) -> int:
        """Tokens of all ranks in a step."""
        return self.gpus * self.batch * self.accumulation_steps * self.sequence

    @property
    def joined(self) -> int:
        """Micro-batches that pass through the model together: those of a step if accumulation is layered, else one."""
        return self.accumulation_steps if self.accumulation == "layered" else 1

    @property
    def masked(self) -> bool:
        """Return whether attention needs a mask of queries x keys to keep documents apart; flash attention does not."""
        return self.documents and self.attention not in FLASH

    @property
    def is_baseline(self) -> bool:
        """Return whether the optimizer is one of DeepSpeed's own ZeRO-3."""
        return self.optimizer not in OPTIMIZERS

    @property
    def resident(self) -> bool:
        """Return whether parameters stay whole on the only GPU and nothing is gathered; see ``ResidentGathering``."""
        return not self.is_baseline and self.gpus == 1 and self.offload_param == "none" and not self.int8_weights

    @property
    def int8_weights(self) -> bool:
        """Return whether shards are kept in eight bits."""
        return self.weights == "int8"

    @property
    def quantized_gathers(self) -> bool:
        """Return whether gathers round shards to eight bits; a single rank sends nothing."""
        return self.zero_quantized_weights and self.gpus > 1

    def shard_numel(self, numel: int) -> int:
        """Return the elements of a rank's partition of a parameter, padding included."""
        return ceil_div(numel, self.gpus)

    def stored_bytes(self, numel: int) -> int:
        """Return the bytes of ``numel`` elements of a shard between its uses."""
        return int8.quantized_bytes(numel) if self.int8_weights else numel * self.dtype.itemsize

    def is_sent_in_int8(self, shard_numel: int) -> bool:
        """Return whether a shard travels in eight bits, as it is kept so or is quantized; see ``zero3.wire``."""
        return self.int8_weights or (self.quantized_gathers and shard_numel >= int8.BLOCK)

    def sent_bytes(self, shard_numel: int) -> int:
        """Return the bytes that a rank sends of a shard when its parameter is gathered."""
        if self.is_sent_in_int8(shard_numel):
            return int8.quantized_bytes(shard_numel)
        return shard_numel * self.dtype.itemsize

    def but(self, **changes: Any) -> "Settings":
        """Return a copy with some changes."""
        return dataclasses.replace(self, **changes)
