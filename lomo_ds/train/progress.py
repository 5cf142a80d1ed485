"""How far a training job has come: what it goes on from, and whether it has ended."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lomo_ds.data import Position

FINISHED = "finished.json"


@dataclass
class Progress:
    """What the loop itself must remember when it is stopped and goes on, as JSON."""

    step: int = 0
    epoch: int = 0
    consumed: int = 0  # sequences of the epoch under way
    losses: list[float] = field(default_factory=list)  # since the last log line
    unlogged: dict[str, float] | None = None  # of a step whose evaluation was cut short
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before the first step
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one
    evaluated_step: int | None = None  # after which it was made
    sample_before: str | None = None
    held_out: str | None = None  # digest of the text that evaluations are made on
    prompt: str | None = None  # of the samples
    best: float | None = None  # the lowest held-out loss of a saved checkpoint
    best_step: int | None = None
    saved_step: int | None = None  # of the last checkpoint that is whole
    failed_saves: int = 0

    @classmethod
    def resumed(cls, saved: dict[str, Any], held_out: str | None, prompt: str | None, in_place: bool) -> "Progress":
        """How far a run had come, without what is no longer to be compared.

        Args:
            saved: of a checkpoint; one of before ``held_out`` and ``prompt`` were kept is taken to have had the same.
            held_out, prompt: of now; figures of another text, and samples of another prompt, are dropped.
            in_place: the run goes on in its folder; in another there is none of its checkpoints.
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
        """Where the data goes on."""
        return Position(self.epoch, self.consumed)


def mark_finished(output_dir: Path, run: dict[str, Any]) -> None:
    """Note that a run has ended, and its model is whole.

    Args:
        run: what tells it from other runs, as JSON.
    """
    (output_dir / FINISHED).write_text(json.dumps(run) + "\n", encoding="utf-8")


def is_finished(output_dir: Path, run: dict[str, Any]) -> bool:
    """Whether this very run has ended here."""
    try:
        return json.loads((output_dir / FINISHED).read_text(encoding="utf-8")) == run
    except (OSError, ValueError):
        return False
