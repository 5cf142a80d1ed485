"""Which checkpoints a run writes and keeps, which is its best, and when one that cannot be written ends it."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed.comm as dist

from lomo_ds.arguments import TrainArguments
from lomo_ds.checkpoint import checkpoint_name, rotate
from lomo_ds.engine import LomoEngine
from lomo_ds.errors import CheckpointError
from lomo_ds.progress import Progress

logger = logging.getLogger(__name__)


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
        self.pending: Progress | None = None  # what is being written

    def save(self, state: Progress, loss: float | None, blocks: list[int], last: bool) -> None:
        """Write the checkpoint of ``state``, with --async_save in the background.

        Args:
            loss: held-out, of this very state, if it was evaluated.
            blocks: number and length of the training sequences, by which the data is known again.
            last: the run ends with it.

        Raises:
            CheckpointError: it cannot be written, and it is the last one, or none was ever written.
        """
        self.settle()
        state = dataclasses.replace(state, saved_step=state.step)
        if loss is not None and (state.best is None or loss < state.best):
            state.best, state.best_step = loss, state.step
        self.pending = state
        in_background = self.arguments.async_save and not last
        try:
            self.engine.save_checkpoint(
                self.output_dir,
                checkpoint_name(state.step),
                {"progress": dataclasses.asdict(state), "blocks": blocks},
                self.add_files,
                partial(self._rotate, state),
                in_background,
            )
        except CheckpointError as error:
            self._note_failure(error, last)
        if not in_background:
            self.settle()

    def settle(self) -> None:
        """Wait for what is being written in the background, and note how it went.

        Raises:
            CheckpointError: it could not be written, and none ever was.
        """
        if self.pending is None:
            return
        try:
            self.engine.saver.wait()
        except CheckpointError as error:
            self._note_failure(error, last=False)
            return
        done, self.pending = self.pending, None
        self.progress.saved_step = done.saved_step
        self.progress.best, self.progress.best_step = done.best, done.best_step

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
        if self.arguments.save_total_limit is not None:
            protected = {checkpoint_name(step) for step in (state.saved_step, state.best_step) if step is not None}
            rotate(self.output_dir, self.arguments.save_total_limit, protected)
