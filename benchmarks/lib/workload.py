"""The workload of a benchmark: a LLaMA with random weights, trained on random rows of one length."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOY = "toy"  # sixteen narrow layers, which make the overhead beside arithmetic as visible as possible
TINY = "tiny"  # the same with six layers, for trying out a benchmark
NARROW = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SHAPES = {TOY: NARROW | {"num_hidden_layers": 16}, TINY: NARROW | {"num_hidden_layers": 6}}
DRAWN_NUMEL = 2**26  # elements of weights in host memory that are drawn on the GPU at once
# fields of zero_optimization that make DeepSpeed treat a small model like one of many billions of parameters
LARGE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


@dataclass(frozen=True)
class Workload:
    """One model, and the micro-batches of one rank in a step.

    Attributes:
        model: one of ``SHAPES``, or a preset of lomo_ds.models.
        sequence: tokens of a row.
        batch: rows of a micro-batch of each rank.
        precision: one of ``DTYPES``.
        checkpointing: whether activations are recomputed in backward.
        tiled_logits: whether methods of lomo_ds compute the logits in tiles.
        activation_offload: whether activation checkpoints are kept in host memory.
        lomo: further parameters of LOMO in the DeepSpeed config.
        zero: further fields of zero_optimization, for all methods with ZeRO-3.
        communication_data_type: precision that gradients are reduced in; None for their own.
        documents: documents of a row that must not see each other.
        accumulation: micro-batches of each rank in a step.
    """

    model: str
    sequence: int = 128
    batch: int = 1
    precision: str = "fp32"
    checkpointing: bool = False
    tiled_logits: bool = False
    activation_offload: bool = False
    lomo: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    communication_data_type: str | None = None
    documents: int = 1
    accumulation: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and gradients."""
        return DTYPES[self.precision]

    @property
    def tokens(self) -> int:
        """Number of tokens of a rank in a step."""
        return self.sequence * self.batch * self.accumulation

    def config(self) -> Any:
        """Build the model's configuration for transformers."""
        from transformers import LlamaConfig

        from lomo_ds.models.presets import preset_config

        config = LlamaConfig(**SHAPES[self.model]) if self.model in SHAPES else preset_config(self.model)
        config.use_cache = False
        return config

    def ds_config(self, max_norm: float | None) -> dict[str, Any]:
        """Build a DeepSpeed config without an optimizer."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": max_norm or 0.0,
            "zero_optimization": {"stage": 3, **self.zero},
        }
        if self.precision != "fp32":
            config[self.precision] = {"enabled": True}
        if self.communication_data_type is not None:
            config["communication_data_type"] = self.communication_data_type
        return config

    def sharded_model(self, ds_config: dict[str, Any]) -> Any:
        """Build the model partitioned over the ranks; no rank ever holds the full model."""
        from lomo_ds import models, zero3

        def fill(shard: zero3.Shard) -> None:
            draw(shard.name, len(shard.shape), shard.data)

        torch.manual_seed(torch.distributed.get_rank())
        return self._prepared(models.empty_model(self.config(), ds_config, self.dtype, fill=fill))

    def whole_model(self) -> Any:
        """Build the full model in this process."""
        from deepspeed.accelerator import get_accelerator
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        with no_init_weights(), torch.device(get_accelerator().current_device_name()):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=self.dtype)
        torch.manual_seed(torch.distributed.get_rank())
        for name, parameter in model.named_parameters():
            draw(name, parameter.dim(), parameter.data)
        return self._prepared(model)

    def micro_batches(self, device: torch.device) -> list[dict[str, Tensor]]:
        """Draw this rank's micro-batches; every token is a label."""
        generator = torch.Generator().manual_seed(1 + torch.distributed.get_rank())
        return [self._rows(generator, device) for _ in range(self.accumulation)]

    def _rows(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        ids = torch.randint(self.config().vocab_size, (self.batch, self.sequence), generator=generator).to(device)
        rows = {"input_ids": ids, "labels": ids.clone()}
        if self.documents > 1:
            count = torch.arange(self.sequence, device=device) % (self.sequence // self.documents)
            rows["position_ids"] = count.repeat(self.batch, 1)
        return rows

    def _prepared(self, model: Any) -> Any:
        if self.checkpointing:
            from lomo_ds.models import recompute_activations

            recompute_activations(model, self.activation_offload)
        return model.train()


@torch.no_grad()
def draw(name: str, dimensions: int, tensor: Tensor) -> None:
    """Fill a tensor with random initial values of LLaMA, drawn on the GPU if there is one, because that is fast.

    Args:
        dimensions: number of dimensions of the full parameter.
        tensor: on a GPU or in host memory. For host memory, values are drawn on the GPU in parts and copied.
    """
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    if dimensions < 2:
        tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    elif tensor.device.type == device.type:
        tensor.normal_(0.0, 0.02)
    else:
        parts = tensor.view(-1).split(DRAWN_NUMEL)
        drawn = torch.empty_like(parts[0], device=device, pin_memory=False)
        for part in parts:
            part.copy_(
                drawn[: len(part)].normal_(0.0, 0.02), non_blocking=True
            )  # drawing and copying are ordered by one stream
        get_accelerator().synchronize()


def tile_logits(model: Any) -> None:
    """Make lomo_ds compute the model's logits and loss in tiles.

    Raises:
        ValueError: this version of lomo_ds does not support it.
    """
    from lomo_ds import models

    if not hasattr(models, "tile_logits"):
        raise ValueError(
            "--tiled_logits needs lomo_ds.models.tile_logits, which this version of lomo_ds does not have; "
            "leave the option out"
        )
    models.tile_logits(model)


def parameter_count(work: Workload) -> int:
    """Return the number of parameters of the model."""
    from lomo_ds.models import meta_model

    return sum(parameter.numel() for parameter in meta_model(work.config(), work.dtype).parameters())


def flops_per_token(work: Workload) -> int:
    """Return the floating-point operations of forward and backward for one token, without recomputation.

    6 for each weight that the token is multiplied with, and 12 x layers x hidden size x sequence for attention, as in
    PaLM (arXiv 2204.02311, appendix B).
    """
    config = work.config()
    head = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    return 6 * weights + 12 * config.num_hidden_layers * config.hidden_size * work.sequence
