"""Sections and fields of a DeepSpeed config, addressed by paths such as ``optimizer.params.lr``."""

from typing import Any

from lomo_ds.errors import ConfigError

SECTIONS = (
    "optimizer", "optimizer.params", "scheduler", "scheduler.params", "zero_optimization", "bf16", "bfloat16", "fp16",
    # sections that DeepSpeed does not check to be objects
    "activation_checkpointing", "autotuning", "checkpoint", "checkpoint.parallel_write", "comms_logger", "compile",
    "data_efficiency", "data_types", "flops_profiler", "hybrid_engine", "pipeline", "tensor_parallel", "timers",
    "torch_autocast", "weight_quantization",
)  # fmt: skip
MAX_NESTING = 50  # levels of nesting: DeepSpeed reads and copies a config recursively


def require_sections(ds_config: dict[str, Any]) -> None:
    """Check that the sections of a DeepSpeed config are JSON objects, and that integers and nesting are within bounds.

    Raises:
        ConfigError: a section is not an object, an integer is too large, or the nesting is too deep.
    """
    level: list[Any] = [ds_config]
    for _ in range(MAX_NESTING):
        sections = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for section in sections for value in section if isinstance(value, dict | list | int)]
        if too_large := [value for value in level if isinstance(value, int) and not -(2**63) <= value < 2**63]:
            raise ConfigError(f"an integer in a DeepSpeed config must fit into 64 bits, got {too_large[0]}")
        level = [value for value in level if not isinstance(value, int)]
    if level:
        raise ConfigError(f"a DeepSpeed config must not be nested deeper than {MAX_NESTING} levels")
    for path in SECTIONS:
        value: Any = ds_config
        for key in path.split("."):
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            raise ConfigError(f'"{path}" of the DeepSpeed config must be an object in braces, got {value!r}')


def value_at(ds_config: dict[str, Any], path: str) -> Any:
    """Return the value at ``path``, keys joined by dots; None if absent."""
    value: Any = ds_config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def section_of(config: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the section at ``path``, the config itself for ``""``; an empty dict where it is absent."""
    section = value_at(config, path) if path else config
    return section if isinstance(section, dict) else {}
