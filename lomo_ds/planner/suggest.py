"""Settings of a plan to and from a DeepSpeed config, and the command line of ``launch/train.py`` that runs it."""

import shlex
from typing import Any, TypeVar

from lomo_ds.config.ds_fields import complete_ds_config
from lomo_ds.config.lomo_config import OPTIMIZERS, lomo_parameters
from lomo_ds.config.sections import section_of
from lomo_ds.errors import ConfigError
from lomo_ds.planner.plan import Plan
from lomo_ds.planner.settings import Settings

PlanSettings = TypeVar("PlanSettings", bound=Settings)

# Fields of Settings, and their names in a DeepSpeed config's zero_optimization
ZERO_FIELDS = {
    "persistence_threshold": "stage3_param_persistence_threshold",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "reduce_bucket_size": "reduce_bucket_size",
    "zero_quantized_weights": "zero_quantized_weights",
}


def suggested_ds_config(plan: Plan, nvme_path: str | None = None) -> dict[str, Any]:
    """Return the DeepSpeed config that ``--suggest`` writes: ``auto`` wherever a default or an argument decides.

    Args:
        nvme_path: the folder of parameters that are offloaded to NVMe.

    Raises:
        ConfigError: the plan offloads to NVMe, and ``nvme_path`` is missing.
    """
    settings = plan.settings
    if settings.offload_param == "nvme" and nvme_path is None:
        raise ConfigError("parameters on NVMe need a folder there; give --nvme_path with --suggest")
    defaults = {name: entry.default for name, entry in type(settings).__dataclass_fields__.items()}
    zero: dict[str, Any] = {"stage": 3}
    for name, field in ZERO_FIELDS.items():
        if getattr(settings, name) != defaults[name]:
            zero[field] = getattr(settings, name)
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
    if settings.communication_data_type is not None:
        config["communication_data_type"] = settings.communication_data_type
    # a baseline takes the place of LOMO, because of --optim
    type_name = "LOMO" if settings.is_baseline else OPTIMIZERS[settings.optimizer].type_name
    config["optimizer"] = {"type": type_name, "params": {"lr": "auto"} | _lomo_params(settings)}
    return config


def _lomo_params(settings: Settings) -> dict[str, Any]:
    values = {name: (getattr(settings, name), default) for name, default in lomo_parameters(type(settings)).items()}
    return {
        name: "auto" if value == default else value for name, (value, default) in values.items() if value is not None
    }


def settings_of(ds_config: dict[str, Any], **others: Any) -> Settings:
    """Return the settings that a DeepSpeed config without ``auto`` asks for; see ``settings_as``."""
    return settings_as(Settings, ds_config, **others)


def settings_as(kind: type[PlanSettings], ds_config: dict[str, Any], **others: Any) -> PlanSettings:
    """Return the settings that a DeepSpeed config without ``auto`` asks for, as an instance of ``kind``.

    Args:
        others: settings that are not part of a DeepSpeed config, such as ``sequence``.

    Raises:
        ConfigError: see ``complete_ds_config``.
    """
    ds_config = complete_ds_config(ds_config, others.get("gpus", 1))
    zero, optimizer = ds_config["zero_optimization"], ds_config["optimizer"]
    params = optimizer["params"]
    values = {name: zero[field] for name, field in ZERO_FIELDS.items() if zero.get(field) is not None}
    values |= {name: params[name] for name in lomo_parameters(kind) if params.get(name) is not None}
    precision = next((name for name in ("bf16", "fp16") if section_of(ds_config, name).get("enabled")), "fp32")
    communication = ds_config.get("communication_data_type")
    return kind(
        batch=ds_config["train_micro_batch_size_per_gpu"],
        accumulation_steps=ds_config["gradient_accumulation_steps"],
        gradient_clipping=ds_config["gradient_clipping"],
        precision=precision,  # type: ignore[arg-type]
        optimizer=str(optimizer["type"]).lower(),  # type: ignore[arg-type]
        offload_param=section_of(ds_config, "zero_optimization.offload_param").get("device", "none"),
        communication_data_type=communication if communication is None else communication.lower(),
        **values,
        **others,
    )


def command_line(plan: Plan) -> str:
    """Return the command that starts ``launch/train.py`` for a plan; texts and folders are left to the user."""
    settings = plan.settings
    words = ["deepspeed", "--num_gpus", str(settings.gpus_per_host)]
    if settings.hosts > 1:
        words += ["--num_nodes", str(settings.hosts), "--hostfile", "HOSTS"]
    words += ["launch/train.py", "--model_name_or_path", plan.model, "--max_seq_length", str(settings.sequence)]
    words += ["--per_device_train_batch_size", str(settings.batch)]
    if settings.accumulation_steps > 1:
        words += ["--gradient_accumulation_steps", str(settings.accumulation_steps)]
    if settings.clip_group_norm is None and settings.clip_grad_value is None:
        words += ["--max_grad_norm", f"{settings.gradient_clipping:g}"]
    if settings.is_baseline:  # otherwise the DeepSpeed config names it
        words += ["--optim", settings.optimizer]
    if settings.gradient_checkpointing:
        words.append("--gradient_checkpointing")
    if settings.activation_offload:
        words.append("--activation_offload")
    if settings.attention is not None:
        words += ["--attn_implementation", settings.attention]
    if settings.tiled_logits is not None:
        words += ["--tiled_logits", str(settings.tiled_logits).lower()]
    return shlex.join([*words, "--deepspeed", "FILE", "..."])
