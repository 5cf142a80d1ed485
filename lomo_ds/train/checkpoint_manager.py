"""The checkpoints of a run: when they are written and deleted, which is the best, and when a failed save is fatal."""

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from lomo_ds.checkpoint import checkpoint_name, rotate
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.lomo_config import OPTIMIZERS
from lomo_ds.data import Position
from lomo_ds.engine.lomo import LomoEngine
from lomo_ds.errors import CheckpointError
from lomo_ds.train.progress import Progress

logger = logging.getLogger(__name__)


class RunCheckpoints(Protocol):
    """The checkpoints of a run, as the training loop uses them; every rank calls each method."""

    def save(self, step: int, position: Position, data: dict[str, Any], last: bool = False) -> None:
        """Write the checkpoint after ``step``; see ``CheckpointManager.save``."""

    def wait(self) -> None:
        """Wait for a checkpoint that is being written in the background."""

    def load_best(self, step: int) -> str | None:
        """Load the best checkpoint unless it is the one after ``step``; return a message for the user if it did."""

    def resume_hint(self) -> str:
        """Return how the user resumes a run that was stopped."""


class NoCheckpoints:
    """A run with a baseline optimizer: it saves nothing, and starts from the beginning after a stop."""

    def __init__(self, optim: str) -> None:
        self.optim = optim

    def save(self, step: int, position: Position, data: dict[str, Any], last: bool = False) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def load_best(self, step: int) -> None:
        """Do nothing: the last weights are the only ones."""

    def resume_hint(self) -> str:
        """Implement ``RunCheckpoints.resume_hint``."""
        return (
            f"nothing was saved, as --optim {self.optim} keeps no checkpoints; start again, or use --optim "
            f"{' or '.join(OPTIMIZERS)}"
        )


class CheckpointManager:
    """Saves, rotates and selects the checkpoints of a run in its output folder; every rank calls each method.

    Args:
        progress: progress of the run; records which checkpoints were saved and which is the best.
        add_files: writes further files into a checkpoint's folder.
    """

    def __init__(
        self, engine: LomoEngine, arguments: TrainArguments, progress: Progress, add_files: Callable[[Path], None]
    ) -> None:
        self.engine = engine
        self.arguments = arguments
        self.progress = progress
        self.add_files = add_files
        self.output_dir = Path(arguments.output_dir)
        self.saver = engine.saver  # created now, so that a process group that cannot form fails before training
        self.pending: Progress | None = None  # of the checkpoint being written

    def save(self, step: int, position: Position, data: dict[str, Any], last: bool = False) -> None:
        """Write the checkpoint after ``step``, with --async_save in the background.

        Args:
            data: identifies the training text when the run is resumed.
            last: whether the run ends with this checkpoint.

        Raises:
            CheckpointError: it cannot be written, and it is the last or the first one of the run.
        """
        self.wait()  # first, because the outcome of the last save is part of the state
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
            self._record_failure(error, last)
        if not in_background:
            self.wait()

    def _state(self, step: int, position: Position) -> Progress:
        state = dataclasses.replace(
            self.progress, step=step, epoch=position.epoch, consumed=position.consumed, saved_step=step
        )
        loss = state.evaluation.get("eval_loss", math.nan) if state.evaluated_step == step else math.nan
        if math.isfinite(loss) and (state.best is None or loss < state.best):
            state.best, state.best_step = loss, step
        return state

    def wait(self) -> None:
        """Wait for a checkpoint that is being written in the background, and record the outcome.

        Raises:
            CheckpointError: it could not be written, and no earlier one is intact.
        """
        if self.pending is None:
            return
        try:
            self.saver.wait()
        except CheckpointError as error:
            self._record_failure(error, last=False)
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

    def resume_hint(self) -> str:
        """Return where the last checkpoint is, and how to resume from it."""
        saved = self.progress.saved_step
        where = "no checkpoint was saved" if saved is None else f"{self.output_dir / checkpoint_name(saved)} is saved"
        return f"{where}; resume with --resume_from_checkpoint auto"

    def _record_failure(self, error: CheckpointError, last: bool) -> None:
        self.pending = None
        self.progress.failed_saves += 1
        if last or self.progress.saved_step is None:
            raise error
        if dist.get_rank() == 0:
            logger.warning(
                "%s; training continues, %s is intact (%d saves have failed so far)",
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
