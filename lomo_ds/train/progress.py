"""Progress of a training job: the state of the loop that checkpoints contain, and the mark of a finished run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lomo_ds.data import Position

FINISHED = "finished.json"


@dataclass
class Progress:
    """State of the training loop that a resumed run needs; stored as JSON."""

    step: int = 0
    epoch: int = 0
    consumed: int = 0  # sequences of the current epoch
    losses: list[float] = field(default_factory=list)  # of the steps since the last log line
    unlogged: dict[str, float] | None = None  # metrics of a step whose evaluation was interrupted
    before: dict[str, float] = field(default_factory=dict)  # evaluation before the first step
    evaluation: dict[str, float] = field(default_factory=dict)  # last evaluation
    evaluated_step: int | None = None  # step of the last evaluation
    sample_before: str | None = None
    held_out: str | None = None  # digest of the validation text
    prompt: str | None = None  # of the text samples
    best: float | None = None  # lowest held-out loss of a saved checkpoint
    best_step: int | None = None
    saved_step: int | None = None  # of the last complete checkpoint
    failed_saves: int = 0

    @classmethod
    def restored(cls, saved: dict[str, Any], held_out: str | None, prompt: str | None, in_place: bool) -> "Progress":
        """Return the progress of a checkpoint, without losses and samples that are no longer comparable.

        Args:
            saved: the fields in the checkpoint; older ones without ``held_out`` and ``prompt`` count as unchanged.
            held_out, prompt: the current ones; losses of another text and samples of another prompt are dropped.
            in_place: whether the run resumes in its own folder; another folder has none of its checkpoints.
        """
        progress = cls(**{"held_out": held_out, "prompt": prompt} | saved)
        if progress.held_out != held_out:
            progress.held_out, progress.before, progress.evaluation = held_out, {}, {}
            progress.evaluated_step, progress.best, progress.best_step = None, None, None
        if progress.prompt != prompt:
            progress.prompt, progress.sample_before = prompt, None
        if not in_place:
            progress.saved_step, progress.best, progress.best_step = None, None, None
        return progress

    @property
    def position(self) -> Position:
        """Position in the training data."""
        return Position(self.epoch, self.consumed)


def mark_finished(output_dir: Path, run: dict[str, Any]) -> None:
    """Record that a run is finished and its model is complete.

    Args:
        run: fields that identify the run, stored as JSON.
    """
    (output_dir / FINISHED).write_text(json.dumps(run) + "\n", encoding="utf-8")


def is_finished(output_dir: Path, run: dict[str, Any]) -> bool:
    """Return whether this run is recorded as finished in ``output_dir``."""
    try:
        return json.loads((output_dir / FINISHED).read_text(encoding="utf-8")) == run
    except (OSError, ValueError):
        return False
