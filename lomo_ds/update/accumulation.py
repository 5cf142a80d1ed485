"""Resolves ``accumulation`` auto: how the gradients of a step's micro-batches are added up."""

from dataclasses import dataclass

from lomo_ds.config.lomo_config import Accumulation
from lomo_ds.errors import ConfigError


@dataclass(frozen=True)
class AccumulationChoice:
    """A resolved ``accumulation``, and the reason for it.

    Attributes:
        layered: whether ``train_batch`` runs all micro-batches of a step through one layer before the next.
    """

    layered: bool
    reason: str

    @property
    def name(self) -> Accumulation:
        """Value of ``accumulation`` that requests this choice explicitly."""
        return "layered" if self.layered else "stash"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def needs_layers(requested: Accumulation, accumulation_steps: int, against_layered: str | None) -> bool:
    """Return whether whole layers should be gathered for ``accumulation``, see ``choose_accumulation``."""
    accumulates = requested == "layered" or accumulation_steps > 1
    return accumulates and requested != "stash" and against_layered is None


def choose_accumulation(requested: Accumulation, against_layered: str | None, granularity: str) -> AccumulationChoice:
    """Resolve ``accumulation``.

    Args:
        against_layered: why the model cannot accumulate inside its layers; None if it can.
        granularity: unit of a gather, ``module`` or ``layer``; ``auto`` if nothing is gathered.

    Raises:
        ConfigError: ``layered`` was requested, and it is not possible.
    """
    if against_layered is None and granularity == "module":
        against_layered = "parameters are gathered by module, as a layer does not fit or was not asked for"
    if requested == "stash":
        return AccumulationChoice(False, "stash is configured")
    if requested == "layered" and against_layered is not None:
        raise ConfigError(
            f"accumulation layered is not possible: {against_layered}; use accumulation stash, or leave it out"
        )
    if against_layered is not None:
        return AccumulationChoice(False, against_layered)
    return AccumulationChoice(True, "as configured" if requested == "layered" else "the model's layers allow it")
