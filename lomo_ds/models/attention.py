"""The implementation of attention that a model is built with, and what flash attention must be told about documents.

Configurations are exported without it.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils.generic import is_flash_attention_requested

from lomo_ds.config.arguments import Attention
from lomo_ds.errors import ConfigError, ModelError
from lomo_ds.numerics.precision import Precision

# of each kind of flash attention: whether it is available, and how to install it
FLASH: dict[str, tuple[Callable[[], bool], str]] = {
    "flash_attention_2": (is_flash_attn_2_available, "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": (is_flash_attn_3_available, "build flash-attn-3 from the folder hopper of flash-attention"),
}


def set_attention(config: PretrainedConfig, implementation: Attention, precision: Precision) -> None:
    """Let the model of ``config`` compute its attention by ``implementation``.

    Args:
        precision: precision of the weights.

    Raises:
        ConfigError: flash attention is not available, or not in this precision.
        ModelError: the architecture does not support the implementation.
    """
    rule = f"--attn_implementation {implementation} needs"
    instead = "or use --attn_implementation sdpa"
    if implementation in FLASH:
        is_available, install = FLASH[implementation]
        if not is_available():
            raise ConfigError(f"{rule} its package and a CUDA GPU, which were not found here; {install}, {instead}")
        if precision == "fp32":
            raise ConfigError(f"{rule} weights in bf16 or fp16, got fp32; train in one of them, {instead}")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not _supports(model_class, implementation):
        raise ModelError(
            f"{rule} an architecture for which transformers has it, got {model_class.__name__}, for which it has not; "
            "leave --attn_implementation out"
        )
    config._attn_implementation = implementation


def _supports(model_class: type | None, implementation: Attention) -> bool:
    """Return whether a class of transformers supports ``implementation``; a class of the model's own may."""
    supported = {"eager": "", "sdpa": "_supports_sdpa"}.get(implementation, "_supports_flash_attn")
    return model_class is None or not supported or getattr(model_class, supported)


def without_flash_attention(config: PretrainedConfig) -> PretrainedConfig:
    """Return ``config`` with sdpa in the place of flash attention, for a model on the meta device.

    Both keep the same tensors for backward, but flash attention runs only on a GPU.
    """
    if not is_flash_attention_requested(config):
        return config
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    return config


def document_boundaries(position_ids: Tensor) -> dict[str, Any]:
    """Return transformers' arguments for flash attention on rows of packed documents, one after the other.

    Args:
        position_ids: (rows, length) integers; where they do not count up by 1, a document begins.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    starts = begins.flatten().nonzero().flatten()
    offsets = torch.nn.functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(offsets.diff().max())
    return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
