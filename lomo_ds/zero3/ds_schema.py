"""DeepSpeed's own description of its config: how its JSON is read, the models of its sections, and former names."""

import types
from typing import Any, Union, get_args, get_origin

from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

reject_duplicate_keys = dict_raise_error_on_duplicate_keys  # for json's object_pairs_hook
REMOVED_FIELDS = tuple(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
SECTION_MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
# Fields of zero_optimization by their former names
ZERO_ALIASES = {name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}


def types_of(section: str, name: str) -> list[Any]:
    """Return the types beside None that DeepSpeed allows for a field; empty where its models do not say.

    Args:
        section: path of the section, ``zero_optimization.offload_param`` for example.
        name: name or former name of the field.
    """
    fields = SECTION_MODELS[section].model_fields if section in SECTION_MODELS else {}
    field = next((field for key, field in fields.items() if name in (key, field.alias)), None)
    if field is None:
        return []
    is_union = get_origin(field.annotation) in (Union, types.UnionType)
    kinds = get_args(field.annotation) if is_union else (field.annotation,)
    return [kind for kind in kinds if kind is not type(None)]
