"""Where a run and an export may write: nothing that is read is written into, and nothing of worth is overwritten.

| the output folder | ``launch/train.py`` | ``launch/export.py`` |
|---|---|---|
| is, lies in, or holds a folder that is read | refused | refused |
| is not there, or is empty | written | written |
| holds a model, checkpoint or record that lomo_ds has not written | refused | refused |
| holds the model of another run | needs ``--overwrite_output_dir`` | refused |
| holds checkpoints of another run | needs ``--overwrite_output_dir``, and deletes them when training begins | refused |
| is being written by another job | refused | refused |
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lomo_ds.checkpoint import is_checkpoint, list_checkpoints, step_of
from lomo_ds.checkpoint.manifest import MANIFEST
from lomo_ds.config.arguments import HEADER, TrainArguments
from lomo_ds.errors import CheckpointError, ConfigError
from lomo_ds.models import SAVING
from lomo_ds.train.progress import FINISHED

RECORDS = ("config.yaml", "ds_config.json", "metrics.jsonl")  # what every run writes, by names that others use too
MODEL_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin")


def refuse_what_is_read(output_dir: Path, read: Iterable[str | Path]) -> None:
    """Check that ``output_dir`` neither is, nor lies in, nor holds any folder of ``read``; symbolic links are followed.

    Raises:
        ConfigError: it does; both are named, and a folder that can be written.
    """
    for folder in map(Path, read):
        relation = _relation(output_dir.resolve(), _whole(folder.resolve()))
        if folder.is_dir() and relation is not None:
            raise ConfigError(
                f"--output_dir {output_dir} {relation} {folder}, which is read, and nothing may be written there; "
                f"give a folder apart from it, {_beside(folder)} say"
            )


def refuse_what_others_wrote(output_dir: Path) -> None:
    """Check that a run in ``output_dir`` overwrites nothing that lomo_ds has not written.

    Raises:
        ConfigError: it would; the file or folder is named.
    """
    ours = _is_of_a_run(output_dir)
    strange = [] if (output_dir / MANIFEST).exists() else [f for name in MODEL_FILES for f in output_dir.glob(name)]
    strange += [output_dir / name for name in RECORDS if not ours and (output_dir / name).exists()]
    strange += [
        folder for folder in output_dir.glob("checkpoint-*")
        if step_of(folder) >= 0 and not is_checkpoint(folder) and any(folder.iterdir())
    ]  # fmt: skip
    if strange:
        raise ConfigError(
            f"--output_dir {output_dir} holds {strange[0].name}, which lomo_ds has not written and a run would "
            f"overwrite; give another, {_beside(output_dir)} say"
        )


def refuse_input_files(arguments: TrainArguments) -> None:
    """Check that no text to train on is one of the files that a run writes.

    Raises:
        ConfigError: one is.
    """
    written = {(Path(arguments.output_dir) / name).resolve() for name in (*RECORDS, FINISHED)}
    for name in ("train_file", "validation_file"):
        file = getattr(arguments, name)
        if file is not None and Path(file).resolve() in written:
            raise ConfigError(
                f"--{name} {file} would be overwritten by this run, as --output_dir is its folder; give another "
                "--output_dir"
            )


def refuse_another_run(arguments: TrainArguments, resumed: Path | None, others: list[Path]) -> None:
    """Check that ``output_dir`` holds nothing of another run, unless --overwrite_output_dir gives it up.

    Args:
        resumed: the checkpoint that the run goes on from.
        others: see ``checkpoints_of_another_run``.

    Raises:
        ConfigError: it does.
    """
    output_dir = Path(arguments.output_dir)
    if arguments.overwrite_output_dir:
        return
    if others:
        raise ConfigError(
            f"--output_dir {output_dir} holds {others[-1].name} of another run; go on from it with "
            "--resume_from_checkpoint auto, give another --output_dir, or give it up with --overwrite_output_dir"
        )
    goes_on = resumed is not None and resumed.resolve().parent == output_dir.resolve()
    if not goes_on and ((output_dir / MANIFEST).exists() or (output_dir / FINISHED).exists()):
        raise ConfigError(
            f"--output_dir {output_dir} holds the model of another run; give another, {_beside(output_dir)} say, or "
            "let this run replace it with --overwrite_output_dir"
        )


def checkpoints_of_another_run(output_dir: Path, resumed: Path | None) -> list[Path]:
    """Those that a later ``auto`` would mistake for this run's: all, but ``resumed`` and those before it."""
    goes_on = resumed is not None and resumed.resolve().parent == output_dir.resolve()
    up_to = step_of(resumed) if resumed is not None and goes_on else -1
    return [folder for folder in list_checkpoints(output_dir) if step_of(folder) > up_to]


def refuse_full_folder(folder: Path) -> None:
    """Check that an export to ``folder`` finds it empty, but for what one cut short has left.

    Raises:
        CheckpointError: it is a file, or holds something.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--output_dir {folder} is a file; give a new folder, {_beside(folder)} say")
    held = [file.name for file in sorted(folder.iterdir()) if file.name != SAVING] if folder.is_dir() else []
    if held:
        raise CheckpointError(
            f"--output_dir {folder} holds {held[0]}, and an export needs a folder that is new or empty; give another, "
            f"{_beside(folder)} say"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other jobs out of ``folder`` as long as this one runs; a job that is killed keeps nobody out.

    The folder itself is locked, so that no file is left behind. A file system that locks no folders (NFS, some parallel
    ones), or not between hosts, keeps nobody out.

    Raises:
        ConfigError: another job writes there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system that locks no folders
            _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"--output_dir {folder} is being written by another job; wait for it, or give another folder"
        ) from None


def _relation(one: Path, other: Path) -> str | None:
    """How ``one`` would disturb ``other``, both resolved; None if it would not."""
    if one == other:
        return "is"
    if other in one.parents:
        return "lies in"
    return "holds" if one in other.parents else None


def _whole(folder: Path) -> Path:
    """The folder that belongs together with ``folder``: of a snapshot in the hub's cache, the model's in the cache."""
    return folder.parent.parent if folder.parent.name == "snapshots" else folder


def _beside(folder: Path) -> Path:
    """A folder of no use yet, on the same disk."""
    whole = _whole(folder.resolve())
    number = next(number for number in range(2, 10**6) if not whole.with_name(f"{whole.name}-{number}").exists())
    return whole.with_name(f"{whole.name}-{number}")


def _is_of_a_run(folder: Path) -> bool:
    """Whether a run of lomo_ds has written the records in ``folder``."""
    try:
        with (folder / "config.yaml").open(encoding="utf-8") as file:
            if file.readline().rstrip("\n") == HEADER:
                return True
    except (OSError, UnicodeDecodeError):
        pass
    return (folder / FINISHED).exists() or bool(list_checkpoints(folder))
