"""How long a sequence may be for a model with rotary embeddings, and how to stretch these for longer ones."""

import logging
import math
import sys
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lomo_ds.errors import ConfigError
from lomo_ds.models.files import first_line

# what a type of scaling needs beside its factor; llama3's are those of Llama 3.1
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# types that multiply max_position_embeddings, which stays that of pre-training
OF_PRETRAINING = ("linear", "dynamic")
# types whose factor leads from original_max_position_embeddings to the length they were made for
FROM_ORIGINAL = ("yarn", "longrope")

logger = logging.getLogger(__name__)


def positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model allows; None if its configuration does not say.

    Where layers differ in their rotary embeddings, ``max_position_embeddings`` counts what scaling gives.
    """
    named = getattr(config, "max_position_embeddings", None)
    parameters = _parameters(config)
    factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
    if named is None or not isinstance(factor, int | float):
        return named
    if parameters.get("rope_type") in OF_PRETRAINING:
        return round(named * max(factor, 1))
    if parameters.get("rope_type") in FROM_ORIGINAL and original:
        return max(named, round(original * factor))
    return named


def scale_rope(config: PretrainedConfig, scaling: str, length: int | None) -> None:
    """Stretch the rotary embeddings that ``config`` describes.

    Args:
        scaling: TYPE, or TYPE:FACTOR.
        length: of a training sequence, from which the factor follows if none is given.

    Raises:
        ConfigError: ``scaling`` is none, or the model cannot be stretched by it.
    """
    kind, given = _parse(scaling)
    before = getattr(config, "max_position_embeddings", None)
    parameters = _parameters(config)
    if before is None or not parameters or not _reads_scaling(config):
        raise ConfigError(
            f"--rope_scaling stretches rotary embeddings, and a {config.model_type} model has none that transformers "
            "can scale, or differing ones in its layers; train it without"
        )
    has = parameters.get("rope_type", "default")
    if has == kind and given in (None, parameters.get("factor")):
        return  # a model that was trained with the same argument
    if has != "default":
        raise ConfigError(
            f"--rope_scaling {scaling} was asked for, and the model's config.json has {has} scaling already, for up to "
            f"{positions(config)} positions; leave the argument out, or change rope_parameters there"
        )
    factor = given or _factor(scaling, length, before)
    config.rope_parameters = {name: value for name, value in parameters.items() if name != "type"}
    config.rope_parameters |= {"rope_type": kind, "factor": factor} | SCALINGS[kind]
    if kind not in OF_PRETRAINING:
        config.rope_parameters["original_max_position_embeddings"] = before
        config.max_position_embeddings = round(before * factor)
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = before
    _refuse_what_reads_otherwise(config, scaling)
    logger.info("rotary embeddings are scaled: %s, factor %g, %d positions", kind, factor, positions(config))


def _parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Of the rotary embeddings, if all layers have the same; else nothing."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return {} if any(isinstance(value, dict) for value in parameters.values()) else parameters


def _parse(scaling: str) -> tuple[str, float | None]:
    kind, _, number = scaling.partition(":")
    try:
        factor = float(number) if ":" in scaling else None
    except ValueError:
        factor = math.nan
    if kind not in SCALINGS or (factor is not None and not 1 < factor < math.inf):
        raise ConfigError(
            f"--rope_scaling must be one of {', '.join(SCALINGS)}, or that with a factor above 1, yarn:4 for example, "
            f"got {scaling}"
        )
    return kind, factor


def _factor(scaling: str, length: int | None, before: int) -> float:
    """From the positions of pre-training to ``length``."""
    if length is None or length <= before:
        raise ConfigError(
            f"--rope_scaling {scaling} has its factor from --max_seq_length, which must be above the model's {before} "
            f"positions, got {length}; give a longer one, or the factor, {scaling}:2 for example"
        )
    return length / before


def _refuse_what_reads_otherwise(config: PretrainedConfig, scaling: str) -> None:
    """Check that the configuration is the same once it has been written and read: some make other types of theirs."""
    try:
        again = type(config).from_dict(config.to_dict()).rope_parameters
        reason = f"its rope_parameters become {again}" if again != config.rope_parameters else None
    except Exception as error:  # configurations check themselves, with errors of many kinds
        reason = first_line(error)
    if reason is not None:
        raise ConfigError(
            f"--rope_scaling {scaling} was asked for, and a {config.model_type} model cannot be scaled so: {reason}; "
            "train it without, or write rope_parameters into its config.json"
        )


def _reads_scaling(config: PretrainedConfig) -> bool:
    """Whether the model of ``config`` is one whose code looks at the type of scaling, rather than ignoring it."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model is not None and hasattr(sys.modules[model.__module__], "ROPE_INIT_FUNCTIONS")
