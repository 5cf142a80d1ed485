"""Entry points of the programs in ``launch/``: a user error is printed once, as one line, by one rank."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import psutil
import torch

from lomo_ds.distributed.process_group import is_main_process, ranks_on_host, start_process_group, stop_process_group
from lomo_ds.distributed.watchdog import Watchdog
from lomo_ds.errors import LomoError, PeerError

SILENT_RANK_DELAY = 3.0  # seconds; launchers kill all ranks when one fails, so the reporting rank must exit first
USER_ERROR, BUG = 2, 1  # exit statuses


def run_on_all_ranks(main: Callable[[], None]) -> int:
    """Run ``main`` in the job's process group, and return the exit status.

    A ``LomoError`` is printed without a traceback by the rank that reports it. Any other exception is a bug and is
    printed with its traceback. When one rank dies, the others exit too.
    """
    _configure_logging()
    started, watchdog, status = False, None, BUG
    try:
        started = start_process_group()
        watchdog = Watchdog()
        _set_cpu_threads()
        main()
        status = 0
    except LomoError as error:
        status = USER_ERROR
        if error.on_some_ranks and watchdog is not None and not is_main_process():
            watchdog.wait_for_shutdown()  # ends this process if rank 0 reports the same error
            error.only_on_this_rank = True
        report_error(error)
    except Exception:
        if watchdog is not None:
            watchdog.wait_for_shutdown()
        traceback.print_exc()
    finally:
        if watchdog is not None:
            watchdog.close(reported=status != 0)
        if started and status == 0:
            stop_process_group()  # would hang after a failure, waiting for the other ranks
    return status


def run_in_one_process(main: Callable[[], None]) -> int:
    """Run ``main`` without a process group, and return the exit status."""
    _configure_logging()
    try:
        main()
    except LomoError as error:
        report_error(error)
        return USER_ERROR
    return 0


@contextmanager
def show_traceback(enabled: bool) -> Iterator[None]:
    """If ``enabled``, print the traceback of a user error, with its cause, on the rank that reports it."""
    try:
        yield
    except LomoError as error:
        if enabled and _is_reported_here(error):
            error.__suppress_context__ = False  # set by `raise ... from None`
            traceback.print_exc()
        raise


def _is_reported_here(error: LomoError) -> bool:
    return error.only_on_this_rank or (is_main_process() and not isinstance(error, PeerError))


def report_error(error: LomoError) -> None:
    """Print the message of ``error``, or wait while another rank prints it."""
    if _is_reported_here(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(SILENT_RANK_DELAY)


def exit_now(status: int) -> NoReturn:
    """Exit the process now, without the interpreter's teardown.

    Teardown can abort after the last line of output ("terminate called without an active exception", from a C++
    thread of a library), and the launcher would then report a finished job as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _set_cpu_threads() -> None:
    """Divide the cores of a host without GPUs among its ranks, unless OMP_NUM_THREADS is set."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // ranks_on_host()))


def _configure_logging() -> None:
    """Show the log of lomo_ds and the warnings of DeepSpeed, and hide messages that a user cannot act on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lomo_ds").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # deprecations inside deepspeed and transformers
