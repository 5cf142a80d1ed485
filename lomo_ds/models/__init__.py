"""Models in and out: a Hugging Face folder or a preset into ZeRO-3 shards, and back."""

from lomo_ds.models.export import save_pretrained
from lomo_ds.models.load import find_model, load_config, load_model, load_tokenizer, verify_export
from lomo_ds.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "find_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "save_pretrained",
    "verify_export",
]
