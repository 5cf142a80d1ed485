"""Writes the timeline of a plan: a picture, and a trace for chrome://tracing and Perfetto."""

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lomo_ds.errors import ConfigError
from lomo_ds.planner.plan import Plan, PlannedModel
from lomo_ds.planner.simulated_step import simulate_plan
from lomo_ds.planner.timeline_report import SimulatedPlan
from lomo_ds.simulate.chrome_trace import chrome_trace
from lomo_ds.simulate.figure import draw_timeline
from lomo_ds.simulate.own_process import Report

DOTS_PER_INCH = 150

logger = logging.getLogger(__name__)


class TimelineFiles:
    """The files that ``--timeline`` names.

    Attributes:
        picture: the PNG file; ``trace``, the JSON file beside it.
    """

    def __init__(self, picture: Path) -> None:
        """Check that the files can be written.

        Raises:
            ConfigError: they cannot.
        """
        self.picture, self.trace = picture, picture.with_suffix(".json")
        if picture.suffix.lower() != ".png" or picture.is_dir():
            raise ConfigError(f"--timeline must name a PNG file such as timeline.png, got {str(picture)!r}")
        if not picture.parent.is_dir():
            raise ConfigError(
                f"--timeline must name a file in an existing folder, got {str(picture)!r}; "
                f"create the folder {picture.parent} or name another one"
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--timeline needs matplotlib, which is not installed; pip install matplotlib")

    def write(self, plan: Plan, model: PlannedModel, is_suggestion: bool) -> SimulatedPlan:
        """Simulate a step of ``plan``, and write the files.

        Args:
            is_suggestion: see ``SimulatedPlan``.

        Raises:
            ConfigError: the plan has no timeline, or the files cannot be written.
            ModelError: the step cannot be simulated.
        """
        logger.info("simulating a step of %s, which takes from seconds to minutes", plan.model)
        with _progress() as report:
            step = SimulatedPlan(plan, simulate_plan(plan, model, report), is_suggestion)
        figure = draw_timeline(step.timeline, step.title)
        self._replace(self.picture, lambda path: figure.savefig(path, dpi=DOTS_PER_INCH, format="png"))
        trace = json.dumps(chrome_trace(step.timeline, step.title), separators=(",", ":"))
        self._replace(self.trace, lambda path: path.write_text(trace, encoding="utf-8"))
        return step

    def __str__(self) -> str:
        """Name the files."""
        return f"timeline in {self.picture}, and in {self.trace} for chrome://tracing or ui.perfetto.dev"

    @staticmethod
    def _replace(path: Path, write: Callable[[Path], Any]) -> None:
        """Replace a file atomically."""
        partial = path.with_name(f"{path.name}.partial")
        try:
            write(partial)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ConfigError(f"--timeline {path} cannot be written: {error.strerror}") from None


@contextmanager
def _progress() -> Iterator[Report]:
    """Show on a terminal what is being done, and for how long already."""
    with tqdm(bar_format="{elapsed} {desc}", leave=False, disable=None) as bar:
        yield bar.set_description_str
