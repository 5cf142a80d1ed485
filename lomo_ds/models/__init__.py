"""Models: load a Hugging Face folder or a preset into ZeRO-3 shards, and export the trained model."""

from lomo_ds.models.attention import set_attention, without_flash_attention
from lomo_ds.models.chat_template import add_stop_token, set_chat_template, set_eos_token
from lomo_ds.models.embeddings import set_vocab_size
from lomo_ds.models.export import SAVING, Export, save_pretrained, save_settings
from lomo_ds.models.load_model import empty_model, find_model, load_model
from lomo_ds.models.meta_model import meta_model, saved_tensors
from lomo_ds.models.model_config import load_config, load_generation_config
from lomo_ds.models.recompute import recompute_activations
from lomo_ds.models.rope import scale_rope, sequence_length
from lomo_ds.models.tiled_logits import can_tile_logits, tile_logits
from lomo_ds.models.tokenizer import add_special_tokens, load_tokenizer
from lomo_ds.models.verify import verify_export

__all__ = [
    "SAVING",
    "Export",
    "add_special_tokens",
    "add_stop_token",
    "can_tile_logits",
    "empty_model",
    "find_model",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "recompute_activations",
    "save_pretrained",
    "save_settings",
    "saved_tensors",
    "scale_rope",
    "sequence_length",
    "set_attention",
    "set_chat_template",
    "set_eos_token",
    "set_vocab_size",
    "tile_logits",
    "verify_export",
    "without_flash_attention",
]
