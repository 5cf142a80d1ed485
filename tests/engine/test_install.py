"""``lomo_ds.install``: which engine ``deepspeed.initialize`` builds, and that all is as before in the end."""

import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.engine import DeepSpeedEngine

import lomo_ds
from lomo_ds.errors import ConfigError
from tests.engines import identical, weights_of
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
LOMO = {"type": "LOMO", "params": {"lr": 0.1}}


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that reach DeepSpeed's own function, which is not run."""
    calls: list[dict[str, Any]] = []

    def initialize(
        args: Any = None, model: Any = None, optimizer: Any = None, config: Any = None, config_params: Any = None
    ) -> tuple[Any, ...]:
        calls.append({"config": config, "config_params": config_params})
        return "engine", "optimizer", "dataloader", "scheduler"

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    return calls


@pytest.mark.parametrize("optimizer", [LOMO, {"type": "adalomo"}])
@pytest.mark.parametrize("way", ["config", "config_params", "file", "args"])
def test_our_optimizers_go_to_our_engine(
    original: list[dict[str, Any]], tmp_path: Path, way: str, optimizer: dict[str, Any]
) -> None:
    config = {"optimizer": optimizer}
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    path = str(tmp_path / "ds_config.json")
    arguments: dict[str, dict[str, Any]] = {
        "config": {"config": config},
        "config_params": {"config_params": config},
        "file": {"config": path},
        "args": {"args": Namespace(deepspeed_config=path)},
    }
    with lomo_ds.install(), pytest.raises(ConfigError, match=r"lomo_ds.initialize needs a model"):
        deepspeed.initialize(**arguments[way])
    assert original == []


@pytest.mark.parametrize(
    "config", [{"optimizer": {"type": "AdamW"}}, {"optimizer": "LOMO"}, {"optimizer": None}, {}, None, "missing.json"]
)
def test_everything_else_goes_to_deepspeed_unchanged(original: list[dict[str, Any]], config: Any) -> None:
    with lomo_ds.install():
        assert deepspeed.initialize(config=config) == ("engine", "optimizer", "dataloader", "scheduler")
        deepspeed.initialize(None, "model", None, config)
    assert original == [{"config": config, "config_params": None}] * 2


def test_the_end_of_the_block_restores_deepspeed_and_an_inner_block_does_not() -> None:
    before = deepspeed.initialize
    with lomo_ds.install():
        installed = deepspeed.initialize
        assert installed is not before
        with lomo_ds.install():
            assert deepspeed.initialize is installed
        assert deepspeed.initialize is installed
    assert deepspeed.initialize is before


def test_an_error_in_the_block_restores_deepspeed() -> None:
    before = deepspeed.initialize
    with pytest.raises(RuntimeError), lomo_ds.install():
        raise RuntimeError
    assert deepspeed.initialize is before


def test_a_replacement_by_someone_else_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "initialize", deepspeed.initialize)  # restores it after this test
    with lomo_ds.install():
        deepspeed.initialize = other = lambda: None
    assert deepspeed.initialize is other


def test_what_was_done_is_logged_once_and_on_rank_0(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with lomo_ds.install(), lomo_ds.install():
        pass
    expected = "deepspeed.initialize trains with lomo_ds if the optimizer of the DeepSpeed config is LOMO or AdaLomo"
    assert caplog.messages == [expected]
    monkeypatch.setenv("RANK", "1")
    with lomo_ds.install():
        pass
    assert len(caplog.messages) == 1


def test_an_optimizer_that_no_config_names_is_logged_as_a_warning(
    original: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer creates its AdamW where a config has no optimizer: whoever installs lomo_ds hardly means that."""
    with lomo_ds.install():
        deepspeed.initialize(config={}, optimizer=Namespace())
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith("DeepSpeed's own engine trains with Namespace, because the DeepSpeed config has no opti")


def train_and_save(folder: str) -> dict[str, Any]:
    """Build engines of both kinds in one process, and train the one with LOMO."""
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    with lomo_ds.install():
        others = deepspeed.initialize(model=tiny_model(), config=config)[0]
        engine, optimizer, _, _ = deepspeed.initialize(model=tiny_model(), config={**config, "optimizer": LOMO})
    expected = lomo_ds.initialize(model=tiny_model(), config={**config, "optimizer": LOMO})[0]
    for each in (engine, expected):
        each.backward(each(**whole_batch(0, rows=4)).loss)
        each.step()
    engine.save_checkpoint(folder)
    expected.save_checkpoint(folder)
    return {
        "types": [type(others), type(engine)],
        "optimizer": optimizer is engine.optimizer,
        "same": identical(weights_of(engine), weights_of(expected)),
    }


def test_both_engines_are_built_and_ours_trains_and_names_checkpoints_as_deepspeed_does(
    ranks: GroupOf, tmp_path: Path
) -> None:
    (result,) = ranks(1).run(train_and_save, str(tmp_path))
    assert result == {"types": [DeepSpeedEngine, lomo_ds.LomoEngine], "optimizer": True, "same": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "global_step1", "latest"]
