"""The configuration of a model folder: what transformers reads, and what of it cannot stand while training."""

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
    """The configuration of the causal language model in a folder, or of a preset.

    Of a model that takes more than text it is the text model's, where transformers knows that as a model of its own.

    Raises:
        ModelError: ``name`` is neither.
    """
    if is_preset(name):
        return preset_config(name)
    if not (Path(name) / CONFIG).is_file():
        raise ModelError(f"a model folder holds a {CONFIG}, got {name}, which has none{adapter_hint(Path(name))}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = _of_text_model(config, name)
    except ModelError:
        raise
    except Exception as error:  # configurations check themselves, with errors of many kinds
        raise ModelError(f"{name}/{CONFIG} is not a model configuration: {first_line(error)}") from error
    _drop_quantization(config, name)
    _drop_pad_without_row(config)
    _untie_what_differs(config, Path(name), trust_remote_code)
    return config


def multimodal_config(name: str, config: PretrainedConfig, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """The configuration of the model that the text model of ``config`` is a part of in its folder; None if of none."""
    whole = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return whole if type(whole) is not type(config) else None


def load_generation_config(model: PreTrainedModel, folder: str) -> None:
    """Give ``model`` the generation settings in ``folder``, if there are any.

    Raises:
        ModelError: they cannot be read.
    """
    if (Path(folder) / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise ModelError(f"{folder}/generation_config.json cannot be read: {first_line(error)}") from error


def _of_text_model(config: PretrainedConfig, name: str) -> PretrainedConfig:
    text = config.get_text_config(decoder=True)
    if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        logger.info("%s is a %s model; its text model alone is trained and exported", name, config.model_type)
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
            f"ways; set is_decoder to true in its {CONFIG} if each token is to see those before it alone"
        )
    return config


def _drop_quantization(config: PretrainedConfig, name: str) -> None:
    """Forget how weights are said to be quantized: whether they are is seen in them when they are loaded."""
    if getattr(config, QUANTIZATION, None) is not None:
        logger.info(
            "%s in %s/%s is left out: weights are trained, and exported, as plain floating-point numbers",
            QUANTIZATION, name, CONFIG,
        )  # fmt: skip
        delattr(config, QUANTIZATION)


def _drop_pad_without_row(config: PretrainedConfig) -> None:
    """Forget a padding token beyond the embedding, which torch refuses to build; nothing is padded with it here."""
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        logger.warning("the model's pad_token_id %d has no row in its embedding of %d, and is left out", pad, rows)
        config.pad_token_id = None


def _untie_what_differs(config: PretrainedConfig, folder: Path, trust_remote_code: bool) -> None:
    """Correct a configuration that ties embeddings which differ in the folder, as transformers ties none that do."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(config, "tie_word_embeddings", False) or kind is None or not has_weights(folder):
        return
    stored, tied = WeightFiles(folder).sources, dict(kind._tied_weights_keys or {})
    if all(any(name.endswith(key.rpartition("model.")[2]) for name in stored) for key in tied):
        model = meta_model(config, torch.float32, trust_remote_code)
        before = set(model.all_tied_weights_keys)
        find_sources(model, folder)
        if before - set(model.all_tied_weights_keys):
            logger.warning("%s holds embeddings that differ, and its %s ties them; they are not tied", folder, CONFIG)
            config.tie_word_embeddings = False
