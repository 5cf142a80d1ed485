"""A new parameter of LOMO is one field and its consumer: arguments, DeepSpeed config, plan and suggestion know it."""

from dataclasses import dataclass

import pytest

from lomo_ds.config.arguments import TrainArguments, help_text, parse
from lomo_ds.config.ds_config import read_ds_config, reconcile
from lomo_ds.config.lomo_config import OPTIMIZERS, LomoConfig, LomoParameters, OptimizerKind, read_lomo_config
from lomo_ds.config.parameter import lomo_parameter
from lomo_ds.errors import ConfigError
from lomo_ds.planner import Machine, PlannedModel, plan_run, suggested_ds_config
from lomo_ds.planner.command import PlanArguments, plan_settings
from lomo_ds.planner.report import plan_as_dict
from lomo_ds.planner.settings import Settings

REQUIRED = ["--model_name_or_path", "40m", "--train_file", "t.txt", "--output_dir", "o"]


@dataclass(frozen=True, kw_only=True)
class Momentum(LomoParameters):
    """Parameters of LOMO with one more, which no file outside this test names."""

    momentum: float = lomo_parameter(0.0, "Share of the last update that the next one keeps.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class MomentumArguments(Momentum, TrainArguments):
    """Arguments of training."""


@dataclass(frozen=True, kw_only=True)
class MomentumPlanArguments(Momentum, PlanArguments):
    """Arguments of a plan."""


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(Momentum, LomoConfig):
    """Section of a DeepSpeed config."""


@dataclass(frozen=True, kw_only=True)
class MomentumSettings(Momentum, Settings):
    """Settings of a plan."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "lomo", OptimizerKind("LOMO", 0.03, config=MomentumConfig))


@pytest.mark.parametrize("kind", [MomentumArguments, MomentumPlanArguments])
def test_help_shows_it(kind: type[TrainArguments]) -> None:
    assert "--momentum MOMENTUM" in help_text(kind)
    assert "Share of the last update" in help_text(kind)


def test_the_ds_config_takes_it_from_the_arguments_and_gives_it_to_them() -> None:
    arguments, given = parse(MomentumArguments, [*REQUIRED, "--momentum", "0.9"])
    ds_config, _ = reconcile(read_ds_config("zero3_fp32"), arguments, given, world_size=1)
    lomo = read_lomo_config(ds_config)
    assert isinstance(lomo, MomentumConfig)
    assert lomo.momentum == 0.9

    arguments, given = parse(MomentumArguments, REQUIRED)
    in_config = {"optimizer": {"type": "LOMO", "params": {"lr": "auto", "momentum": 0.5}}}
    _, arguments = reconcile(in_config, arguments, given, world_size=1)
    assert arguments.momentum == 0.5


def test_it_is_validated_by_its_bounds() -> None:
    with pytest.raises(ConfigError, match="--momentum must be a number of at least 0, got -1"):
        parse(MomentumArguments, [*REQUIRED, "--momentum=-1"])
    with pytest.raises(ConfigError, match="LOMO's momentum must be a number of at least 0, got 'much'"):
        read_lomo_config({"optimizer": {"type": "LOMO", "params": {"lr": 1.0, "momentum": "much"}}})


def test_a_plan_and_its_suggestion_have_it() -> None:
    model = PlannedModel.load("40m")
    arguments, given = parse(
        MomentumPlanArguments, ["--model_name_or_path=40m", "--max_seq_length=64", "--momentum=0.9"]
    )
    result = plan_run(model, plan_settings(arguments, given, model, MomentumSettings), Machine())
    assert plan_as_dict(result, None)["settings"]["momentum"] == 0.9
    assert suggested_ds_config(result)["optimizer"]["params"]["momentum"] == 0.9
