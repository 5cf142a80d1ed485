"""Models in and out: a Hugging Face folder or a preset into ZeRO-3 shards, and back."""

from lomo_ds.models.build import model_tensors
from lomo_ds.models.export import save_pretrained, save_settings
from lomo_ds.models.load import empty_model, find_model, load_config, load_model, load_tokenizer, verify_export
from lomo_ds.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "empty_model",
    "find_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_tensors",
    "save_pretrained",
    "save_settings",
    "verify_export",
]
