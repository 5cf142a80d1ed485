"""Models in and out: a Hugging Face folder into ZeRO-3 shards, and back."""

from lomo_ds.models.export import save_pretrained
from lomo_ds.models.load import load_config, load_model, load_tokenizer

__all__ = ["load_config", "load_model", "load_tokenizer", "save_pretrained"]
