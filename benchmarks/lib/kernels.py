"""Whether the Triton kernels are in use on a rank, and if not, why: a row measured without them must say so."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

UPDATE, INT8 = "update kernel", "int8 kernels"
IN_USE = "in use"
UNKNOWN = "no reason was logged"


class Warnings(logging.Handler):
    """Keeps what is logged as a warning.

    Attributes:
        messages: of the warnings so far.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of ``record``."""
        self.messages.append(record.getMessage())


def kernels_of(device: torch.device, int8: bool) -> dict[str, str]:
    """Of each kernel that training on ``device`` calls: ``IN_USE``, or the first line of the error it failed with.

    To be called after training, whose own choice of kernels is cached and so reported.

    Args:
        int8: whether weights are kept, or travel, in eight bits.
    """
    from lomo_ds.numerics.int8 import blocks
    from lomo_ds.update.rules import sgd

    if device.type != "cuda":
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    wanted: dict[str, Any] = {UPDATE: sgd.kernel_for} | ({INT8: blocks.kernel_for} if int8 else {})
    return {name: state_of(kernel_for, device) for name, kernel_for in wanted.items()}


def state_of(kernel_for: Any, device: torch.device) -> str:
    """What the cached function ``kernel_for`` has chosen: ``IN_USE``, or why it fell back."""
    if kernel_for(device) is not None:
        return IN_USE
    kernel_for.cache_clear()  # so that it fails, and logs why, once more
    with logged_warnings(kernel_for.__module__) as messages:
        kernel_for(device)
    return reason_in(messages)


@contextmanager
def logged_warnings(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger, even where logging is disabled."""
    warnings, logger, disabled = Warnings(), logging.getLogger(name), logging.root.manager.disable
    logger.addHandler(warnings)
    logging.disable(logging.NOTSET)
    try:
        yield warnings.messages
    finally:
        logging.disable(disabled)
        logger.removeHandler(warnings)


def reason_in(messages: list[str]) -> str:
    """Why a kernel fell back, in one line: what the last warning says behind "Triton fails"."""
    last = messages[-1] if messages else ""
    lines = (last.partition("Triton fails:")[2] or last).strip().splitlines()
    return lines[0] if lines else UNKNOWN


def fallbacks(kernels: dict[str, str]) -> list[str]:
    """Remarks on the kernels that are not in use."""
    return [f"{name} fell back: {state}" for name, state in kernels.items() if state != IN_USE]
