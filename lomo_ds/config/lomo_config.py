"""The optimizers that update during backward, and their parameters: defined once for arguments, configs and plans."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lomo_ds.config.parameter import lomo_parameter, parameter, validate_fields
from lomo_ds.config.sections import require_sections
from lomo_ds.errors import ConfigError, did_you_mean

UpdateSchedule = Literal["auto", "immediate", "two_pass", "stash"]
StashDevice = Literal["auto", "cpu", "gpu"]
Rounding = Literal["auto", "nearest", "stochastic"]
GatherGranularity = Literal["auto", "module", "layer"]
Weights = Literal["auto", "int8"]
Accumulation = Literal["auto", "layered", "stash"]
# names of --optim: those of ``OPTIMIZERS``, and the baselines to compare them with
OptimizerName = Literal["lomo", "adalomo", "adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class LomoParameters:
    """Parameters that have one name as an argument, in a DeepSpeed config and in a plan."""

    weight_decay: float = lomo_parameter(
        0.0,
        "Decoupled weight decay: each step multiplies p by 1 - a * decay. The step length a is lr for lomo, and lr "
        "times the root mean square of p for adalomo.",
        at_least=0,
    )
    clip_grad_value: float | None = lomo_parameter(None, "Clamp every gradient element to [-value, value].", above=0)
    clip_group_norm: float | None = lomo_parameter(
        None, "Scale the gradients of each decoder layer down to this norm.", above=0
    )
    update_schedule: UpdateSchedule = lomo_parameter(
        "auto",
        "When a gradient is used: immediate as it arrives, two_pass in a second backward once the global norm is "
        "known, stash after backward from stored shards; auto chooses.",
    )
    stash_device: StashDevice = lomo_parameter("auto", "Where the stash keeps gradient shards; auto chooses.")
    rounding: Rounding = lomo_parameter(
        "auto", "How fp32 results become half-precision weights: nearest or stochastic; auto is stochastic."
    )
    seed: int = lomo_parameter(42, "Seed of data order, dropout and stochastic rounding.")
    gather_granularity: GatherGranularity = lomo_parameter(
        "auto",
        "What parameters are gathered for at once: each module, or a whole decoder layer; auto is layer wherever two "
        "layers fit. On one rank without offload nothing is gathered.",
    )
    accumulation: Accumulation = lomo_parameter(
        "auto",
        "How gradients of several micro-batches are added up: layered runs all of them through one layer before the "
        "next, and recomputes its activations in backward; stash adds up gradient shards; auto is layered wherever the "
        "model allows it.",
    )
    weights: Weights = lomo_parameter(
        "auto",
        "int8 keeps matrices in eight bits with a scale for each block of 64, half of bf16's memory; auto keeps them "
        "in the precision that modules compute in.",
    )


@dataclass(frozen=True, kw_only=True)
class LomoConfig(LomoParameters):
    """``"optimizer": {"type": ..., "params": {...}}`` of a DeepSpeed config, with a type of ``OPTIMIZERS``."""

    lr: float = parameter(help="Learning rate; a scheduler may change it every step.", at_least=0)


def lomo_parameters(kind: type[LomoParameters]) -> dict[str, Any]:
    """Return the names and defaults of the optimizers' parameters among the fields of ``kind``."""
    return {entry.name: entry.default for entry in dataclasses.fields(kind) if entry.metadata.get("lomo")}


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that updates during backward, as ``--optim`` and a DeepSpeed config name it.

    Attributes:
        type_name: its name in a DeepSpeed config.
        learning_rate, max_grad_norm: defaults of these arguments.
        config: class of its parameters.
    """

    type_name: str
    learning_rate: float
    max_grad_norm: float = 1.0
    config: type[LomoConfig] = LomoConfig


# by the name that ``--optim`` has for it: "type" in lower case; ``update.rules.RULES`` has the rule of each
OPTIMIZERS: dict[str, OptimizerKind] = {
    "lomo": OptimizerKind("LOMO", learning_rate=0.03),
    "adalomo": OptimizerKind("AdaLomo", learning_rate=5e-4, max_grad_norm=0.0),  # normalizes each update itself
}


def optimizer_name(ds_config: dict[str, Any]) -> str:
    """Return the name of a DeepSpeed config's optimizer in lower case; empty if it names none."""
    return str((ds_config.get("optimizer") or {}).get("type") or "").lower()


def read_lomo_config(ds_config: dict[str, Any]) -> LomoConfig:
    """Read the optimizer section of ``ds_config``, as an instance of the class that ``OPTIMIZERS`` has for its type.

    Raises:
        ConfigError: the section is missing, names another optimizer, or holds an unknown or invalid value.
    """
    require_sections(ds_config)
    section = ds_config.get("optimizer") or {}
    kind = OPTIMIZERS.get(optimizer_name(ds_config))
    if kind is None:
        types = " or ".join(kind.type_name for kind in OPTIMIZERS.values())
        raise ConfigError(
            f'lomo_ds needs "optimizer": {{"type": "LOMO", "params": {{"lr": ...}}}} in the DeepSpeed config, with the '
            f"type {types}, got {section.get('type')!r}; use deepspeed.initialize for other optimizers, or --optim of "
            "launch/train.py"
        )
    params = section.get("params") or {}
    known = [entry.name for entry in dataclasses.fields(kind.config)]
    for name in params:
        if name not in known:
            raise ConfigError(
                f"{kind.type_name} has no parameter {name!r}{did_you_mean(name, known)}; it knows {', '.join(known)}"
            )
    if "lr" not in params:
        raise ConfigError(f"{kind.type_name} needs a learning rate; set optimizer.params.lr in the DeepSpeed config")
    config = kind.config(**params)
    validate_fields(config, f"{kind.type_name}'s ")
    return config
