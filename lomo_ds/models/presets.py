"""Model presets by name, without weights: the LLaMA sizes of the LOMO paper, smaller and larger ones."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

# hidden size, intermediate size, layers, attention heads, key-value heads
_SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "40m": (384, 1024, 8, 6, 6),
    "130m": (768, 2048, 12, 12, 12),
    "350m": (1024, 2736, 24, 16, 16),
    "1b": (2048, 5632, 22, 32, 4),  # TinyLlama's
    "7b": (4096, 11008, 32, 32, 32),  # this and the following: LLaMA (arXiv 2302.13971), used in the LOMO paper
    "13b": (5120, 13824, 40, 40, 40),
    "30b": (6656, 17920, 60, 52, 52),
    "65b": (8192, 22016, 80, 64, 64),
    "70b": (8192, 28672, 80, 64, 8),  # LLaMA 2 (arXiv 2307.09288)
    "175b": (12288, 32768, 96, 96, 96),  # the width and depth of GPT-3 (arXiv 2005.14165)
}
PRESETS = tuple(_SHAPES)


def is_preset(name: str) -> bool:
    """Return whether ``name`` is a preset; a local folder of that name takes precedence."""
    return name in PRESETS and not Path(name).is_dir()


def preset_config(name: str, **changes: Any) -> LlamaConfig:
    """Return the configuration of a preset (one of ``PRESETS``), with ``changes`` such as ``vocab_size`` applied."""
    hidden, intermediate, layers, heads, key_value_heads = _SHAPES[name]
    shape = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 2048,
    }
    return LlamaConfig(**shape | changes)
