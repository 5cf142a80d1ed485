"""Validation of a DeepSpeed config: raises before training on every combination that lomo_ds does not support."""

from typing import Any

from lomo_ds.config.lomo_config import OPTIMIZERS, LomoConfig, optimizer_name, read_lomo_config
from lomo_ds.config.parameter import validate_value
from lomo_ds.config.sections import require_sections, value_at
from lomo_ds.errors import ConfigError

# Fields that ask for another engine: the values that leave it off, and why it is not supported
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "sequence_parallel_size": ((1,), "all ranks are data-parallel"),
    "tensor_parallel.autotp_size": ((0, 1), "all ranks are data-parallel"),
    "expert_parallel.enabled": ((False,), "all ranks are data-parallel"),
    "zero_optimization.zenflow": ((), "it is another optimizer"),
    "hybrid_engine.enabled": ((False,), "it is another engine"),
    "compile.deepcompile": ((False,), "it rewrites the backward pass"),
    "data_efficiency.enabled": ((False,), "batches are trained on as they are given"),
    "weight_quantization": (({},), "it is for inference"),
    "checkpoint.load_universal": ((False,), "checkpoints are those of lomo_ds, which any number of ranks reads"),
}
# Fields that only DeepSpeed's own optimizers read, with the value that leaves them off
UNUSED: dict[str, Any] = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True,
    "bf16.immediate_grad_update": False,
    "bf16.check_grad_overflow": True,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "fp16.fp16_master_weights_and_grads": False,
}


def validate_ds_config(ds_config: dict[str, Any]) -> None:
    """Raise, before anything is built, on every combination that lomo_ds does not support exactly.

    Raises:
        ConfigError: the message states what was requested, why it is not supported, and the alternatives.
    """
    lomo = read_lomo_config(ds_config)
    _validate_step(ds_config)
    _validate_optimizer_offload(ds_config)
    _validate_engine(ds_config)
    _validate_gradient_dtypes(ds_config)
    _validate_quantization(ds_config, lomo)
    _validate_clipping(ds_config, lomo)
    _validate_schedule(ds_config, lomo)


def validate_baseline_config(ds_config: dict[str, Any]) -> None:
    """Raise on settings that DeepSpeed's own ZeRO-3 does not support with ``--optim adamw`` or ``--optim sgd``.

    Raises:
        ConfigError: the message states what was requested, why it is not supported, and the alternatives.
    """
    require_sections(ds_config)
    _validate_step(ds_config)
    _validate_engine(ds_config)
    zero = ds_config.get("zero_optimization") or {}
    for section in ("offload_param", "offload_optimizer"):
        if _device(zero.get(section)) == "nvme":
            raise ConfigError(
                f"zero_optimization.{section}.device nvme is not supported for --optim adamw and sgd, only for the "
                f"parameters of {' and '.join(OPTIMIZERS)}; use cpu"
            )
    if zero.get("zero_quantized_weights"):
        raise ConfigError(
            "zero_optimization.zero_quantized_weights is not supported for --optim adamw and sgd, as DeepSpeed's own "
            "needs kernels that do not run everywhere; remove it or set it to false"
        )


def _validate_step(ds_config: dict[str, Any]) -> None:
    validate_value(ds_config.get("gradient_clipping", 0.0), float, "gradient_clipping", at_least=0.0)
    accumulation = ds_config.get("gradient_accumulation_steps")
    validate_value(accumulation, int | None, "gradient_accumulation_steps", at_least=1)


def _validate_engine(ds_config: dict[str, Any]) -> None:
    zero = ds_config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage != 3:
        raise ConfigError(
            f"lomo_ds keeps parameters in the shards of ZeRO stage 3, got zero_optimization.stage {stage!r}; "
            "set it to 3 (on one GPU too: nothing is gathered there)"
        )
    for path, (off, why) in UNSUPPORTED.items():
        if value_at(ds_config, path) not in (None, *off):
            raise ConfigError(f"{path} is not supported, as {why}; remove it")
    for name, default in (
        ("zero_hpz_partition_size", 1),
        ("zero_quantized_gradients", False),
        ("zero_quantized_nontrainable_weights", False),
    ):
        if zero.get(name, default) != default:
            raise ConfigError(
                f"zero_optimization.{name} is not supported, because its copies of the parameters would miss what "
                f"lomo_ds writes into their shards; remove it or set it to {str(default).lower()}"
            )
    if _enabled(ds_config, "torch_autocast"):
        raise ConfigError(
            "torch_autocast is not supported, because the weights themselves are of the lower precision; "
            "enable bf16 or fp16 instead"
        )
    if ds_config.get("managed_gradient_accumulation", True) is not True:
        raise ConfigError(
            "managed_gradient_accumulation false is not supported, because the last backward of a step "
            "must be known for it; remove it and set gradient_accumulation_steps, or use engine.train_batch"
        )


def unused_fields(ds_config: dict[str, Any]) -> list[str]:
    """Return the paths of fields in ``ds_config`` that only DeepSpeed's own optimizers read."""
    return [path for path, off in UNUSED.items() if value_at(ds_config, path) not in (None, off)]


def _validate_gradient_dtypes(ds_config: dict[str, Any]) -> None:
    dtype = value_at(ds_config, "data_types.grad_accum_dtype")
    if dtype not in (None, "fp32", "float32", "float", "torch.float32"):
        raise ConfigError(f"data_types.grad_accum_dtype {dtype} is not supported; remove it, or set it to fp32")
    kept = value_at(ds_config, "data_types.keep_in_fp32_modules")
    if kept not in (None, "auto", []):
        raise ConfigError(
            f"data_types.keep_in_fp32_modules {kept} is not supported, as all weights have one precision; remove it"
        )


def _validate_optimizer_offload(ds_config: dict[str, Any]) -> None:
    type_name = OPTIMIZERS[optimizer_name(ds_config)].type_name
    if _device((ds_config.get("zero_optimization") or {}).get("offload_optimizer")) != "none":
        raise ConfigError(
            f"zero_optimization.offload_optimizer was asked for, but {type_name} has no optimizer state that "
            "can be offloaded; remove it, or use offload_param to keep the parameters in host memory"
        )


def _validate_quantization(ds_config: dict[str, Any], lomo: LomoConfig) -> None:
    zero = ds_config.get("zero_optimization") or {}
    if lomo.weights != "int8":
        return
    if zero.get("zero_quantized_weights"):
        raise ConfigError(
            "weights int8 travel in eight bits as they are, so zero_optimization.zero_quantized_weights has nothing "
            "left to do; remove one of the two"
        )
    if _device(zero.get("offload_param")) == "nvme":
        raise ConfigError(
            "weights int8 lie in GPU or host memory, and shards on NVMe are floats; use offload_param.device cpu, or "
            "leave weights out"
        )


def _validate_clipping(ds_config: dict[str, Any], lomo: LomoConfig) -> None:
    clips = {
        "gradient_clipping": ds_config.get("gradient_clipping") or None,
        "optimizer.params.clip_grad_value": lomo.clip_grad_value,
        "optimizer.params.clip_group_norm": lomo.clip_group_norm,
    }
    requested = [f"{name} {limit}" for name, limit in clips.items() if limit is not None]
    if len(requested) > 1:
        raise ConfigError(f"only one kind of clipping can be in force, got {' and '.join(requested)}; keep one of them")


def _validate_schedule(ds_config: dict[str, Any], lomo: LomoConfig) -> None:
    accumulation = ds_config.get("gradient_accumulation_steps") or 1
    schedule = lomo.update_schedule
    if schedule == "immediate":
        alternatives = "use update_schedule stash (or two_pass)"
        if (ds_config.get("gradient_clipping") or 0) > 0:
            raise ConfigError(
                f"update_schedule immediate cannot honour gradient_clipping {ds_config['gradient_clipping']}, because "
                f"it updates weights before the global norm is known; {alternatives}, or clip with clip_group_norm or "
                "clip_grad_value"
            )
        if _enabled(ds_config, "fp16"):
            raise ConfigError(
                "update_schedule immediate cannot train in fp16, because an overflow may be found after weights have "
                f"changed; {alternatives}, or bf16"
            )
    if schedule in ("immediate", "two_pass") and accumulation > 1 and lomo.accumulation == "stash":
        raise ConfigError(
            f"update_schedule {schedule} keeps no gradients, which accumulation stash needs for "
            f"gradient_accumulation_steps {accumulation}; use accumulation layered, or update_schedule stash"
        )
    if lomo.accumulation == "layered" and lomo.gather_granularity == "module":
        raise ConfigError(
            "accumulation layered gathers whole layers, and gather_granularity module gathers their modules one by "
            "one; leave one of the two out"
        )


def _enabled(ds_config: dict[str, Any], section: str) -> bool:
    return bool(value_at(ds_config, f"{section}.enabled"))


def _device(section: Any) -> str:
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"
