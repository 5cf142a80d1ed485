"""Where a run and an export may write."""

import subprocess
import sys
from pathlib import Path

import pytest

from lomo_ds.checkpoint import list_checkpoints, remove_unfinished, rotate
from lomo_ds.checkpoint.manifest import MANIFEST
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.errors import ConfigError, LomoError
from lomo_ds.train.output_folder import (
    alone_in,
    checkpoints_of_another_run,
    refuse_another_run,
    refuse_full_folder,
    refuse_input_files,
    refuse_what_is_read,
    refuse_what_others_wrote,
)
from lomo_ds.train.progress import FINISHED


def arguments(output_dir: Path, **more: str | bool) -> TrainArguments:
    return TrainArguments(**{"model_name_or_path": "m", "train_file": "t.txt", "output_dir": str(output_dir), **more})  # type: ignore[arg-type]


def checkpoint(folder: Path) -> Path:
    """What looks like a checkpoint of lomo_ds."""
    (folder / "weights").mkdir(parents=True)
    (folder / "state.json").touch()
    return folder


def file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def of_a_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arguments(folder).dump(folder / "config.yaml")
    return folder


# a place that is read


@pytest.mark.parametrize(
    ("output_dir", "relation"),
    [
        ("models/llama", "is"),
        ("models/llama/out", "lies in"),
        ("models", "holds"),
        ("link", "is"),
        ("link/a/b", "lies in"),
    ],
)
def test_nothing_is_written_where_a_model_is_read(tmp_path: Path, output_dir: str, relation: str) -> None:
    model = file(tmp_path / "models/llama/config.json").parent
    (tmp_path / "link").symlink_to(model)
    for read in (model, tmp_path / "link"):
        with pytest.raises(ConfigError, match=rf" {relation} .*, which is read.*give .*models/llama-2 say"):
            refuse_what_is_read(tmp_path / output_dir, [read])


def test_nothing_is_written_into_the_hub_s_cache(tmp_path: Path) -> None:
    snapshot = file(tmp_path / "hub/models--a--b/snapshots/0123/config.json").parent
    for inside in ("hub/models--a--b/out", "hub", "hub/models--a--b/snapshots/0123"):
        with pytest.raises(ConfigError, match="which is read"):
            refuse_what_is_read(tmp_path / inside, [snapshot])


def test_what_lies_beside_what_is_read_is_written(tmp_path: Path) -> None:
    model = file(tmp_path / "models/llama/config.json").parent
    for output_dir in ("models/llama-2", "models/out", "out"):
        refuse_what_is_read(tmp_path / output_dir, [model, "7b"])


# what others wrote


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "config.yaml",
     "ds_config.json", "metrics.jsonl", "checkpoint-500/trainer_state.json"],
)  # fmt: skip
def test_what_lomo_ds_has_not_written_is_not_overwritten(tmp_path: Path, name: str) -> None:
    file(tmp_path / "out" / name)
    with pytest.raises(ConfigError, match=f"holds {name.split('/')[0]}, which lomo_ds has not written.*out-2 say"):
        refuse_what_others_wrote(tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.txt", "train.txt", "checkpoint-best/model.safetensors", "checkpoint-7.txt"])
def test_other_files_are_no_obstacle(tmp_path: Path, name: str) -> None:
    file(tmp_path / name)
    refuse_what_others_wrote(tmp_path)


def test_a_run_overwrites_its_own_records(tmp_path: Path) -> None:
    refuse_what_others_wrote(tmp_path / "nowhere")
    out = of_a_run(tmp_path / "out")
    file(out / "metrics.jsonl")
    file(out / "ds_config.json")
    refuse_what_others_wrote(out)


@pytest.mark.parametrize("name", ["train_file", "validation_file"])
def test_a_text_is_not_overwritten(tmp_path: Path, name: str) -> None:
    text = file(of_a_run(tmp_path) / "metrics.jsonl")
    with pytest.raises(ConfigError, match=f"--{name} .*metrics.jsonl would be overwritten"):
        refuse_input_files(arguments(tmp_path, **{name: str(text)}))


# another run


def test_another_run_is_given_up_only_when_asked(tmp_path: Path) -> None:
    out = of_a_run(tmp_path / "out")
    refuse_another_run(arguments(out), None, [])
    for sign in (MANIFEST, FINISHED):
        file(out / sign)
        with pytest.raises(ConfigError, match=r"holds the model of another run; give another, .*out-2 say, or let"):
            refuse_another_run(arguments(out), None, [])
        refuse_another_run(arguments(out, overwrite_output_dir=True), None, [])
        (out / sign).unlink()
    one, two = checkpoint(out / "checkpoint-10"), checkpoint(out / "checkpoint-20")
    assert checkpoints_of_another_run(out, None) == [one, two]
    assert checkpoints_of_another_run(out, one) == [two]
    assert checkpoints_of_another_run(out, tmp_path / "other/checkpoint-10") == [one, two]
    with pytest.raises(ConfigError, match="holds checkpoint-20 of another run"):
        refuse_another_run(arguments(out), one, [two])
    file(out / MANIFEST)
    refuse_another_run(arguments(out), two, [])  # it goes on in its own folder


# an export


def test_an_export_needs_an_empty_folder(tmp_path: Path) -> None:
    refuse_full_folder(tmp_path / "new")
    file(tmp_path / "cut_short/.saving/model.safetensors")
    refuse_full_folder(tmp_path / "cut_short")
    file(tmp_path / "notes/a.txt")
    with pytest.raises(
        LomoError, match=r"holds a\.txt, and an export needs a folder that is new or empty; .*notes-2 say"
    ):
        refuse_full_folder(tmp_path / "notes")
    with pytest.raises(LomoError, match="is a file"):
        refuse_full_folder(tmp_path / "notes/a.txt")


# checkpoints of others


def test_only_checkpoints_of_lomo_ds_are_deleted(tmp_path: Path) -> None:
    """Hugging Face's Trainer gives its own the same names."""
    for step in (1, 2, 3):
        checkpoint(tmp_path / f"checkpoint-{step}")
    theirs = file(tmp_path / "checkpoint-0/trainer_state.json")
    unfinished = [file(tmp_path / name / "a") for name in ("checkpoint-best.partial", "checkpoint-.deleting")]
    file(tmp_path / "checkpoint-4.partial/weights/shard")
    rotate(tmp_path, 1, set())
    remove_unfinished(tmp_path)
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-3"]
    assert theirs.exists()
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
    with pytest.raises(ConfigError, match="is being written by another job"), alone_in(tmp_path):
        pass
    other.kill()
    other.wait()
    with alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        assert list(tmp_path.iterdir()) == [], "no file is left behind"
