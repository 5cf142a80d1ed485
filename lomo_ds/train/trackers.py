"""Programs that show a run's metrics: TensorBoard and Weights & Biases, under the names of transformers' Trainer."""

import importlib.util
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from lomo_ds.errors import ConfigError, one_line

RUN_ID = "wandb_run_id"  # file in the output folder, so that a resumed run goes on in the same chart
EVALUATED = "eval_"  # prefix of the names of held-out metrics
PROJECT = "huggingface"  # default, as in transformers' Trainer

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives the metrics of one rank."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, whose names have a section before a slash."""

    def close(self, failed: bool) -> None:
        """Write what is left; ``failed`` says whether the run ended with an error."""

    def describe(self) -> str:
        """Return where the metrics are, in one line."""


def trainer_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Rename metrics as transformers' Trainer does: ``loss`` to ``train/loss`` and ``eval_loss`` to ``eval/loss``."""
    evaluated = {name: name.removeprefix(EVALUATED) for name in metrics if name.startswith(EVALUATED)}
    return {f"eval/{evaluated[n]}" if n in evaluated else f"train/{n}": value for n, value in metrics.items()}


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        ConfigError: one is not; the message says how to install it.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "--report_to wandb needs the package wandb, which is not installed; pip install wandb, or use "
            "--report_to tensorboard"
        )


class TensorBoard:
    """Writer of TensorBoard events.

    Args:
        step: the step to resume after, see ``Monitor``.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        first = step + 1 if step else 0  # TensorBoard hides older events from this step on
        self.writer = SummaryWriter(str(folder), purge_step=first)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Implement ``Tracker.log``."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Implement ``Tracker.close``."""
        self.writer.close()

    def describe(self) -> str:
        """Implement ``Tracker.describe``."""
        return f"TensorBoard: tensorboard --logdir {self.folder}"


class Wandb:
    """A run of Weights & Biases, named after the output folder; wandb's environment variables take precedence.

    Args:
        settings: the run's arguments, to be shown with it.
        step: the step to resume after; such a run continues in the same chart.

    Raises:
        ConfigError: wandb cannot start a run, for example without a login.
    """

    def __init__(self, output_dir: Path, settings: Mapping[str, Any], step: int) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", output_dir.resolve().name),
                dir=os.environ.get("WANDB_DIR", str(output_dir)),
                id=os.environ.get("WANDB_RUN_ID") or _run_id(output_dir / RUN_ID, resumed=step > 0),
                resume="allow",
                config=dict(settings),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"--report_to wandb: wandb cannot start a run: {one_line(error)}; run `wandb login`, set "
                "WANDB_MODE=offline to upload it later, or use --report_to tensorboard"
            ) from error
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
        self.is_broken = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Implement ``Tracker.log``; if wandb fails, training goes on without it."""
        if self.is_broken:
            return
        try:
            self.run.log({**metrics, "train/global_step": step})
        except Exception as error:  # of any kind, from the process that uploads
            self.is_broken = True
            logger.warning("wandb records nothing from step %d on: %s", step, one_line(error))

    def close(self, failed: bool) -> None:
        """Implement ``Tracker.close``; a failure of wandb does not fail the run."""
        import wandb

        try:
            self.run.finish(exit_code=int(failed))
            wandb.teardown()  # waits for its process, which a job's exit would leave behind with data to write
        except Exception as error:
            logger.warning("wandb has not recorded everything: %s", one_line(error))

    def describe(self) -> str:
        """Implement ``Tracker.describe``."""
        is_local = self.run.offline or not self.run.url
        return f"wandb: {f'wandb sync {self.run.settings.sync_dir}' if is_local else self.run.url}"


def _run_id(file: Path, resumed: bool) -> str:
    """Return the run's identity in wandb: a resumed run has that of its first start."""
    if resumed and file.exists():
        return file.read_text(encoding="utf-8").strip()
    identity = uuid.uuid4().hex[:16]
    file.write_text(identity + "\n", encoding="utf-8")
    return identity
