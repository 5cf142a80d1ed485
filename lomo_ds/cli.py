"""How every program in ``launch/`` starts and ends: one sentence for what the user can mend, from one rank."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

import psutil
import torch

from lomo_ds.distributed import is_main_process, start_process_group, stop_process_group
from lomo_ds.errors import LomoError, PeerError

SILENT_RANK_DELAY = 3.0  # seconds: launchers end every rank as soon as one has failed, so the speaker goes first


def run_on_all_ranks(main: Callable[[], None]) -> int:
    """Run ``main`` in the job's process group; returns the exit status.

    A ``LomoError`` is printed without a traceback by the one rank that has to say it. Any other exception is a
    defect and shows its traceback.
    """
    _quiet_libraries()
    started = False
    try:
        started = start_process_group()
        _share_cores()
        main()
    except LomoError as error:
        if error.only_here or (is_main_process() and not isinstance(error, PeerError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SILENT_RANK_DELAY)
        return 2
    finally:
        if started:
            stop_process_group()
    return 0


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
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // ranks_here))


def _quiet_libraries() -> None:
    """Let through what a user can act on: our own log, and the warnings of the libraries below."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lomo_ds").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # deprecations inside deepspeed and transformers
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # inside torchdata
