"""A DeepSpeed config and the command line made one: ``"auto"`` is filled in, a disagreement names both sides."""

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.ds_fields import KINDS, normalized, section_of
from lomo_ds.config.lomo_config import require_sections, value_at
from lomo_ds.errors import ConfigError, one_line
from lomo_ds.numerics.precision import Precision

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent.parent / "ds_configs"

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


def read_ds_config(file: str) -> dict[str, Any]:
    """The DeepSpeed config in a JSON file, or of the name, ``zero3_bf16`` for one, by which it comes with lomo_ds.

    Raises:
        ConfigError: it cannot be read, is not a JSON object with each field once, or see ``normalized``.
    """
    shipped = SHIPPED / f"{file}.json"
    try:
        path = shipped if shipped.parent == SHIPPED and shipped.exists() else Path(file)
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        config = json.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
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
    return normalized(config)


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
    asked = {name: value_at(ds_config, f"{name}.enabled") for name in ("bf16", "fp16")}
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

    A field that is absent is ``auto``, and so is the optimizer, which is then LOMO.

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
        theirs = value_at(config, path)
        _require_kind(theirs, path, kinds[name])
        if path == "gradient_clipping" and theirs in (None, "auto") and name not in given:
            theirs = _default_clip(config, theirs)
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
    _settle_optimizer(config, ds_config.get("optimizer") or {}, arguments)
    return config, arguments


def fill_scheduler(config: dict[str, Any], arguments: TrainArguments, total_steps: int) -> dict[str, Any]:
    """``config`` with what only the length of the training text tells: the ``auto`` fields of its scheduler.

    Raises:
        ConfigError: the scheduler needs what no training gives it.
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
    """``config`` with what only the model tells: the ``auto`` sizes of ZeRO-3, which Hugging Face's Trainer fills so.

    Args:
        model_config: as transformers reads it; without a hidden size nothing is filled in.
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
    """The model's, or of a model of text and images that of its text part; the largest where layers differ."""
    for part in (model_config, getattr(model_config, "text_config", None)):
        sizes = getattr(part, "hidden_size", None) or getattr(part, "hidden_sizes", None)
        if sizes:
            return max(sizes) if isinstance(sizes, list | tuple) else int(sizes)
    return None


def _fill(section: dict[str, Any], known: dict[str, Any]) -> None:
    section.update({name: value for name, value in known.items() if section.get(name) == "auto"})


def warmup_steps(arguments: TrainArguments, total_steps: int) -> int:
    """Steps in which the learning rate rises."""
    return round(arguments.warmup_ratio * total_steps)


def _settle_optimizer(config: dict[str, Any], theirs: dict[str, Any], arguments: TrainArguments) -> None:
    """Let the optimizer be the one that ``--optim`` names."""
    if arguments.optim != "lomo":
        _replace_optimizer(config, theirs, arguments)
        return
    kind = theirs.get("type", "LOMO")
    if str(kind).lower() != "lomo":
        raise ConfigError(
            f"the DeepSpeed config names the optimizer {one_line(repr(kind))}, and --optim is lomo; write "
            '"optimizer": {"type": "LOMO", "params": {"lr": "auto"}}, leave the section out, or train with '
            "--optim adamw or sgd"
        )
    if "type" not in theirs:
        logger.info("optimizer: LOMO, as the DeepSpeed config names none and --optim is lomo")
        config["optimizer"]["type"] = "LOMO"


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
    if theirs not in (None, "auto", size):
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


def _default_clip(config: dict[str, Any], theirs: Any) -> Any:
    """``theirs``, for the default of --max_grad_norm; or 0, where that would contradict what LOMO was asked for."""
    lomo = section_of(config, "optimizer.params")
    asked = [name for name in ("clip_grad_value", "clip_group_norm") if lomo.get(name) is not None]
    asked += ["update_schedule immediate"] if lomo.get("update_schedule") == "immediate" else []
    if not asked:
        return theirs
    logger.info("gradient_clipping: none, as the default of --max_grad_norm gives way to %s", asked[0])
    return 0.0


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        config[key] = config.get(key) or {}
        config = config[key]
    config[last] = value
