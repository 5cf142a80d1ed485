"""Loading of a model folder's configuration, with corrections of settings that training cannot use."""

import logging
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lomo_ds.errors import ModelError
from lomo_ds.models.conversion import find_sources
from lomo_ds.models.files import QUANTIZATION, WeightFiles, adapter_hint, first_line, has_weights
from lomo_ds.models.meta_model import meta_model
from lomo_ds.models.presets import is_preset, preset_config

CONFIG = "config.json"

logger = logging.getLogger(__name__)


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of the causal language model in a folder, or of a preset.

    For a multimodal model, this is the configuration of its text model if transformers has a separate class for it.

    Raises:
        ModelError: ``name`` is neither a preset nor a folder with a usable configuration.
    """
    if is_preset(name):
        return preset_config(name)
    if not (Path(name) / CONFIG).is_file():
        raise ModelError(f"a model folder holds a {CONFIG}, got {name}, which has none{adapter_hint(Path(name))}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = _select_text_config(config, name)
    except ModelError:
        raise
    except Exception as error:  # configurations validate themselves and raise many kinds of errors
        raise ModelError(f"{name}/{CONFIG} is not a model configuration: {first_line(error)}") from error
    _drop_quantization(config, name)
    _drop_pad_without_row(config)
    _untie_differing_embeddings(config, Path(name), trust_remote_code)
    return config


def multimodal_config(name: str, config: PretrainedConfig, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """Return the configuration of the multimodal model that contains the text model of ``config``, or None."""
    multimodal = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return multimodal if type(multimodal) is not type(config) else None


def load_generation_config(model: PreTrainedModel, folder: str) -> None:
    """Set the generation configuration of ``model`` from ``folder``, if it has one.

    Raises:
        ModelError: the generation configuration cannot be read.
    """
    if (Path(folder) / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise ModelError(f"{folder}/generation_config.json cannot be read: {first_line(error)}") from error


def _select_text_config(config: PretrainedConfig, name: str) -> PretrainedConfig:
    text = config.get_text_config(decoder=True)
    if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        logger.info("%s is a %s model; only its text model is trained and exported", name, config.model_type)
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
        return text
    auto_map = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in auto_map:
        raise ModelError(
            f"only causal language models can be trained, got {name}, a {config.model_type} model, which transformers' "
            "AutoModelForCausalLM does not know"
        )
    is_encoder = getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder
    if is_encoder and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ModelError(
            f"only causal language models can be trained, got {name}, a {config.model_type} model, which attends both "
            f"ways; set is_decoder to true in its {CONFIG} if each token should attend only to those before it"
        )
    return config


def _drop_quantization(config: PretrainedConfig, name: str) -> None:
    """Remove the quantization settings; loading detects quantized weights by their dtypes and names."""
    if getattr(config, QUANTIZATION, None) is not None:
        logger.info(
            "%s in %s/%s is ignored: weights are trained and exported as plain floating-point numbers",
            QUANTIZATION, name, CONFIG,
        )  # fmt: skip
        delattr(config, QUANTIZATION)


def _drop_pad_without_row(config: PretrainedConfig) -> None:
    """Remove a padding token beyond the embedding, which torch rejects; lomo_ds never pads with it."""
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        logger.warning("the model's pad_token_id %d has no row in its embedding of %d rows and is ignored", pad, rows)
        config.pad_token_id = None


def _untie_differing_embeddings(config: PretrainedConfig, folder: Path, trust_remote_code: bool) -> None:
    """Untie the embeddings in ``config`` if their stored values differ, as transformers does when it loads them."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(config, "tie_word_embeddings", False) or model_class is None or not has_weights(folder):
        return
    stored, tied = WeightFiles(folder).sources, dict(model_class._tied_weights_keys or {})
    if all(any(name.endswith(key.rpartition("model.")[2]) for name in stored) for key in tied):
        model = meta_model(config, torch.float32, trust_remote_code)
        before = set(model.all_tied_weights_keys)
        find_sources(model, folder)
        if before - set(model.all_tied_weights_keys):
            logger.warning("%s ties embeddings in its %s, but their values differ; they are not tied", folder, CONFIG)
            config.tie_word_embeddings = False
