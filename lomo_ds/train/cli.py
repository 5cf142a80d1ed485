"""How every program in ``launch/`` starts and ends: one sentence for what the user can mend, from one rank."""

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

SILENT_RANK_DELAY = 3.0  # seconds: launchers end every rank as soon as one has failed, so the speaker goes first
USER_ERROR, DEFECT = 2, 1  # exit statuses


def run_on_all_ranks(main: Callable[[], None]) -> int:
    """Run ``main`` in the job's process group; returns the exit status.

    A ``LomoError`` is printed without a traceback by the one rank that has to say it. Any other exception is a
    defect and shows its traceback. When one rank dies, the others end too.
    """
    _quiet_libraries()
    started, watchdog, status = False, None, DEFECT
    try:
        started = start_process_group()
        watchdog = Watchdog()
        _share_cores()
        main()
        status = 0
    except LomoError as error:
        status = USER_ERROR
        if error.on_some_ranks and watchdog is not None and not is_main_process():
            watchdog.wait_for_shutdown()  # which ends this process, if rank 0 has the same to say
            error.only_on_this_rank = True
        tell(error)
    except Exception:
        if watchdog is not None:
            watchdog.wait_for_shutdown()
        traceback.print_exc()
    finally:
        if watchdog is not None:
            watchdog.close(reported=status != 0)
        if started and status == 0:
            stop_process_group()  # which would wait for the others where they have failed otherwise
    return status


def run_alone(main: Callable[[], None]) -> int:
    """Run ``main`` in this process alone; returns the exit status."""
    _quiet_libraries()
    try:
        main()
    except LomoError as error:
        tell(error)
        return USER_ERROR
    return 0


@contextmanager
def traceback_shown(wanted: bool) -> Iterator[None]:
    """Print the traceback of a user's error where it is told, if ``wanted``, with the library's error behind it."""
    try:
        yield
    except LomoError as error:
        if wanted and _is_told_here(error):
            error.__suppress_context__ = False  # of `raise ... from None`
            traceback.print_exc()
        raise


def _is_told_here(error: LomoError) -> bool:
    return error.only_on_this_rank or (is_main_process() and not isinstance(error, PeerError))


def tell(error: LomoError) -> None:
    """Print the sentence of ``error``, or be silent for as long as another rank needs to."""
    if _is_told_here(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(SILENT_RANK_DELAY)


def leave(status: int) -> NoReturn:
    """End this process now, without tearing the interpreter down.

    A rank was seen to abort behind its last line ("terminate called without an active exception": a C++ thread that
    outlived its owner, not found which), whereupon the launcher calls a finished job a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _share_cores() -> None:
    """On a host without GPU, the ranks on it share its cores, unless OMP_NUM_THREADS says otherwise."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // ranks_on_host()))


def _quiet_libraries() -> None:
    """Let through what a user can act on: our own log, and the warnings of the libraries below."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lomo_ds").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # deprecations inside deepspeed and transformers
