"""A DeepSpeed config and the command line made one: ``"auto"`` is filled in, a disagreement names both sides."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

from lomo_ds.arguments import TrainArguments
from lomo_ds.config import require_sections
from lomo_ds.errors import ConfigError, one_line
from lomo_ds.precision import Precision

# where a field of the ds_config and an argument mean the same thing
SAME_MEANING = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.seed": "seed",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.weights": "weights",
}
# what --optim names, as DeepSpeed takes it from torch.optim; fused needs no memory beside gradients and states
BASELINES: dict[str, dict[str, Any]] = {
    "adamw": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}},
    "sgd": {"type": "SGD", "params": {"fused": True}},
}
# of a ds_config's optimizer.params, what --optim adamw and sgd know, or need not: their master weights are fp32
KNOWN = {"lr", "weight_decay", "rounding", "seed", "torch_adam", "fused"}
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a word"}


def read_ds_config(file: str) -> dict[str, Any]:
    """The DeepSpeed config in a JSON file.

    Raises:
        ConfigError: it cannot be read, or is not a JSON object with each field once.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        config = json.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except OSError as error:
        raise ConfigError(f"--deepspeed {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--deepspeed {file} is not JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"--deepspeed {file} is not a DeepSpeed config: it is nested too deep to be read") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {file} must hold a JSON object, got {type(config).__name__}")
    return config


def fill_precision(
    ds_config: dict[str, Any], arguments: TrainArguments, given: frozenset[str], fast: Precision
) -> tuple[dict[str, Any], bool]:
    """``ds_config`` in which bf16 and fp16 that are ``auto`` ask for ``fast``, where no argument says otherwise.

    ``fast`` fp16 becomes fp32 where only bf16 is ``auto``.

    Args:
        given: the arguments that were given, as opposed to left at their default.
        fast: what the device computes fast; see ``fast_precision``.

    Returns:
        The config, and whether ``fast`` decided.
    """
    require_sections(ds_config)
    asked = {name: _get(ds_config, f"{name}.enabled") for name in ("bf16", "fp16")}
    autos = [name for name, value in asked.items() if value == "auto"]
    if not autos or any(name in given or value not in (None, False, "auto") for name, value in asked.items()):
        return ds_config, False
    config = copy.deepcopy(ds_config)
    for name in autos:
        _set(config, f"{name}.enabled", name == fast)
    return config, True


def reconcile(
    ds_config: dict[str, Any], arguments: TrainArguments, given: frozenset[str], world_size: int
) -> tuple[dict[str, Any], TrainArguments]:
    """One truth from two sources: ``auto`` takes the argument, an argument not given takes the ds_config's value.

    Args:
        given: the arguments that were given, as opposed to left at their default.

    Raises:
        ConfigError: an argument that was given differs from the ds_config (every disagreement is listed), or a value
            of the ds_config is not of the argument's type.
    """
    require_sections(ds_config)
    config = copy.deepcopy(ds_config)
    disagreements: list[str] = []
    adopted: dict[str, Any] = {}
    kinds = {
        name: str if get_origin(hint) is Literal else hint for name, hint in get_type_hints(TrainArguments).items()
    }
    for path, name in SAME_MEANING.items():
        theirs = _get(config, path)
        _require_kind(theirs, path, kinds[name])
        if path == "gradient_clipping" and name not in given and (theirs is None or _clips_otherwise(config)):
            theirs = 0.0 if theirs in (None, "auto") else theirs
        if theirs in (None, "auto"):
            _set(config, path, getattr(arguments, name))
        elif name in given and theirs != getattr(arguments, name):
            disagreements.append(f"{path} {json.dumps(theirs)} against --{name} {getattr(arguments, name)}")
        else:
            _set(config, path, theirs)
            adopted[name] = theirs
    if "scheduler" in config:
        theirs = one_line(config["scheduler"].get("type"))
        disagreements += [
            f"scheduler {theirs} against --{name} {getattr(arguments, name)}"
            for name in ("lr_scheduler_type", "warmup_ratio")
            # a resolved config.yaml gives the defaults too, and asks for nothing by it
            if name in given and getattr(arguments, name) != getattr(TrainArguments, name)
        ]
    if disagreements:
        raise ConfigError(
            f"the DeepSpeed config and the command line disagree: {'; '.join(disagreements)}; drop one side of each, "
            'or write "auto" in the DeepSpeed config'
        )
    arguments = dataclasses.replace(arguments, **adopted)
    _settle_train_batch_size(config, arguments, world_size)
    if arguments.optim != "lomo":
        _replace_optimizer(config, ds_config.get("optimizer") or {}, arguments)
    return config, arguments


def fill_scheduler(config: dict[str, Any], arguments: TrainArguments, total_steps: int) -> dict[str, Any]:
    """``config`` with what only the length of the training text tells: the ``auto`` fields of its scheduler.

    Raises:
        ConfigError: something else is still ``auto``, or the scheduler needs what no training gives it.
    """
    config = copy.deepcopy(config)
    if config.get("scheduler", {}).get("type") == "ReduceLROnPlateau":
        raise ConfigError(
            "scheduler ReduceLROnPlateau needs a metric at each step, which training does not give it; "
            "use another, or lr_scheduler_type"
        )
    params = config.get("scheduler", {}).get("params", {})
    known = {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": arguments.learning_rate,
        "warmup_num_steps": warmup_steps(arguments, total_steps),
        "total_num_steps": total_steps,
    }
    params.update({name: value for name, value in known.items() if params.get(name) == "auto"})
    unfilled = [one_line(path) for path in _autos(config)]
    if unfilled:
        raise ConfigError(f'"auto" stands for nothing in the DeepSpeed config\'s {", ".join(unfilled)}; give a value')
    return config


def warmup_steps(arguments: TrainArguments, total_steps: int) -> int:
    """Steps in which the learning rate rises."""
    return round(arguments.warmup_ratio * total_steps)


def _replace_optimizer(config: dict[str, Any], theirs: dict[str, Any], arguments: TrainArguments) -> None:
    """Put the optimizer that ``--optim`` names in the place of LOMO, or of itself."""
    ours, kind = BASELINES[arguments.optim], theirs.get("type", "LOMO")
    if str(kind).lower() not in ("lomo", arguments.optim):
        raise ConfigError(
            f"--optim {arguments.optim} takes the place of LOMO in the DeepSpeed config, got optimizer.type {kind!r}; "
            f"write LOMO or {ours['type']}"
        )
    params = theirs.get("params") or {}
    unknown = [name for name, value in params.items() if name not in KNOWN and value not in (None, "auto")]
    if unknown:
        raise ConfigError(
            f"of the DeepSpeed config's optimizer.params --optim {arguments.optim} knows lr and weight_decay, got "
            f"{one_line(' and '.join(unknown))} too; remove that, or use --optim lomo"
        )
    params = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay, **ours["params"]}
    config["optimizer"] = {"type": ours["type"], "params": params}
    config["zero_allow_untested_optimizer"] = True  # DeepSpeed's list of tested ones has Adam alone


def _settle_train_batch_size(config: dict[str, Any], arguments: TrainArguments, world_size: int) -> None:
    micro, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    size = micro * accumulation * world_size
    theirs = config.get("train_batch_size", "auto")
    if theirs not in ("auto", size):
        raise ConfigError(
            f"train_batch_size {json.dumps(theirs)} in the DeepSpeed config is not "
            f"per_device_train_batch_size {micro} x "
            f'gradient_accumulation_steps {accumulation} x {world_size} GPUs = {size}; write "auto" or {size}'
        )
    config["train_batch_size"] = size


def _require_kind(value: Any, path: str, kind: type) -> None:
    fits = type(value) in ((int, float) if kind is float else (kind,))  # true is an int by inheritance alone
    if value not in (None, "auto") and not fits:
        raise ConfigError(f'{path} in the DeepSpeed config must be {KINDS[kind]} or "auto", got {value!r}')


def _clips_otherwise(config: dict[str, Any]) -> bool:
    """Whether the default of --max_grad_norm, which nobody asked for, would contradict what LOMO was asked for."""
    lomo = _get(config, "optimizer.params") or {}
    clips = lomo.get("clip_grad_value") is not None or lomo.get("clip_group_norm") is not None
    return clips or lomo.get("update_schedule") == "immediate"


def _get(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        config[key] = config.get(key) or {}
        config = config[key]
    config[last] = value


def _autos(config: Any, path: str = "") -> Any:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _autos(value, f"{path}.{key}" if path else key)
    elif config == "auto" and path not in (
        "optimizer.params.update_schedule",
        "optimizer.params.stash_device",
        "optimizer.params.rounding",
        "optimizer.params.gather_granularity",
        "optimizer.params.weights",
    ):
        yield path
