"""DeepSpeed's own reading of its config, with each of its ways to fail turned into a sentence."""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, DtypeEnum
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils.logging import get_log_level_from_string
from pydantic import ValidationError

from lomo_ds import zero3
from lomo_ds.engine.lr_schedulers import build_scheduler
from lomo_ds.errors import ConfigError, one_line

# DeepSpeed looks at the type of few values; over the others it stumbles, with one of these
CONFIG_ERRORS = (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)


def parse_ds_config(ds_config: dict[str, Any]) -> DeepSpeedConfig:
    """DeepSpeed's own reading of the config; batch sizes are checked against the process group, if there is one.

    Raises:
        ConfigError: DeepSpeed refuses it, or cannot compute in its precision on this device.
    """
    try:
        parsed = _parsed(ds_config)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(f"DeepSpeed refuses {error.title} {one_line('; '.join(faults))}") from None
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise ConfigError(f"DeepSpeed refuses its config: {one_line(error)}") from error
    except CONFIG_ERRORS as error:
        names = [one_line(name) for name, value in ds_config.items() if _fails_on(name, value)]
        raise ConfigError(
            f"DeepSpeed expects another value in {' and '.join(names) or 'a field'} of its config "
            f"({one_line(error)}); compare it with https://www.deepspeed.ai/docs/config-json"
        ) from error
    power = parsed.float16_config.initial_scale_power
    if not 0 <= power <= 127:
        raise ConfigError(f"fp16.initial_scale_power must be between 0 and 127, as float32 holds no more, got {power}")
    _require_param_dtype(parsed)
    accelerator = get_accelerator()
    for name, enabled, supported in (
        ("fp16", parsed.float16_config.enabled, accelerator.is_fp16_supported()),
        ("bf16", parsed.bfloat16_config.enabled, accelerator.is_bf16_supported()),
    ):
        if enabled and not supported:
            raise ConfigError(
                f"{name} was asked for, but DeepSpeed cannot compute in it on this {accelerator.device_name()} device; "
                "use another precision"
            )
    offload = parsed.zero_config.offload_param
    if offload is not None and offload.device == OffloadDeviceEnum.nvme:
        half = parsed.float16_config.enabled or parsed.bfloat16_config.enabled
        zero3.validate_nvme(ds_config, itemsize=2 if half else 4)
    # DeepSpeed's default is true, for which the host waits for the device at each forward and step
    if "enabled" not in parsed.timers_config.model_fields_set:
        parsed.timers_config.enabled = False
    return parsed


def _parsed(ds_config: dict[str, Any]) -> DeepSpeedConfig:
    """DeepSpeed's reading, and what its engine would read no sooner than when the model is loaded or has stepped."""
    parsed = DeepSpeedConfig(ds_config)
    if parsed.steps_per_print is not None:
        _ = 1 % parsed.steps_per_print
    if parsed.log_level is not None:
        get_log_level_from_string(parsed.log_level)
    for dtype in (parsed.grad_accum_dtype, parsed.param_dtype, parsed.buffer_dtype):
        if dtype is not None:
            DtypeEnum(dtype)
    if parsed.scheduler_name is not None:
        _try_scheduler(parsed.scheduler_name, parsed.scheduler_params)
    return parsed


def _require_param_dtype(parsed: DeepSpeedConfig) -> None:
    precision = "fp16" if parsed.float16_config.enabled else "bf16" if parsed.bfloat16_config.enabled else "fp32"
    if parsed.param_dtype is not None and DtypeEnum(parsed.param_dtype) != DtypeEnum(precision):
        raise ConfigError(
            f"data_types.param_dtype {parsed.param_dtype} is not the {precision} that bf16.enabled and fp16.enabled "
            "ask for; remove it"
        )


def _try_scheduler(name: str, params: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = build_scheduler(name, params, optimizer)
    optimizer.step()
    if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):  # which wants a metric at each step
        scheduler.step()


def _fails_on(name: str, value: Any) -> bool:
    """Whether this field alone is what DeepSpeed stumbled over, which its error does not tell."""
    try:
        _parsed({"train_micro_batch_size_per_gpu": 1, name: value})
    except CONFIG_ERRORS:
        return True
    except (DeepSpeedConfigError, ValueError, AssertionError):
        return False
    return False
