"""The LOMO section of a DeepSpeed config: its fields, and every combination that is refused, with the way out."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lomo_ds.errors import ConfigError, did_you_mean

UpdateSchedule = Literal["auto", "immediate", "two_pass", "stash"]
StashDevice = Literal["auto", "cpu", "gpu"]
Rounding = Literal["auto", "nearest", "stochastic"]
GatherGranularity = Literal["auto", "module", "layer"]
Weights = Literal["auto", "int8"]
SECTIONS = (
    "optimizer", "optimizer.params", "scheduler", "scheduler.params", "zero_optimization", "bf16", "bfloat16", "fp16",
    # what DeepSpeed takes for an object without looking
    "activation_checkpointing", "autotuning", "checkpoint", "checkpoint.parallel_write", "comms_logger", "compile",
    "data_efficiency", "data_types", "flops_profiler", "hybrid_engine", "pipeline", "tensor_parallel", "timers",
    "torch_autocast", "weight_quantization",
)  # fmt: skip
DEEPEST = 50  # levels of a ds_config; DeepSpeed and copies of it recurse
# what no engine here does, by the values that do not ask for it
OTHER_ENGINES: dict[str, tuple[tuple[Any, ...], str]] = {
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
# what DeepSpeed's own optimizers read, and LOMO has no use for, by the value that does not ask for it
IDLE: dict[str, Any] = {
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


@dataclass(frozen=True)
class LomoConfig:
    """``"optimizer": {"type": "LOMO", "params": {...}}`` of a ds_config.

    Attributes:
        lr: learning rate; a scheduler may change it every step.
        weight_decay: decoupled: p <- (1 - lr weight_decay) p - lr g.
        clip_grad_value: clamp every gradient element to [-value, value].
        clip_group_norm: scale the gradients of each decoder layer down to this norm.
        update_schedule: when a gradient is used: ``immediate`` as it arrives, ``two_pass`` in a second backward
            once the global norm is known, ``stash`` after backward from stored shards; ``auto`` chooses.
        stash_device: where ``stash`` keeps gradient shards.
        rounding: how fp32 results become half-precision weights; ``auto`` is stochastic.
        seed: of stochastic rounding.
        weights: ``int8`` keeps matrices in eight bits, with a scale for each block of 64; ``auto`` keeps them in the
            precision that modules compute in.
        gather_granularity: what parameters are gathered for at once: each ``module``, or a whole decoder ``layer``;
            ``auto`` is layer wherever two layers fit. On one rank without offload nothing is gathered.
    """

    lr: float
    weight_decay: float = 0.0
    clip_grad_value: float | None = None
    clip_group_norm: float | None = None
    update_schedule: UpdateSchedule = "auto"
    stash_device: StashDevice = "auto"
    rounding: Rounding = "auto"
    seed: int = 42
    gather_granularity: GatherGranularity = "auto"
    weights: Weights = "auto"

    def __post_init__(self) -> None:
        _require_number(self.lr, "LOMO's lr", at_least=0.0)
        _require_number(self.weight_decay, "LOMO's weight_decay", at_least=0.0)
        for name in ("clip_grad_value", "clip_group_norm"):
            if getattr(self, name) is not None:
                _require_number(getattr(self, name), f"LOMO's {name}", above=0.0)
        for name, choices in (
            ("update_schedule", get_args(UpdateSchedule)),
            ("stash_device", get_args(StashDevice)),
            ("rounding", get_args(Rounding)),
            ("gather_granularity", get_args(GatherGranularity)),
            ("weights", get_args(Weights)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"LOMO's {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"LOMO's seed must be an integer, got {self.seed!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"LOMO's seed must fit into 64 bits, got {self.seed}")


def read_lomo_config(ds_config: dict[str, Any]) -> LomoConfig:
    """The LOMO section of ``ds_config``.

    Raises:
        ConfigError: the section is missing, names another optimizer, or holds an unknown or impossible value.
    """
    require_sections(ds_config)
    section = ds_config.get("optimizer")
    if not isinstance(section, dict) or str(section.get("type", "")).lower() != "lomo":
        got = section.get("type") if isinstance(section, dict) else section
        raise ConfigError(
            f'lomo_ds needs "optimizer": {{"type": "LOMO", "params": {{"lr": ...}}}} in the DeepSpeed config, '
            f"got {got!r}; use deepspeed.initialize for other optimizers, or --optim of launch/train.py"
        )
    params = section.get("params") or {}
    known = [field.name for field in dataclasses.fields(LomoConfig)]
    for name in params:
        if name not in known:
            raise ConfigError(f"LOMO has no parameter {name!r}{did_you_mean(name, known)}; it knows {', '.join(known)}")
    if "lr" not in params:
        raise ConfigError("LOMO needs a learning rate; set optimizer.params.lr in the DeepSpeed config")
    return LomoConfig(**params)


def require_sections(ds_config: dict[str, Any]) -> None:
    """Check that what must be a JSON object in a ds_config is one, and that nothing in it is out of all bounds.

    Raises:
        ConfigError: something else stands in its place; or an integer or the nesting of sections is too large.
    """
    level: list[Any] = [ds_config]
    for _ in range(DEEPEST):
        sections = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for section in sections for value in section if isinstance(value, dict | list | int)]
        if too_large := [value for value in level if isinstance(value, int) and not -(2**63) <= value < 2**63]:
            raise ConfigError(f"an integer in a DeepSpeed config must fit into 64 bits, got {too_large[0]}")
        level = [value for value in level if not isinstance(value, int)]
    if level:
        raise ConfigError(f"a DeepSpeed config must not be nested deeper than {DEEPEST} levels, and this one is")
    for path in SECTIONS:
        value: Any = ds_config
        for key in path.split("."):
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            raise ConfigError(f'"{path}" of the DeepSpeed config must be an object in braces, got {value!r}')


def refuse_what_cannot_be(ds_config: dict[str, Any]) -> None:
    """Refuse, before anything is built, every combination that lomo_ds cannot carry out exactly.

    Raises:
        ConfigError: one sentence: what was asked, why it cannot be, and the ways out.
    """
    lomo = read_lomo_config(ds_config)
    _require_step(ds_config)
    _refuse_optimizer_offload(ds_config)
    _refuse_other_engines(ds_config)
    _refuse_other_sums(ds_config)
    _refuse_two_quantizations(ds_config, lomo)
    _refuse_clips_that_compete(ds_config, lomo)
    _refuse_what_the_schedule_cannot(ds_config, lomo)


def refuse_what_no_baseline_can(ds_config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed's own ZeRO-3 cannot do here, as ``--optim adamw`` or ``sgd`` run it.

    Raises:
        ConfigError: one sentence: what was asked, why it cannot be, and the ways out.
    """
    require_sections(ds_config)
    _require_step(ds_config)
    _refuse_other_engines(ds_config)
    zero = ds_config.get("zero_optimization") or {}
    for section in ("offload_param", "offload_optimizer"):
        if _device(zero.get(section)) == "nvme":
            raise ConfigError(
                f"zero_optimization.{section}.device nvme is not supported for --optim adamw and sgd, only for the "
                "parameters of lomo; use cpu"
            )
    if zero.get("zero_quantized_weights"):
        raise ConfigError(
            "zero_optimization.zero_quantized_weights is for LOMO here, as DeepSpeed's own needs kernels that do not "
            "run everywhere; remove it or set it to false"
        )


def _require_step(ds_config: dict[str, Any]) -> None:
    _require_number(ds_config.get("gradient_clipping", 0.0), "gradient_clipping", at_least=0.0)
    accumulation = ds_config.get("gradient_accumulation_steps")
    if accumulation is None:
        return
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise ConfigError(f"gradient_accumulation_steps must be an integer of at least 1, got {accumulation!r}")


def _refuse_other_engines(ds_config: dict[str, Any]) -> None:
    zero = ds_config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage != 3:
        raise ConfigError(
            f"lomo_ds keeps parameters in the shards of ZeRO stage 3, got zero_optimization.stage {stage!r}; "
            "set it to 3 (on one GPU too: nothing is gathered there)"
        )
    for path, (unasked, why) in OTHER_ENGINES.items():
        if value_at(ds_config, path) not in (None, *unasked):
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


def idle_fields(ds_config: dict[str, Any]) -> list[str]:
    """The fields of ``ds_config`` that ask DeepSpeed's own optimizers for something, and mean nothing to LOMO."""
    return [path for path, unasked in IDLE.items() if value_at(ds_config, path) not in (None, unasked)]


def _refuse_other_sums(ds_config: dict[str, Any]) -> None:
    dtype = value_at(ds_config, "data_types.grad_accum_dtype")
    if dtype not in (None, "fp32", "float32", "float", "torch.float32"):
        raise ConfigError(
            f"data_types.grad_accum_dtype {dtype} is not supported, as LOMO adds gradients up in fp32; remove it"
        )
    kept = value_at(ds_config, "data_types.keep_in_fp32_modules")
    if kept not in (None, "auto", []):
        raise ConfigError(
            f"data_types.keep_in_fp32_modules {kept} is not supported, as LOMO trains weights of one precision; "
            "remove it"
        )


def _refuse_optimizer_offload(ds_config: dict[str, Any]) -> None:
    if _device((ds_config.get("zero_optimization") or {}).get("offload_optimizer")) != "none":
        raise ConfigError(
            "zero_optimization.offload_optimizer was asked for, but LOMO has no optimizer state to offload; "
            "remove it, or use offload_param to keep the parameters in host memory"
        )


def _refuse_two_quantizations(ds_config: dict[str, Any], lomo: LomoConfig) -> None:
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


def _refuse_clips_that_compete(ds_config: dict[str, Any], lomo: LomoConfig) -> None:
    clips = {
        "gradient_clipping": ds_config.get("gradient_clipping") or None,
        "optimizer.params.clip_grad_value": lomo.clip_grad_value,
        "optimizer.params.clip_group_norm": lomo.clip_group_norm,
    }
    asked = [f"{name} {limit}" for name, limit in clips.items() if limit is not None]
    if len(asked) > 1:
        raise ConfigError(f"only one kind of clipping can be in force, got {' and '.join(asked)}; keep one of them")


def _refuse_what_the_schedule_cannot(ds_config: dict[str, Any], lomo: LomoConfig) -> None:
    accumulation = ds_config.get("gradient_accumulation_steps") or 1
    schedule = lomo.update_schedule
    if schedule == "immediate":
        ways_out = "use update_schedule stash (or two_pass)"
        if (ds_config.get("gradient_clipping") or 0) > 0:
            raise ConfigError(
                f"update_schedule immediate cannot honour gradient_clipping {ds_config['gradient_clipping']}, because "
                f"it updates weights before the global norm is known; {ways_out}, or clip with clip_group_norm or "
                "clip_grad_value"
            )
        if _enabled(ds_config, "fp16"):
            raise ConfigError(
                "update_schedule immediate cannot train in fp16, because an overflow may be found after weights have "
                f"changed; {ways_out}, or bf16"
            )
    if schedule in ("immediate", "two_pass") and accumulation > 1:
        raise ConfigError(
            f"update_schedule {schedule} cannot accumulate gradients (gradient_accumulation_steps {accumulation}), "
            "because it keeps none; use update_schedule stash, or a larger micro-batch with "
            "gradient_accumulation_steps 1"
        )


def _enabled(ds_config: dict[str, Any], section: str) -> bool:
    return bool(value_at(ds_config, f"{section}.enabled"))


def value_at(ds_config: dict[str, Any], path: str) -> Any:
    """What stands at ``path``, keys joined by dots; None where nothing does."""
    value: Any = ds_config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _device(section: Any) -> str:
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def _require_number(value: Any, name: str, at_least: float | None = None, above: float | None = None) -> None:
    rule = f"a number above {above:g}" if above is not None else f"a number of at least {at_least:g}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number or not (value > above if above is not None else value >= (at_least or 0.0)):
        raise ConfigError(f"{name} must be {rule}, got {value!r}")
