"""The longest sequence of models with rotary embeddings (RoPE), and RoPE scaling for longer sequences."""

import logging
import math
import sys
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lomo_ds.config.arguments import MAX_SEQ_LENGTH
from lomo_ds.errors import ConfigError
from lomo_ds.models.files import first_line

# supported scaling types and their parameters other than the factor; llama3 uses those of Llama 3.1
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# types for which max_position_embeddings keeps the pre-training value, and the longest sequence is a multiple of it
SCALES_MAX_POSITIONS = ("linear", "dynamic")
# types for which the longest sequence is the factor times original_max_position_embeddings
SCALES_ORIGINAL_POSITIONS = ("yarn", "longrope")

logger = logging.getLogger(__name__)


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that the model allows, or None if its configuration does not say.

    If layers differ in their rotary embeddings, ``max_position_embeddings`` already includes scaling.
    """
    configured = getattr(config, "max_position_embeddings", None)
    parameters = _parameters(config)
    factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
    if configured is None or not isinstance(factor, int | float):
        return configured
    if parameters.get("rope_type") in SCALES_MAX_POSITIONS:
        return round(configured * max(factor, 1))
    if parameters.get("rope_type") in SCALES_ORIGINAL_POSITIONS and original:
        return max(configured, round(original * factor))
    return configured


def sequence_length(config: PretrainedConfig, requested: int | None) -> int:
    """Return the tokens of a training sequence: the requested number, or a default that the model allows.

    Raises:
        ConfigError: the model does not allow as many, or its configuration does not say how many it allows.
    """
    longest = max_positions(config)
    if longest is None:
        if requested is None:
            raise ConfigError("the model's config.json names no max_position_embeddings; give --max_seq_length")
        return requested
    if requested is None:
        length = min(longest, MAX_SEQ_LENGTH)
        logger.info("--max_seq_length was not given: %d, where the model has %d positions", length, longest)
        return length
    if requested > longest:
        raise ConfigError(
            f"--max_seq_length {requested} is longer than the model's {longest} positions; use at most {longest}, or "
            "stretch rotary embeddings with --rope_scaling yarn"
        )
    return requested


def scale_rope(config: PretrainedConfig, scaling: str, length: int | None) -> None:
    """Apply RoPE scaling to ``config``.

    Args:
        scaling: TYPE or TYPE:FACTOR.
        length: the length of a training sequence, which determines the factor if ``scaling`` has none.

    Raises:
        ConfigError: ``scaling`` is invalid, or the model does not support it.
    """
    kind, requested_factor = _parse(scaling)
    before = getattr(config, "max_position_embeddings", None)
    parameters = _parameters(config)
    if before is None or not parameters or not _reads_scaling(config):
        raise ConfigError(
            f"--rope_scaling scales rotary embeddings, but a {config.model_type} model has none that transformers "
            "can scale, or different ones in its layers; train it without this argument"
        )
    current = parameters.get("rope_type", "default")
    if current == kind and requested_factor in (None, parameters.get("factor")):
        return  # the model was trained with the same argument
    if current != "default":
        raise ConfigError(
            f"--rope_scaling {scaling} was given, but the model's config.json has {current} scaling already, for up to "
            f"{max_positions(config)} positions; leave the argument out, or change rope_parameters there"
        )
    factor = requested_factor or _factor(scaling, length, before)
    config.rope_parameters = {name: value for name, value in parameters.items() if name != "type"}
    config.rope_parameters |= {"rope_type": kind, "factor": factor} | SCALINGS[kind]
    if kind not in SCALES_MAX_POSITIONS:
        config.rope_parameters["original_max_position_embeddings"] = before
        config.max_position_embeddings = round(before * factor)
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = before
    _check_survives_saving(config, scaling)
    logger.info("rotary embeddings are scaled: %s, factor %g, %d positions", kind, factor, max_positions(config))


def _parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the RoPE parameters, or an empty dict if layers have different ones."""
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
    """Return the factor from the pre-training length ``before`` to ``length``."""
    if length is None or length <= before:
        raise ConfigError(
            f"--rope_scaling {scaling} takes its factor from --max_seq_length, which must be above the model's "
            f"{before} positions, got {length}; give a longer length, or the factor, for example {scaling}:2"
        )
    return length / before


def _check_survives_saving(config: PretrainedConfig, scaling: str) -> None:
    """Check that the RoPE parameters survive saving and loading, because some configurations change them."""
    try:
        reloaded = type(config).from_dict(config.to_dict()).rope_parameters
        reason = f"its rope_parameters become {reloaded}" if reloaded != config.rope_parameters else None
    except Exception as error:  # configurations validate themselves and raise many kinds of errors
        reason = first_line(error)
    if reason is not None:
        raise ConfigError(
            f"--rope_scaling {scaling} was given, but a {config.model_type} model does not support it: {reason}; "
            "train it without this argument, or write rope_parameters into its config.json"
        )


def _reads_scaling(config: PretrainedConfig) -> bool:
    """Return whether the model's code applies the scaling type instead of ignoring it."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model_class is not None and hasattr(sys.modules[model_class.__module__], "ROPE_INIT_FUNCTIONS")
