"""Replacement of a module's forward for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module


@contextmanager
def replaced_forward(module: Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``module`` run ``forward`` until the context ends; its hooks run before and after it.

    What stood in its place may itself be a replacement, which then stands there again.
    """
    replaced = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced
