"""Tests of --report_to: TensorBoard and wandb under the names of transformers' Trainer, and refusals."""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers.integrations.integration_utils import rewrite_logs

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.errors import ConfigError
from lomo_ds.train.metrics import Monitor
from lomo_ds.train.trackers import check_trackers, trainer_names
from tests.launching import demo_arguments, run_main
from tests.ranks import Ranks
from tests.train.test_metrics import scalars

GroupOf = Callable[..., Ranks]
METRICS = {"loss": 2.5, "eval_loss": 3.5, "grad_norm": 0.5, "learning_rate": 0.1, "epoch": 0.25, "tokens": 64.0}
BLOCK = 32768  # bytes of a block in wandb's file, which is a log as LevelDB writes it


def records(folder: Path) -> list[Any]:
    """Return the records of the offline runs of wandb in a folder, in the order of their start."""
    from wandb.proto.wandb_internal_pb2 import Record

    parsed = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        parsed += [Record.FromString(payload) for payload in payloads(file.read_bytes())]
    return parsed


def payloads(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log after its 7 bytes of header; a record is cut where a block ends."""
    position, partial = 7, b""
    while position + 7 <= len(log):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
        length, kind = struct.unpack_from("<xxxxHB", log, position)
        partial += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield partial
            partial = b""


def history(folder: Path) -> list[dict[str, float]]:
    """Return what was logged, without wandb's own values."""
    logged = [record.history for record in records(folder) if record.WhichOneof("record_type") == "history"]
    entries = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.item} for entry in logged]
    return [{name: value for name, value in entry.items() if name[0] != "_"} for entry in entries]


def runs(folder: Path) -> list[Any]:
    return [record.run for record in records(folder) if record.WhichOneof("record_type") == "run"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_names_are_those_of_the_trainer() -> None:
    assert trainer_names(METRICS) == rewrite_logs(METRICS)


def test_tensorboard_has_them(tmp_path: Path) -> None:
    with Monitor(tmp_path, rank=0) as monitor:
        monitor.log(3, METRICS)
    actual = {name: value for name, (value,) in scalars(tmp_path / "runs").items()}
    assert actual == pytest.approx(rewrite_logs(METRICS))


@pytest.mark.usefixtures("offline")
def test_wandb_has_them_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "my run"
    out.mkdir()
    folders = [out, tmp_path / "resumed", tmp_path / "begun anew"]
    for folder, step in zip(folders, (0, 3, 0), strict=True):
        if folder != out:  # within a second wandb would write the same folder again
            folder.mkdir()
            monkeypatch.setenv("WANDB_DIR", str(folder))
        with Monitor(out, rank=0, step=step, report_to=("wandb",), settings={"seed": 7}) as monitor:
            monitor.log(step + 1, METRICS)
            assert "wandb sync" in monitor.trackers[0].describe()
        assert history(folder) == [rewrite_logs(METRICS) | {"train/global_step": step + 1}]
    first, resumed, other = (runs(folder)[0] for folder in folders)
    assert (first.project, first.display_name) == ("huggingface", "my run")
    assert [item.value_json for item in first.config.update if item.key == "seed"] == ["7"]
    assert first.run_id == resumed.run_id != other.run_id
    assert not (out / "runs").exists()


@pytest.mark.usefixtures("offline")
def test_variables_of_wandb_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, name.lower())
    with Monitor(tmp_path, rank=0, report_to=("wandb",)):
        pass
    (run,) = runs(tmp_path)
    assert (run.project, run.display_name, run.run_id) == ("wandb_project", "wandb_name", "wandb_run_id")


@pytest.mark.usefixtures("offline")
def test_other_ranks_start_no_wandb(tmp_path: Path) -> None:
    with Monitor(tmp_path, rank=1, report_to=("tensorboard", "wandb")) as monitor:
        monitor.log(1, METRICS)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("offline")
def test_training_goes_on_if_wandb_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Monitor(tmp_path, rank=0, report_to=("wandb",)) as monitor:
        tracker: Any = monitor.trackers[0]
        with mock.patch.object(tracker.run, "log", side_effect=RuntimeError("no process")):
            for step in (1, 2):
                monitor.log(step, METRICS)
    said = [record.message for record in caplog.records if record.name == "lomo_ds.train.trackers"]
    assert said == ["wandb records nothing from step 1 on: no process"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("offline")
def test_a_run_that_wandb_cannot_start_is_refused(tmp_path: Path) -> None:
    import wandb

    with (
        mock.patch.object(wandb, "init", side_effect=wandb.errors.UsageError("api_key not configured")),
        pytest.raises(ConfigError, match=r"api_key not configured; run `wandb login`, set WANDB_MODE=offline"),
    ):
        Monitor(tmp_path, rank=0, report_to=("wandb",))


def arguments_with(report_to: str) -> TrainArguments:
    return TrainArguments(model_name_or_path="m", train_file=["t"], output_dir="o", report_to=report_to)


@pytest.mark.parametrize(
    ("report_to", "trackers"),
    [
        ("tensorboard", ("tensorboard",)),
        ("wandb, tensorboard", ("wandb", "tensorboard")),
        ("none", ()),
    ],
)
def test_one_or_several_names(report_to: str, trackers: tuple[str, ...]) -> None:
    assert arguments_with(report_to).trackers == trackers


@pytest.mark.parametrize("report_to", ["", "wandb,none", "mlflow", "tensorboard wandb"])
def test_other_names_are_refused(report_to: str) -> None:
    with pytest.raises(ConfigError, match=r"--report_to must be none, or one or several of tensorboard, wandb"):
        arguments_with(report_to)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(("tensorboard",))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(("tensorboard", "wandb"))


def train_without_wandb(arguments: list[str]) -> tuple[int, str, str]:
    with mock.patch.dict(sys.modules, {"wandb": None}):
        return run_main(arguments)


def test_a_job_reports_nowhere_or_says_what_is_missing(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    arguments = demo_arguments(demo, tmp_path / "none", report_to="none", max_steps=1, logging_steps=1)
    assert [status for status, _, _ in ranks(2).run(run_main, arguments)] == [0, 0]
    assert (tmp_path / "none/metrics.jsonl").read_text().count('"loss"') == 1
    assert not (tmp_path / "none/runs").exists()
    results = ranks(2).run(train_without_wandb, demo_arguments(demo, tmp_path / "wandb", report_to="wandb"))
    assert [status for status, _, _ in results] == [2, 2]
    assert "pip install wandb" in results[0][2]
    assert not (tmp_path / "wandb").exists()
