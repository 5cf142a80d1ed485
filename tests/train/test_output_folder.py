"""Rules for the output folder of a run or an export."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lomo_ds.checkpoint import list_checkpoints, remove_unfinished, rotate
from lomo_ds.checkpoint.manifest import MANIFEST
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.errors import ConfigError, LomoError
from lomo_ds.train.output_folder import (
    check_empty_folder,
    check_foreign_files,
    check_input_files,
    check_input_overlap,
    check_other_run,
    checkpoints_of_other_run,
    lock_folder,
)
from lomo_ds.train.progress import FINISHED


def arguments(output_dir: Path, **more: Any) -> TrainArguments:
    return TrainArguments(**{"model_name_or_path": "m", "train_file": ["t.txt"], "output_dir": str(output_dir), **more})


def checkpoint(folder: Path) -> Path:
    """Create a folder that looks like a checkpoint of lomo_ds."""
    (folder / "weights").mkdir(parents=True)
    (folder / "state.json").touch()
    return folder


def file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def run_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arguments(folder).dump(folder / "config.yaml")
    return folder


# input folders


@pytest.mark.parametrize(
    ("output_dir", "relation"),
    [
        ("models/llama", "is"),
        ("models/llama/out", "is inside"),
        ("models", "contains"),
        ("link", "is"),
        ("link/a/b", "is inside"),
    ],
)
def test_an_output_folder_must_not_overlap_the_model(tmp_path: Path, output_dir: str, relation: str) -> None:
    model = file(tmp_path / "models/llama/config.json").parent
    (tmp_path / "link").symlink_to(model)
    for input_folder in (model, tmp_path / "link"):
        with pytest.raises(ConfigError, match=rf" {relation} the input folder .*give .*models/llama-2$"):
            check_input_overlap(tmp_path / output_dir, [input_folder])


def test_an_output_folder_must_not_overlap_the_hub_cache(tmp_path: Path) -> None:
    snapshot = file(tmp_path / "hub/models--a--b/snapshots/0123/config.json").parent
    for inside in ("hub/models--a--b/out", "hub", "hub/models--a--b/snapshots/0123"):
        with pytest.raises(ConfigError, match="the input folder"):
            check_input_overlap(tmp_path / inside, [snapshot])


def test_an_output_folder_beside_the_model_is_accepted(tmp_path: Path) -> None:
    model = file(tmp_path / "models/llama/config.json").parent
    for output_dir in ("models/llama-2", "models/out", "out"):
        check_input_overlap(tmp_path / output_dir, [model, "7b"])


# files of other programs


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "config.yaml",
     "ds_config.json", "metrics.jsonl", "checkpoint-500/trainer_state.json"],
)  # fmt: skip
def test_files_of_other_programs_are_not_overwritten(tmp_path: Path, name: str) -> None:
    file(tmp_path / "out" / name)
    with pytest.raises(ConfigError, match=f"contains {name.split('/')[0]}, which lomo_ds has not written.*out-2$"):
        check_foreign_files(tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.txt", "train.txt", "checkpoint-best/model.safetensors", "checkpoint-7.txt"])
def test_unrelated_files_are_accepted(tmp_path: Path, name: str) -> None:
    file(tmp_path / name)
    check_foreign_files(tmp_path)


def test_a_run_overwrites_its_own_records(tmp_path: Path) -> None:
    check_foreign_files(tmp_path / "nowhere")
    out = run_folder(tmp_path / "out")
    file(out / "metrics.jsonl")
    file(out / "ds_config.json")
    check_foreign_files(out)


@pytest.mark.parametrize("name", ["train_file", "validation_file"])
def test_an_input_text_is_not_overwritten(tmp_path: Path, name: str) -> None:
    text = file(run_folder(tmp_path) / "metrics.jsonl")
    with pytest.raises(ConfigError, match=f"--{name} .*metrics.jsonl would be overwritten"):
        check_input_files(arguments(tmp_path, **{name: ["a.txt", str(text)]}))


# another run


def test_another_run_is_replaced_only_with_overwrite_output_dir(tmp_path: Path) -> None:
    out = run_folder(tmp_path / "out")
    check_other_run(arguments(out), None, [])
    for marker in (MANIFEST, FINISHED):
        file(out / marker)
        with pytest.raises(ConfigError, match=r"contains the model of another run; give another .*out-2, or let"):
            check_other_run(arguments(out), None, [])
        check_other_run(arguments(out, overwrite_output_dir=True), None, [])
        (out / marker).unlink()
    first, second = checkpoint(out / "checkpoint-10"), checkpoint(out / "checkpoint-20")
    assert checkpoints_of_other_run(out, None) == [first, second]
    assert checkpoints_of_other_run(out, first) == [second]
    assert checkpoints_of_other_run(out, tmp_path / "other/checkpoint-10") == [first, second]
    with pytest.raises(ConfigError, match="contains checkpoint-20 of another run"):
        check_other_run(arguments(out), first, [second])
    file(out / MANIFEST)
    check_other_run(arguments(out), second, [])  # resumes in place


# an export


def test_an_export_needs_an_empty_folder(tmp_path: Path) -> None:
    check_empty_folder(tmp_path / "new")
    file(tmp_path / "cut_short/.saving/model.safetensors")
    check_empty_folder(tmp_path / "cut_short")
    file(tmp_path / "notes/a.txt")
    with pytest.raises(LomoError, match=r"contains a\.txt, but an export needs a new or empty folder; .*notes-2$"):
        check_empty_folder(tmp_path / "notes")
    with pytest.raises(LomoError, match="is a file"):
        check_empty_folder(tmp_path / "notes/a.txt")


# checkpoints of other programs


def test_only_checkpoints_of_lomo_ds_are_deleted(tmp_path: Path) -> None:
    """Hugging Face's Trainer uses the same names for its checkpoints."""
    for step in (1, 2, 3):
        checkpoint(tmp_path / f"checkpoint-{step}")
    foreign = file(tmp_path / "checkpoint-0/trainer_state.json")
    unfinished = [file(tmp_path / name / "a") for name in ("checkpoint-best.partial", "checkpoint-.deleting")]
    file(tmp_path / "checkpoint-4.partial/weights/shard")
    rotate(tmp_path, 1, set())
    remove_unfinished(tmp_path)
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-3"]
    assert foreign.exists()
    assert all(path.exists() for path in unfinished)
    assert not (tmp_path / "checkpoint-4.partial").exists()


# two jobs at once


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    lock = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)"
    hold = f"{lock}; print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConfigError, match="is in use by another job"), lock_folder(tmp_path):
        pass
    other.kill()
    other.wait()
    with lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        assert list(tmp_path.iterdir()) == [], "no file is left behind"
