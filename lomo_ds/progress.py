"""How far a training job has come: what it goes on from, and whether it has ended."""

import json
from dataclasses import dataclass, field
from pathlib import Path

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
    sample_before: str | None = None
    best: float | None = None  # the lowest held-out loss of a saved checkpoint
    best_step: int | None = None
    saved_step: int | None = None  # of the last checkpoint that is whole
    failed_saves: int = 0

    @property
    def position(self) -> Position:
        """Where the data goes on."""
        return Position(self.epoch, self.consumed)


def mark_finished(output_dir: Path, steps: int) -> None:
    """Note that a run of so many steps has ended, and its model is whole."""
    (output_dir / FINISHED).write_text(json.dumps({"steps": steps}) + "\n", encoding="utf-8")


def is_finished(output_dir: Path, steps: int) -> bool:
    """Whether a run of so many steps has ended here."""
    try:
        return json.loads((output_dir / FINISHED).read_text(encoding="utf-8")) == {"steps": steps}
    except (OSError, ValueError):
        return False
