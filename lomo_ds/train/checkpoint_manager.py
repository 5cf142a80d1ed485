"""Which checkpoints a run writes and keeps, which is its best, and when one that cannot be written ends it."""

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import deepspeed.comm as dist

from lomo_ds.checkpoint import checkpoint_name, rotate
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.data import Position
from lomo_ds.engine.lomo import LomoEngine
from lomo_ds.errors import CheckpointError
from lomo_ds.train.progress import Progress

logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """What the training loop asks for where a run may have to be gone on with."""

    def save(self, step: int, position: Position, data: dict[str, Any], last: bool = False) -> None:
        """Write the checkpoint after ``step``; see ``CheckpointKeeper.save``."""

    def settle(self) -> None:
        """Wait for what is being written in the background."""

    def load_best(self, step: int) -> str | None:
        """Put the weights of the best checkpoint in the place of those after ``step``; what to tell, if it did."""

    def way_on(self) -> str:
        """How a run that was stopped goes on, in words."""


class NoCheckpoints:
    """The keeper of a run that is there for comparison: stopped, it starts anew."""

    def __init__(self, optim: str) -> None:
        self.optim = optim

    def save(self, step: int, position: Position, data: dict[str, Any], last: bool = False) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing: nothing is being written."""

    def load_best(self, step: int) -> None:
        """None: there is no other than the last."""

    def way_on(self) -> str:
        """That it does not."""
        return f"nothing was saved, as --optim {self.optim} keeps no checkpoints; start again, or use --optim lomo"


class CheckpointKeeper:
    """Saves the state of a run in its output_dir; every rank calls it.

    Args:
        progress: of the run; what becomes of its checkpoints is noted there.
        add_files: writes what a checkpoint holds beside the engine's state into the folder it is given.
    """

    def __init__(
        self, engine: LomoEngine, arguments: TrainArguments, progress: Progress, add_files: Callable[[Path], None]
    ) -> None:
        self.engine = engine
        self.arguments = arguments
        self.progress = progress
        self.add_files = add_files
        self.output_dir = Path(arguments.output_dir)
        self.saver = engine.saver  # made now: where its ranks cannot meet, a run should not find out at its first save
        self.pending: Progress | None = None  # what is being written

    def save(self, step: int, position: Position, data: dict[str, Any], last: bool = False) -> None:
        """Write the checkpoint after ``step``, with --async_save in the background.

        Args:
            data: by which the training text is known again.
            last: the run ends with it.

        Raises:
            CheckpointError: it cannot be written, and it is the last one, or none was ever written.
        """
        self.settle()  # before the state is taken: what became of the last save is part of it
        state = self._state(step, position)
        self.pending = state
        in_background = self.arguments.async_save and not last
        try:
            self.engine.save_checkpoint(
                self.output_dir,
                checkpoint_name(step),
                {"progress": dataclasses.asdict(state), "data": data},
                add_files=self.add_files,
                after_save=partial(self._rotate, state),
                in_background=in_background,
            )
        except CheckpointError as error:
            self._note_failure(error, last)
        if not in_background:
            self.settle()

    def _state(self, step: int, position: Position) -> Progress:
        state = dataclasses.replace(
            self.progress, step=step, epoch=position.epoch, consumed=position.consumed, saved_step=step
        )
        loss = state.evaluation.get("eval_loss", math.nan) if state.evaluated_step == step else math.nan
        if math.isfinite(loss) and (state.best is None or loss < state.best):
            state.best, state.best_step = loss, step
        return state

    def settle(self) -> None:
        """Wait for what is being written in the background, and note how it went.

        Raises:
            CheckpointError: it could not be written, and none ever was.
        """
        if self.pending is None:
            return
        try:
            self.saver.wait()
        except CheckpointError as error:
            self._note_failure(error, last=False)
            return
        done, self.pending = self.pending, None
        self.progress.saved_step = done.saved_step
        self.progress.best, self.progress.best_step = done.best, done.best_step

    def load_best(self, step: int) -> str | None:
        """With --load_best_model_at_end, load the best checkpoint, unless it is the one after ``step``."""
        best = self.progress.best_step
        if not self.arguments.load_best_model_at_end or best is None or best == step:
            return None
        self.engine.load_checkpoint(self.output_dir, checkpoint_name(best), load_module_only=True)
        return f"best model: {checkpoint_name(best)}, held-out loss {self.progress.best:.4f}"

    def way_on(self) -> str:
        """Where the last checkpoint is, and how to go on from it."""
        saved = self.progress.saved_step
        where = "nothing was to be saved" if saved is None else f"{self.output_dir / checkpoint_name(saved)} is saved"
        return f"{where}; go on with --resume_from_checkpoint auto"

    def _note_failure(self, error: CheckpointError, last: bool) -> None:
        self.pending = None
        self.progress.failed_saves += 1
        if last or self.progress.saved_step is None:
            raise error
        if dist.get_rank() == 0:
            logger.warning(
                "%s; training goes on, %s is whole (%d saves have failed so far)",
                error, checkpoint_name(self.progress.saved_step), self.progress.failed_saves,
            )  # fmt: skip

    def _rotate(self, state: Progress) -> None:
        if self.arguments.save_total_limit is None:
            return
        protected = {checkpoint_name(step) for step in (state.saved_step, state.best_step) if step is not None}
        try:
            rotate(self.output_dir, self.arguments.save_total_limit, protected)
        except OSError as error:
            logger.warning("an old checkpoint in %s cannot be deleted: %s", self.output_dir, error.strerror)
