"""Calls a function in a process of its own, which reports its progress and its errors to this one."""

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from lomo_ds.errors import LomoError, ModelError, one_line

SECONDS_BETWEEN_REPORTS = 0.5
STAGE, RESULT, ERROR = "stage", "result", "error"  # kinds of messages from the process

Report = Callable[[str], None]  # told in words what is being done


class RemoteError(Exception):
    """An error in another process, with the traceback that it had there."""


def call_in_own_process(function: Callable[[Any, Report], Any], argument: Any, report: Report) -> Any:
    """Return what ``function`` returns; it gets ``argument`` and a function that tells what it does.

    Args:
        report: is told the last stage several times a second, so that it can show the time that has passed.

    Raises:
        LomoError: the function has raised it.
        ModelError: the function has raised another exception, or the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, argument, sender), daemon=True)
    with _without_accelerator():
        process.start()
    sender.close()  # so that the receiver notices when the process ends
    try:
        return _receive(receiver, report)
    except EOFError:
        process.join()
        killed = "; it was killed, perhaps because host memory was full" if process.exitcode == -signal.SIGKILL else ""
        raise ModelError(
            f"the step cannot be simulated: its process ended with exit code {process.exitcode}{killed}"
        ) from None
    finally:
        process.kill()
        process.join()


@contextmanager
def _without_accelerator() -> Iterator[None]:
    """Let a process that starts now ask for no GPU, and not print that it finds none."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before


def _receive(receiver: Connection, report: Report) -> Any:
    stage = "start a process"
    while True:
        report(stage)
        if not receiver.poll(SECONDS_BETWEEN_REPORTS):
            continue
        kind, value = receiver.recv()
        if kind == RESULT:
            return value
        if kind == ERROR:
            error, text = value
            raise error from RemoteError(text)
        stage = value


def _call(function: Callable[[Any, Report], Any], argument: Any, sender: Connection) -> None:
    os.dup2(2, 1)  # what libraries print must not get into the output of the program
    warnings.simplefilter("ignore")
    try:
        result = function(argument, lambda stage: sender.send((STAGE, stage)))
    except Exception as error:  # which may refer to tensors, so it is not sent itself
        sender.send((ERROR, (_sendable(error), traceback.format_exc())))
    else:
        sender.send((RESULT, result))


def _sendable(error: Exception) -> LomoError:
    """Return an error with the same message, and nothing else."""
    if isinstance(error, LomoError):
        return type(error)(str(error))
    return ModelError(f"the step cannot be simulated: {type(error).__name__}: {one_line(error)}")
