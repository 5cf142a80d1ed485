"""From a plan to the DeepSpeed config and the arguments of ``launch/train.py`` that run it, and back."""

import shlex
from typing import Any

from lomo_ds.config.ds_fields import settle
from lomo_ds.errors import ConfigError
from lomo_ds.planner.plan import Plan
from lomo_ds.planner.settings import Settings

# of Settings, what DeepSpeed's zero_optimization calls otherwise
ZERO = {
    "persistence_threshold": "stage3_param_persistence_threshold",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "reduce_bucket_size": "reduce_bucket_size",
}

LOMO = (
    "update_schedule",
    "stash_device",
    "gather_granularity",
    "clip_group_norm",
    "weights",
)  # named alike in its parameters


def suggested_ds_config(found: Plan, nvme_path: str | None = None) -> dict[str, Any]:
    """What ``--suggest`` writes: ``auto`` wherever an argument of ``launch/train.py`` decides.

    Args:
        nvme_path: the folder of offloaded parameters, if they go to a disk.

    Raises:
        ConfigError: the plan needs it, and it was not given.
    """
    settings = found.settings
    if settings.offload_param == "nvme" and nvme_path is None:
        raise ConfigError("parameters on NVMe need a folder there; give --nvme_path with --suggest")
    zero: dict[str, Any] = {"stage": 3}
    zero |= {name: getattr(settings, ours) for ours, name in ZERO.items() if getattr(settings, ours) != _default(ours)}
    if settings.offload_param != "none":
        zero["offload_param"] = {"device": settings.offload_param, "pin_memory": True}
    if settings.offload_param == "nvme":
        zero["offload_param"]["nvme_path"] = nvme_path
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
    }
    if settings.precision != "fp32":
        config[settings.precision] = {"enabled": True}
    config["optimizer"] = {"type": "LOMO", "params": _params(found)}
    return config


def settings_of(ds_config: dict[str, Any], **others: Any) -> Settings:
    """The settings that a DeepSpeed config without ``auto`` asks for.

    Args:
        others: the settings that are no part of it, ``sequence`` for one.

    Raises:
        ConfigError: see ``settle``.
    """
    ds_config = settle(ds_config, others.get("gpus", 1))
    zero, optimizer = ds_config["zero_optimization"], ds_config["optimizer"]
    kind = str(optimizer["type"]).lower()
    lomo = optimizer["params"] if kind == "lomo" else {}
    found: dict[str, Any] = {name: zero[theirs] for name, theirs in ZERO.items() if theirs in zero}
    found |= {name: lomo[name] for name in LOMO if lomo.get(name) is not None}
    precision = next((name for name in ("bf16", "fp16") if (ds_config.get(name) or {}).get("enabled")), "fp32")
    return Settings(
        batch=ds_config["train_micro_batch_size_per_gpu"],
        accumulation=ds_config["gradient_accumulation_steps"],
        gradient_clipping=ds_config["gradient_clipping"],
        precision=precision,  # type: ignore[arg-type]
        optimizer=kind,  # type: ignore[arg-type]
        offload_param=(zero.get("offload_param") or {}).get("device", "none"),
        **found,
        **others,
    )


def command_line(found: Plan) -> str:
    """How ``launch/train.py`` is to be started for it, the text and folders left to the user."""
    settings = found.settings
    words = ["deepspeed", "--num_gpus", str(settings.gpus_of_a_host)]
    if settings.hosts > 1:
        words += ["--num_nodes", str(settings.hosts), "--hostfile", "HOSTS"]
    words += ["launch/train.py", "--model_name_or_path", found.model, "--max_seq_length", str(settings.sequence)]
    words += ["--per_device_train_batch_size", str(settings.batch)]
    if settings.accumulation > 1:
        words += ["--gradient_accumulation_steps", str(settings.accumulation)]
    if settings.clip_group_norm is None:
        words += ["--max_grad_norm", f"{settings.gradient_clipping:g}"]
    if settings.optimizer != "lomo":
        words += ["--optim", settings.optimizer]
    if settings.gradient_checkpointing:
        words.append("--gradient_checkpointing")
    if settings.int8_weights:
        words += ["--weights", "int8"]
    if settings.activation_offload:
        words.append("--activation_offload")
    if settings.tiled_logits is not None:
        words += ["--tiled_logits", str(settings.tiled_logits).lower()]
    return shlex.join([*words, "--deepspeed", "FILE", "..."])


def _params(found: Plan) -> dict[str, Any]:
    settings = found.settings
    params: dict[str, Any] = {"lr": "auto", "weight_decay": "auto", "seed": "auto", "rounding": "auto"}
    return params | {name: getattr(settings, name) for name in LOMO if getattr(settings, name) is not None}


def _default(name: str) -> Any:
    return Settings.__dataclass_fields__[name].default
