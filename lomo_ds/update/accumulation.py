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


def choose_accumulation(requested: Accumulation, against_layered: str | None) -> AccumulationChoice:
    """Resolve ``accumulation``.

    Args:
        against_layered: why the model cannot accumulate inside its layers; None if it can.

    Raises:
        ConfigError: ``layered`` was requested, and the model cannot.
    """
    if requested == "stash":
        return AccumulationChoice(False, "as configured")
    if requested == "layered" and against_layered is not None:
        raise ConfigError(
            f"accumulation layered is not possible: {against_layered}; use accumulation stash, or leave it out"
        )
    if against_layered is not None:
        return AccumulationChoice(False, against_layered)
    return AccumulationChoice(True, "as configured" if requested == "layered" else "the model's layers allow it")
