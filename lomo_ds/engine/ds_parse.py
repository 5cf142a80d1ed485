"""Parsing of the config by DeepSpeed, with every failure turned into a clear error message."""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, DtypeEnum
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils.logging import get_log_level_from_string
from pydantic import ValidationError

from lomo_ds import zero3
from lomo_ds.engine.client_arguments import needs_metric
from lomo_ds.engine.lr_schedulers import build_scheduler
from lomo_ds.errors import ConfigError, one_line

# DeepSpeed checks the type of few values; for the others a wrong type causes one of these exceptions
CONFIG_ERRORS = (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)


def parse_ds_config(ds_config: dict[str, Any]) -> DeepSpeedConfig:
    """Parse the config with DeepSpeed; batch sizes are checked against the process group, if there is one.

    Raises:
        ConfigError: DeepSpeed rejects the config, or does not support its precision on this device.
    """
    try:
        parsed = _parse(ds_config)
    except ValidationError as error:
        details = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise ConfigError(f"DeepSpeed rejects {error.title} {one_line('; '.join(details))}") from None
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise ConfigError(f"DeepSpeed rejects its config: {one_line(error)}") from error
    except CONFIG_ERRORS as error:
        names = [one_line(name) for name, value in ds_config.items() if _fails_on(name, value)]
        raise ConfigError(
            f"DeepSpeed expects another value in {' and '.join(names) or 'a field'} of its config "
            f"({one_line(error)}); compare it with https://www.deepspeed.ai/docs/config-json"
        ) from error
    power = parsed.float16_config.initial_scale_power
    if not 0 <= power <= 127:
        raise ConfigError(
            f"fp16.initial_scale_power must be between 0 and 127, the largest power of two that float32 can hold, "
            f"got {power}"
        )
    _validate_param_dtype(parsed)
    accelerator = get_accelerator()
    for name, enabled, supported in (
        ("fp16", parsed.float16_config.enabled, accelerator.is_fp16_supported()),
        ("bf16", parsed.bfloat16_config.enabled, accelerator.is_bf16_supported()),
    ):
        if enabled and not supported:
            raise ConfigError(
                f"{name} is enabled, but DeepSpeed does not support it on this {accelerator.device_name()} device; "
                "use another precision"
            )
    offload = parsed.zero_config.offload_param
    if offload is not None and offload.device == OffloadDeviceEnum.nvme:
        half = parsed.float16_config.enabled or parsed.bfloat16_config.enabled
        zero3.validate_nvme(ds_config, itemsize=2 if half else 4)
    # DeepSpeed's default true makes the host wait for the device at each forward and step
    if "enabled" not in parsed.timers_config.model_fields_set:
        parsed.timers_config.enabled = False
    return parsed


def _parse(ds_config: dict[str, Any]) -> DeepSpeedConfig:
    """Parse the config, and check values that DeepSpeed's engine would first read after loading or stepping."""
    parsed = DeepSpeedConfig(ds_config)
    if parsed.steps_per_print is not None:
        _ = 1 % parsed.steps_per_print
    if parsed.log_level is not None:
        get_log_level_from_string(parsed.log_level)
    for dtype in (parsed.grad_accum_dtype, parsed.param_dtype, parsed.buffer_dtype):
        if dtype is not None:
            DtypeEnum(dtype)
    if parsed.scheduler_name is not None:
        _validate_scheduler(parsed.scheduler_name, parsed.scheduler_params)
    return parsed


def _validate_param_dtype(parsed: DeepSpeedConfig) -> None:
    precision = "fp16" if parsed.float16_config.enabled else "bf16" if parsed.bfloat16_config.enabled else "fp32"
    if parsed.param_dtype is not None and DtypeEnum(parsed.param_dtype) != DtypeEnum(precision):
        raise ConfigError(
            f"data_types.param_dtype must be {precision}, as set by bf16.enabled and fp16.enabled, got "
            f"{parsed.param_dtype}; remove it"
        )


def _validate_scheduler(name: str, params: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = build_scheduler(name, params, optimizer)
    optimizer.step()
    if not needs_metric(scheduler):
        scheduler.step()


def _fails_on(name: str, value: Any) -> bool:
    """Return whether this field alone makes DeepSpeed fail; its exception does not name the field."""
    try:
        _parse({"train_micro_batch_size_per_gpu": 1, name: value})
    except CONFIG_ERRORS:
        return True
    except (DeepSpeedConfigError, ValueError, AssertionError):
        return False
    return False
