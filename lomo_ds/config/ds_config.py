"""Reconciliation of the DeepSpeed config with the arguments: fills in ``"auto"``, and reports disagreements."""

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lomo_ds.config.arguments import TrainArguments, optimizer_defaults
from lomo_ds.config.ds_fields import TYPE_NAMES, complete_ds_config, normalize_ds_config
from lomo_ds.config.lomo_config import OPTIMIZERS, lomo_parameters, optimizer_name
from lomo_ds.config.parameter import base_type
from lomo_ds.config.sections import require_sections, section_of, value_at
from lomo_ds.config.validation import validate_baseline_config, validate_ds_config
from lomo_ds.errors import ConfigError, one_line
from lomo_ds.numerics.precision import Precision
from lomo_ds.zero3.ds_schema import reject_duplicate_keys

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=TrainArguments)

SHIPPED = Path(__file__).parent.parent / "ds_configs"

# Fields of a DeepSpeed config and the arguments of another name that mean the same; see ``shared_fields``
ALIASES = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}
# The optimizers of --optim, as DeepSpeed reads them; fused needs no memory beside gradients and states
BASELINES: dict[str, dict[str, Any]] = {
    "adamw": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}},
    "sgd": {"type": "SGD", "params": {"fused": True}},
}
# Fields of optimizer.params that --optim adamw and sgd use, or can ignore since their master weights are fp32
BASELINE_PARAMS = {"lr", "weight_decay", "rounding", "seed", "torch_adam", "fused"}


def shared_fields(kind: type[TrainArguments] = TrainArguments) -> dict[str, str]:
    """Return the fields of a DeepSpeed config, by path, that mean the same as an argument of ``kind``, by name."""
    return ALIASES | {f"optimizer.params.{name}": name for name in lomo_parameters(kind)}


def resolve_config(
    arguments: Arguments, explicit: frozenset[str], world_size: int, fast: Precision
) -> tuple[dict[str, Any], Arguments, bool]:
    """Read the DeepSpeed config that ``arguments`` name, and reconcile the two.

    Args:
        explicit: names of the arguments that the user set, rather than left at their default.
        fast: the precision that the device computes fast, see ``fast_precision``.

    Returns:
        The DeepSpeed config, the arguments, and whether ``fast`` decided the precision.

    Raises:
        ConfigError: see ``read_ds_config`` and ``reconcile``.
    """
    ds_config, from_hardware = fill_precision(read_ds_config(arguments.deepspeed), explicit, fast)
    return *reconcile(ds_config, arguments, explicit, world_size), from_hardware


def finalize_config(
    ds_config: dict[str, Any], arguments: TrainArguments, total_steps: int, model_config: Any, world_size: int
) -> dict[str, Any]:
    """Fill in what depends on the model and the length of training, and validate the result.

    Raises:
        ConfigError: a field is still ``auto``, or a setting is not supported.
    """
    ds_config = fill_buckets(fill_scheduler(ds_config, arguments, total_steps), model_config)
    ds_config = complete_ds_config(ds_config, world_size)
    if arguments.is_baseline:
        validate_baseline_config(ds_config)
    else:
        validate_ds_config(ds_config)
    return ds_config


def read_ds_config(file: str) -> dict[str, Any]:
    """Read a DeepSpeed config from a JSON file, or by the name of one that is part of lomo_ds, such as ``zero3_bf16``.

    Raises:
        ConfigError: it cannot be read, is not a JSON object with each field once, or see ``normalize_ds_config``.
    """
    shipped = SHIPPED / f"{file}.json"
    try:
        path = shipped if shipped.parent == SHIPPED and shipped.exists() else Path(file)
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        config = json.loads(text, object_pairs_hook=reject_duplicate_keys)
    except OSError as error:
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"--deepspeed {file} cannot be read: {error.strerror}; give the path of a JSON file, or one of {names}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--deepspeed {file} is not JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"--deepspeed {file} is not a DeepSpeed config: it is nested too deep to be read") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {file} must hold a JSON object, got {type(config).__name__}")
    return normalize_ds_config(config)


def fill_precision(ds_config: dict[str, Any], explicit: frozenset[str], fast: Precision) -> tuple[dict[str, Any], bool]:
    """Set ``auto`` of bf16 and fp16 to the precision ``fast``, unless an argument or the other field decides.

    ``fast`` fp16 becomes fp32 where only bf16 is ``auto``.

    Args:
        explicit: names of the arguments that the user set, rather than left at their default.
        fast: the precision that the device computes fast, see ``fast_precision``.

    Returns:
        The config, and whether ``fast`` decided.
    """
    require_sections(ds_config)
    enabled = {name: value_at(ds_config, f"{name}.enabled") for name in ("bf16", "fp16")}
    autos = [name for name, value in enabled.items() if value == "auto"]
    if not autos or any(name in explicit or value not in (None, False, "auto") for name, value in enabled.items()):
        return ds_config, False
    config = copy.deepcopy(ds_config)
    for name in autos:
        _set(config, f"{name}.enabled", name == fast)
    return config, True


def reconcile(
    ds_config: dict[str, Any], arguments: Arguments, explicit: frozenset[str], world_size: int
) -> tuple[dict[str, Any], Arguments]:
    """Let a DeepSpeed config and the arguments agree: ``auto`` takes the argument, and a default the config's value.

    An absent field counts as ``auto``, and so does an absent optimizer, which is then the one that ``--optim`` names.

    Args:
        explicit: names of the arguments that the user set, rather than left at their default.

    Raises:
        ConfigError: an argument that the user set differs from the DeepSpeed config (the message lists every one), or a
            value of the DeepSpeed config is not of the argument's type.
    """
    require_sections(ds_config)
    config = copy.deepcopy(ds_config)
    arguments = _adopt_optimizer(config, arguments, explicit)
    disagreements: list[str] = []
    adopted: dict[str, Any] = {}
    hints = get_type_hints(type(arguments))
    for path, name in shared_fields(type(arguments)).items():
        value = value_at(config, path)
        _validate_type(value, path, base_type(hints[name]))
        if path == "gradient_clipping" and value in (None, "auto") and name not in explicit:
            value = _default_clip(config, arguments, value)
        if value in (None, "auto"):
            _set(config, path, getattr(arguments, name))
        elif name in explicit and value != getattr(arguments, name):
            disagreements.append(f"{path} {json.dumps(value)} against --{name} {getattr(arguments, name)}")
        else:
            _set(config, path, value)
            adopted[name] = value
    if "scheduler" in config:
        kind = one_line(config["scheduler"].get("type"))
        disagreements += [
            f"scheduler {kind} against --{name} {getattr(arguments, name)}"
            for name in ("lr_scheduler_type", "warmup_ratio")
            # a resolved config.yaml contains the defaults too, which do not contradict a scheduler
            if name in explicit and getattr(arguments, name) != getattr(TrainArguments, name)
        ]
    if disagreements:
        raise ConfigError(
            f"the DeepSpeed config and the command line disagree: {'; '.join(disagreements)}; drop one side of each, "
            'or write "auto" in the DeepSpeed config'
        )
    arguments = dataclasses.replace(arguments, **adopted)
    _resolve_train_batch_size(config, arguments, world_size)
    _resolve_optimizer(config, ds_config.get("optimizer") or {}, arguments)
    return config, arguments


def fill_scheduler(config: dict[str, Any], arguments: TrainArguments, total_steps: int) -> dict[str, Any]:
    """Fill in the ``auto`` fields of the scheduler, which depend on the number of training steps.

    Raises:
        ConfigError: the scheduler needs a metric at each step.
    """
    config = copy.deepcopy(config)
    if config.get("scheduler", {}).get("type") == "ReduceLROnPlateau":
        raise ConfigError(
            "scheduler ReduceLROnPlateau needs a metric at each step, which training does not give it; "
            "use another, or lr_scheduler_type"
        )
    known = {
        "warmup_min_lr": 0.0,
        "warmup_min_ratio": 0.0,
        "warmup_max_lr": arguments.learning_rate,
        "cycle_max_lr": arguments.learning_rate,
        "warmup_num_steps": warmup_steps(arguments, total_steps),
        "total_num_steps": total_steps,
    }
    _fill(section_of(config, "scheduler.params"), known)
    return config


def fill_buckets(config: dict[str, Any], model_config: Any) -> dict[str, Any]:
    """Fill in the ``auto`` sizes of ZeRO-3, which depend on the model, as Hugging Face's Trainer does.

    Args:
        model_config: transformers' configuration; nothing is filled in where it has no hidden size.
    """
    config = copy.deepcopy(config)
    hidden = _hidden_size(model_config)
    if hidden is not None:
        known = {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        _fill(section_of(config, "zero_optimization"), known)
    return config


def _hidden_size(model_config: Any) -> int | None:
    """Return the hidden size of the model, or of its text part; the largest where layers differ."""
    for part in (model_config, getattr(model_config, "text_config", None)):
        sizes = getattr(part, "hidden_size", None) or getattr(part, "hidden_sizes", None)
        if sizes:
            return max(sizes) if isinstance(sizes, list | tuple) else int(sizes)
    return None


def _fill(section: dict[str, Any], known: dict[str, Any]) -> None:
    section.update({name: value for name, value in known.items() if section.get(name) == "auto"})


def warmup_steps(arguments: TrainArguments, total_steps: int) -> int:
    """Return the number of steps in which the learning rate rises."""
    return round(arguments.warmup_ratio * total_steps)


def _adopt_optimizer(config: dict[str, Any], arguments: Arguments, explicit: frozenset[str]) -> Arguments:
    """Let ``--optim``, and the defaults that depend on it, follow the DeepSpeed config where the user set none."""
    name = optimizer_name(config)
    if "optim" in explicit or name not in OPTIMIZERS or name == arguments.optim:
        return arguments
    defaults = {field: value for field, value in optimizer_defaults(name).items() if field not in explicit}
    return dataclasses.replace(arguments, optim=name, **defaults)  # type: ignore[arg-type]


def _resolve_optimizer(config: dict[str, Any], section: dict[str, Any], arguments: TrainArguments) -> None:
    """Set the optimizer to the one that ``--optim`` names; ``section`` is the one in the DeepSpeed config.

    LOMO in the DeepSpeed config, as in those that are part of lomo_ds, gives way to any other that ``--optim`` names.
    """
    kind = section.get("type", "LOMO")
    name = str(kind).lower()
    if name not in ("lomo", arguments.optim):
        wanted = "LOMO" if arguments.is_baseline else OPTIMIZERS[arguments.optim].type_name
        way_out = f'write "optimizer": {{"type": "{wanted}", "params": {{"lr": "auto"}}}}'
        if name in (*OPTIMIZERS, *BASELINES):
            way_out += f", give --optim {name}"
        raise ConfigError(
            f"the DeepSpeed config names the optimizer {one_line(repr(kind))}, and --optim is {arguments.optim}; "
            f"{way_out}, or leave the section out"
        )
    if arguments.is_baseline:
        _replace_optimizer(config, section, arguments)
        return
    if "type" not in section:
        logger.info("optimizer: %s, as the DeepSpeed config names none", OPTIMIZERS[arguments.optim].type_name)
    config["optimizer"]["type"] = OPTIMIZERS[arguments.optim].type_name


def _replace_optimizer(config: dict[str, Any], section: dict[str, Any], arguments: TrainArguments) -> None:
    """Replace LOMO by the baseline that ``--optim`` names."""
    baseline = BASELINES[arguments.optim]
    params = section.get("params") or {}
    unknown = [name for name, value in params.items() if name not in BASELINE_PARAMS and value not in (None, "auto")]
    if unknown:
        raise ConfigError(
            f"of the DeepSpeed config's optimizer.params --optim {arguments.optim} knows lr and weight_decay, got "
            f"{one_line(' and '.join(unknown))} too; remove that, or use --optim {' or '.join(OPTIMIZERS)}"
        )
    defaults = lomo_parameters(type(arguments)).items()
    unused = [n for n, default in defaults if n not in BASELINE_PARAMS and getattr(arguments, n) != default]
    if unused:
        raise ConfigError(
            f"--{' and --'.join(unused)} cannot be used with --optim {arguments.optim}, only with "
            f"{' and '.join(OPTIMIZERS)}; leave it out"
        )
    params = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay, **baseline["params"]}
    config["optimizer"] = {"type": baseline["type"], "params": params}
    config["zero_allow_untested_optimizer"] = True  # DeepSpeed's list of tested ones has Adam alone


def _resolve_train_batch_size(config: dict[str, Any], arguments: TrainArguments, world_size: int) -> None:
    micro, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    size = micro * accumulation * world_size
    configured = config.get("train_batch_size", "auto")
    if configured not in (None, "auto", size):
        raise ConfigError(
            f"train_batch_size {json.dumps(configured)} in the DeepSpeed config is not "
            f"per_device_train_batch_size {micro} x "
            f'gradient_accumulation_steps {accumulation} x {world_size} GPUs = {size}; write "auto" or {size}'
        )
    config["train_batch_size"] = size


def _validate_type(value: Any, path: str, kind: type) -> None:
    matches = type(value) in ((int, float) if kind is float else (kind,))  # isinstance(True, int) holds
    if value not in (None, "auto") and not matches:
        raise ConfigError(f'{path} in the DeepSpeed config must be {TYPE_NAMES[kind]} or "auto", got {value!r}')


def _default_clip(config: dict[str, Any], arguments: TrainArguments, value: Any) -> Any:
    """Return ``value``, which lets --max_grad_norm's default apply; 0 where that would contradict other settings."""
    params = section_of(config, "optimizer.params")

    def setting(name: str) -> Any:
        return getattr(arguments, name) if params.get(name) in (None, "auto") else params[name]

    reasons = [name for name in ("clip_grad_value", "clip_group_norm") if setting(name) is not None]
    reasons += ["update_schedule immediate"] if setting("update_schedule") == "immediate" else []
    if not reasons:
        return value
    logger.info("gradient_clipping: none, as the default of --max_grad_norm gives way to %s", reasons[0])
    return 0.0


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the field at ``path``; None removes it."""
    *sections, last = path.split(".")
    for key in sections:
        config[key] = config.get(key) or {}
        config = config[key]
    if value is None:
        config.pop(last, None)
    else:
        config[last] = value
