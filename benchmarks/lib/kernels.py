"""Reports whether the Triton kernels are in use on a rank, and if not, why."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

UPDATE, INT8 = "update kernel", "int8 kernels"
IN_USE = "in use"
UNKNOWN = "no reason was logged"


class WarningCollector(logging.Handler):
    """Collects logged warnings.

    Attributes:
        messages: the messages of the warnings so far.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Collect the message of ``record``."""
        self.messages.append(record.getMessage())


def kernel_states(device: torch.device, int8: bool) -> dict[str, str]:
    """Return ``IN_USE`` for each kernel that training on ``device`` calls, or the first line of the kernel's error.

    Call it after training: it reports the choice of kernels that training has made and cached.

    Args:
        int8: whether weights are stored or gathered in int8.
    """
    from lomo_ds.numerics import apply
    from lomo_ds.numerics.int8 import blocks

    if device.type != "cuda":
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    choices: dict[str, Any] = {UPDATE: apply.kernel_for} | ({INT8: blocks.kernel_for} if int8 else {})
    return {name: kernel_state(kernel_for, device) for name, kernel_for in choices.items()}


def kernel_state(kernel_for: Any, device: torch.device) -> str:
    """Return ``IN_USE`` if the cached function ``kernel_for`` has chosen a kernel, or the reason why it fell back."""
    if kernel_for(device) is not None:
        return IN_USE
    kernel_for.cache_clear()  # makes it fail and log the reason once more
    with logged_warnings(kernel_for.__module__) as messages:
        kernel_for(device)
    return fallback_reason(messages)


@contextmanager
def logged_warnings(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger, even where logging is disabled."""
    warnings, logger, disabled = WarningCollector(), logging.getLogger(name), logging.root.manager.disable
    logger.addHandler(warnings)
    logging.disable(logging.NOTSET)
    try:
        yield warnings.messages
    finally:
        logging.disable(disabled)
        logger.removeHandler(warnings)


def fallback_reason(messages: list[str]) -> str:
    """Return in one line why a kernel fell back: the text after "Triton fails" in the last warning."""
    last = messages[-1] if messages else ""
    lines = (last.partition("Triton fails:")[2] or last).strip().splitlines()
    return lines[0] if lines else UNKNOWN


def fallbacks(kernels: dict[str, str]) -> list[str]:
    """Return a remark for each kernel that is not in use."""
    return [f"{name} fell back: {state}" for name, state in kernels.items() if state != IN_USE]
