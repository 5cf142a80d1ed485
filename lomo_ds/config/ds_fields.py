"""Names, types and defaults of the fields of a DeepSpeed config.

Later code reads both DeepSpeed's parsed config and the dict; after ``complete_ds_config`` the two agree.
"""

import copy
import logging
from collections.abc import Iterator
from typing import Any

from lomo_ds.config.lomo_config import LomoParameters, lomo_parameters
from lomo_ds.config.sections import require_sections, section_of
from lomo_ds.distributed.process_group import is_main_process
from lomo_ds.errors import ConfigError, did_you_mean, one_line
from lomo_ds.zero3.ds_schema import REMOVED_FIELDS, SECTION_MODELS, ZERO_ALIASES, types_of

logger = logging.getLogger(__name__)

TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a word"}
# Top-level fields of DeepSpeed, with a type if DeepSpeed does not check it itself
TOP_LEVEL_FIELDS: dict[str, Any] = {
    "train_batch_size": int, "train_micro_batch_size_per_gpu": int, "gradient_accumulation_steps": int,
    "gradient_clipping": float, "gradient_predivide_factor": float, "prescale_gradients": bool,
    "managed_gradient_accumulation": bool, "sequence_parallel_size": int, "vocabulary_size": int,
    "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool, "wall_clock_breakdown": bool,
    "memory_breakdown": bool, "dump_state": bool, "disable_allgather": bool, "disable_python_gc": bool,
    "dataloader_drop_last": bool, "use_data_before_expert_parallelism": bool,
} | dict.fromkeys((
    "optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "torch_autocast", "steps_per_print", "log_level",
    "communication_data_type", "seq_parallel_communication_data_type", "gradient_allreduce_op", "allgather_size",
    "activation_checkpointing", "aio", "autotuning", "checkpoint", "comet", "comms_logger", "compile", "csv_monitor",
    "data_efficiency", "data_types", "datastates_ckpt", "expert_parallel", "flops_profiler", "hybrid_engine",
    "pipeline", "tensor_parallel", "tensorboard", "timers", "wandb", "weight_quantization",
    *REMOVED_FIELDS,
))  # fmt: skip
SECTION_FIELDS = {"optimizer": ("type", "params", "legacy_fusion"), "scheduler": ("type", "params")}
RENAMED = {
    "": {"bfloat16": "bf16"},
    "zero_optimization": {
        **ZERO_ALIASES,
        "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    },
}
REPLACED = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"pin_memory" in "offload_param"',
}
# Fields of which "auto" is a valid final value
VALID_AUTOS = {"data_types.keep_in_fp32_modules", "pipeline.stages"} | {
    f"optimizer.params.{name}" for name, default in lomo_parameters(LomoParameters).items() if default == "auto"
}


def normalize_ds_config(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of ``ds_config`` with current names and checked types, without fields that DeepSpeed ignores.

    Raises:
        ConfigError: a name is misspelt, duplicated or obsolete, or a value has the wrong type.
    """
    require_sections(ds_config)
    config = copy.deepcopy(ds_config)
    for path, names in RENAMED.items():
        _rename(section_of(config, path), path, names)
    zero = section_of(config, "zero_optimization")
    for old, new in REPLACED.items():
        if zero.get(old):
            raise ConfigError(f"zero_optimization.{old} is an old name; write {new} in zero_optimization")
    _drop_unknown(config)
    for path in ("", *SECTION_MODELS):
        section = section_of(config, path)
        for name, value in section.items():
            section[name] = _convert_type(value, f"{path}.{name}".removeprefix("."))
    return config


def complete_ds_config(ds_config: dict[str, Any], world_size: int | None = None) -> dict[str, Any]:
    """Normalize ``ds_config``, and fill in the defaults of the fields that lomo_ds reads.

    An absent ``gradient_clipping`` clips nothing, where DeepSpeed would clip to 1. A ``WarmupDecayLR`` without
    ``warmup_max_lr`` rises to the optimizer's learning rate, as ``WarmupLR`` does, where DeepSpeed would take 0.001.
    Absent batch sizes follow from the others, as in DeepSpeed.

    Args:
        world_size: number of ranks; if None, batch sizes are left unchanged.

    Raises:
        ConfigError: see ``normalize_ds_config``; or a field is still ``auto``, or the batch sizes disagree.
    """
    config = normalize_ds_config(ds_config)
    _check_no_autos(config)
    if config.get("gradient_clipping") is None:
        config["gradient_clipping"] = 0.0
    if section_of(config, "scheduler").get("type") == "WarmupDecayLR":
        config["scheduler"].setdefault("params", {}).setdefault("warmup_max_lr", None)
    if world_size is not None:
        _complete_batch_sizes(config, world_size)
    return config


def field_type(path: str) -> Any:
    """Return the type of the field at ``path``; None if only DeepSpeed checks it."""
    section, _, name = path.rpartition(".")
    if not section:
        return TOP_LEVEL_FIELDS.get(name)
    kinds = types_of(section, name)
    return kinds[0] if len(kinds) == 1 and kinds[0] in TYPE_NAMES else None


def _convert_type(value: Any, path: str) -> Any:
    kind = field_type(path)
    if kind is None or value is None or value == "auto" or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return value
    if kind is int and type(value) is float and value.is_integer():  # JSON may write an integer as 1e9
        return int(value)
    raise ConfigError(f"{path} in the DeepSpeed config must be {TYPE_NAMES[kind]}, got {value!r}")


def _rename(section: dict[str, Any], path: str, names: dict[str, str]) -> None:
    for old, new in names.items():
        if old in section and new in section:
            where = f" of {path}" if path else ""
            raise ConfigError(f"{old} and {new}{where} are two names of one field in the DeepSpeed config; keep {new}")
        if old in section:
            section[new] = section.pop(old)


def _drop_unknown(config: dict[str, Any]) -> None:
    """Raise on misspelt fields, and remove unknown ones, which DeepSpeed would ignore."""
    for name in [name for name in config if name not in TOP_LEVEL_FIELDS]:
        if meant := did_you_mean(str(name), list(TOP_LEVEL_FIELDS)):
            raise ConfigError(f"DeepSpeed knows no {one_line(repr(name))} in its config{meant}")
        if is_main_process():
            logger.warning("DeepSpeed knows no %s in its config, so it is ignored", one_line(repr(name)))
        del config[name]
    for section, known in SECTION_FIELDS.items():
        for name in section_of(config, section):
            if name not in known:
                raise ConfigError(
                    f'"{section}" of the DeepSpeed config has no field {one_line(repr(name))}'
                    f"{did_you_mean(str(name), list(known))}; it knows {', '.join(known)}"
                )


def _check_no_autos(config: dict[str, Any]) -> None:
    paths = [path for path in _autos(config) if path not in VALID_AUTOS]
    if paths:
        unfilled = ", ".join(
            f"{one_line(path)} (write {TYPE_NAMES.get(field_type(path), 'a value')})" for path in paths
        )
        raise ConfigError(
            f'"auto" in the DeepSpeed config has no value here in {unfilled}; only launch/train.py and '
            "Hugging Face's Trainer fill it in, where an argument of theirs says with what"
        )


def _autos(config: Any, path: str = "") -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _autos(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(config, list):
        for value in config:
            yield from _autos(value, path)
    elif config == "auto":
        yield path


def _complete_batch_sizes(config: dict[str, Any], world_size: int) -> None:
    """Derive absent batch sizes as DeepSpeed does; it raises an error itself if both are absent."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        if config.get(name) is not None and config[name] < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {config[name]}")
    total, micro, accumulation = (config.get(name) for name in names)
    if accumulation is None:
        accumulation = max(1, total // (micro * world_size)) if total and micro else 1
    if micro is None and total:
        micro = max(1, total // (accumulation * world_size))
    if micro is not None:
        size = micro * accumulation * world_size
        total = total or size
        if total != size:
            raise ConfigError(
                f"train_batch_size {total} in the DeepSpeed config is not train_micro_batch_size_per_gpu {micro} x "
                f"gradient_accumulation_steps {accumulation} x {world_size} GPUs = {size}; change one of them, or "
                "leave train_batch_size out"
            )
    filled = zip(names, (total, micro, accumulation), strict=True)
    config.update({name: value for name, value in filled if value is not None})
