"""Error messages for settings that cannot be carried out: they state the rule, the value and the way out."""

from typing import Any, get_args

import pytest

from lomo_ds.config.ds_config import BASELINES
from lomo_ds.config.lomo_config import OPTIMIZERS, LomoConfig, OptimizerName, optimizer_name, read_lomo_config
from lomo_ds.config.validation import validate_ds_config
from lomo_ds.errors import ConfigError
from lomo_ds.update.rules import RULES


def ds_config(params: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "LOMO", "params": {"lr": 0.1, **(params or {})}},
        **sections,
    }


def check(config: dict[str, Any]) -> None:
    validate_ds_config(config)


def test_reads_the_optimizer_section() -> None:
    config = ds_config({"clip_group_norm": 1, "update_schedule": "stash", "seed": 7})
    assert read_lomo_config(config) == LomoConfig(lr=0.1, clip_group_norm=1, update_schedule="stash", seed=7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ds_config({"weight_decey": 0.1}), "no parameter 'weight_decey'; did you mean 'weight_decay'"),
        (ds_config({"betas": [0.9, 0.99]}), "no parameter 'betas'; it knows weight_decay, clip_grad_value"),
        (ds_config({"lr": "fast"}), "lr must be a number of at least 0, got 'fast'"),
        (ds_config({"lr": -1}), "lr must be a number of at least 0, got -1"),
        (ds_config({"lr": float("inf")}), "lr must be a number of at least 0, got inf"),
        (ds_config(gradient_clipping=-1.0), "gradient_clipping must be a number of at least 0, got -1"),
        (ds_config(gradient_clipping="auto"), "gradient_clipping must be a number of at least 0, got 'auto'"),
        (ds_config(gradient_accumulation_steps="auto"), "must be an integer of at least 1, got 'auto'"),
        (ds_config(bf16=True), '"bf16" of the DeepSpeed config must be an object in braces, got True'),
        (ds_config(zero_optimization=3), '"zero_optimization" .* must be an object in braces, got 3'),
        (ds_config(zero_optimization={"stage": "3"}), "got zero_optimization.stage '3'; set it to 3"),
        (ds_config({"lr": float("nan")}), "lr must be a number of at least 0, got nan"),
        (ds_config({"clip_grad_value": 0}), "clip_grad_value must be a number above 0, got 0"),
        (ds_config({"update_schedule": "later"}), "update_schedule must be one of auto, immediate, two_pass, stash"),
        (ds_config({"rounding": "up"}), "rounding must be one of auto, nearest, stochastic, got 'up'"),
        (ds_config({"seed": 1.5}), "seed must be an integer, got 1.5"),
        ({"zero_optimization": {"stage": 3}}, "needs \"optimizer\": .* got None"),
        (ds_config(optimizer={"type": "AdamW", "params": {"lr": 1}}), "got 'AdamW'; use deepspeed.initialize"),
        (ds_config(optimizer={"type": "LOMO"}), "needs a learning rate"),
        (ds_config(zero_optimization={"stage": 2}), "got zero_optimization.stage 2; set it to 3"),
        (ds_config(zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu"}}), "no optimizer state"),
        (ds_config(zero_optimization={"stage": 3, "zero_hpz_partition_size": 2}), "hpz_partition_size.*set it to 1"),
        (ds_config(torch_autocast={"enabled": True}), "torch_autocast is not supported.*bf16 or fp16"),
        (ds_config(managed_gradient_accumulation=False), "managed_gradient_accumulation false is not supported"),
        (
            ds_config({"update_schedule": "immediate"}, gradient_clipping=1.0),
            "immediate cannot honour gradient_clipping 1.0, because .* norm is known; use update_schedule stash",
        ),
        (
            ds_config({"update_schedule": "immediate", "accumulation": "stash"}, gradient_accumulation_steps=4),
            "immediate keeps no gradients, which accumulation stash needs for .*4; use accumulation layered, or",
        ),
        (
            ds_config({"update_schedule": "two_pass", "accumulation": "stash"}, gradient_accumulation_steps=2),
            "two_pass keeps no gradients",
        ),
        (
            ds_config({"gather_granularity": "module", "accumulation": "layered"}),
            "accumulation layered gathers whole layers, and gather_granularity module .* leave one of the two out",
        ),
        (ds_config({"update_schedule": "immediate"}, fp16={"enabled": True}), "cannot train in fp16.*or bf16"),
        (
            ds_config({"clip_grad_value": 1.0}, gradient_clipping=0.5),
            "only one kind of clipping .* got gradient_clipping 0.5 and optimizer.params.clip_grad_value 1.0",
        ),
    ],
)  # fmt: skip
def test_invalid_settings_are_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        check(config)
    assert "\n" not in str(refusal.value)


def test_every_optimizer_has_one_name_in_arguments_configs_and_rules() -> None:
    assert get_args(OptimizerName) == (*OPTIMIZERS, *BASELINES)
    assert RULES.keys() == OPTIMIZERS.keys()
    for name, kind in OPTIMIZERS.items():
        config = {"optimizer": {"type": kind.type_name, "params": {"lr": 0.1}}}
        assert optimizer_name(config) == name
        assert read_lomo_config(config) == kind.config(lr=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": -1}, "'s lr must be a number of at least 0, got -1"),
        ({"lr": 1, "rounding": "up"}, "'s rounding must be one of auto, nearest, stochastic, got 'up'"),
        ({"lr": 1, "momentum": 0.9}, " has no parameter 'momentum'; it knows weight_decay"),
        ({}, " needs a learning rate; set optimizer.params.lr"),
    ],
)
def test_errors_name_the_optimizer(name: str, params: dict[str, Any], message: str) -> None:
    kind = OPTIMIZERS[name]
    with pytest.raises(ConfigError) as refusal:
        check(ds_config(optimizer={"type": kind.type_name, "params": params}))
    assert str(refusal.value).startswith(kind.type_name + message)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_cannot_be_offloaded(name: str) -> None:
    kind = OPTIMIZERS[name]
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ConfigError, match=f"but {kind.type_name} has no optimizer state that can be offloaded; remove"):
        check(ds_config(optimizer={"type": kind.type_name, "params": {"lr": 1}}, zero_optimization=zero))


@pytest.mark.parametrize("schedule", ["auto", "stash"])
def test_accepts_everything_at_once_where_gradients_are_kept(schedule: str) -> None:
    check(
        ds_config(
            {"update_schedule": schedule, "weight_decay": 0.1},
            gradient_clipping=1.0,
            gradient_accumulation_steps=8,
            fp16={"enabled": True},
        )
    )
