"""The ranks that a benchmark measures: processes that start once and then run one function after another.

    with Workers(ranks=2, device="cpu") as workers:
        workers.call(build, "stash")        # runs build(state, "stash") on every rank; returns the results
        workers.call(step)

The first argument of every function is the rank's ``state``, a dictionary that lives as long as its process.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Modules that import deepspeed are imported only in the rank processes: deepspeed chooses its accelerator at import.

RankState = dict[str, Any]

TIMEOUT = 600.0  # limit of a call, seconds
GRACE = 5.0  # seconds that the other ranks have to answer after one has failed
DOES_NOT_FIT = "does not fit"  # outcome of a row that ran out of memory
OUT_OF_HOST_MEMORY = "can't allocate memory"  # in the error message of torch's CPU allocator
PRELOAD = ["benchmarks.lib.methods", "lomo_ds.engine.initialize", "lomo_ds.models", "transformers.models.llama"]


class WorkerError(Exception):
    """Raised when a rank failed, died or did not answer."""


class DoesNotFit(Exception):
    """Raised when a rank ran out of memory."""


class Workers:
    """``ranks`` processes in one process group.

    Args:
        device: ``cpu`` or ``cuda``.
        simulate_world: start only rank 0 of a group of this size, in torch's fake process group, whose collectives
            communicate nothing. Memory is that of a real rank; times mean nothing.
    """

    def __init__(self, ranks: int, device: str, simulate_world: int | None = None) -> None:
        assert simulate_world is None or ranks == 1
        # a forked process has its imports already, but cannot use CUDA
        context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device == "cpu":
            context.set_forkserver_preload(PRELOAD)
        self.port = 0  # chosen at the first call, because other workers may take ports until then
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        os.environ["DS_ACCELERATOR"] = device  # a spawned process imports deepspeed before it receives anything
        for rank in range(ranks):
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_serve, args=(child_end, rank, ranks, device, simulate_world), daemon=True)
            process.start()
            child_end.close()
            self.connections.append(parent_end)
            self.processes.append(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Run ``function(state, *arguments)`` on every rank, and return the results of all ranks.

        Raises:
            DoesNotFit: a rank ran out of memory; the ranks have been stopped.
            WorkerError: a rank raised another exception, died, or took longer than ``timeout`` seconds; the ranks
                have been stopped.
        """
        self.begin(function, *arguments)
        return self.finish(timeout)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a call; ``finish`` returns its results."""
        self.port = self.port or free_port()
        try:
            for connection in self.connections:
                connection.send((self.port, function, arguments))
        except OSError:
            self.stop()
            raise WorkerError("a rank has died") from None

    def finish(self, timeout: float = TIMEOUT) -> list[Any]:
        """Return the results of the call that ``begin`` started; raises like ``call``."""
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self.connections) and time.monotonic() < deadline:
            waiting = [rank for rank in range(len(self.connections)) if rank not in answers]
            ready = multiprocessing.connection.wait([self.connections[rank] for rank in waiting], timeout=0.2)
            for rank in waiting:
                if self.connections[rank] in ready:
                    answers[rank] = _receive(self.connections[rank])
                    if answers[rank][0] != "returned":  # the other ranks may wait for it in a collective forever
                        deadline = min(deadline, time.monotonic() + GRACE)
        outcomes = {outcome for outcome, _ in answers.values()}
        if outcomes == {"returned"} and len(answers) == len(self.connections):
            return [answers[rank][1] for rank in range(len(self.connections))]
        self.stop()
        if DOES_NOT_FIT in outcomes:
            raise DoesNotFit(next(text for outcome, text in answers.values() if outcome == DOES_NOT_FIT))
        failures = [f"rank {rank}:\n{text}" for rank, (outcome, text) in answers.items() if outcome != "returned"]
        raise WorkerError("\n".join(failures) or f"no answer within {timeout:.0f} s")

    def stop(self) -> None:
        """Kill the processes."""
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.join()
            connection.close()
        self.processes, self.connections = [], []


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        return "died", "the process has died"


def _serve(connection: Connection, rank: int, ranks: int, device: str, simulate_world: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops the ranks
    set_environment(rank, ranks, device, simulate_world)
    for module in PRELOAD:  # now, while the parent process is still busy
        importlib.import_module(module)
    state: RankState = {}
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the parent process has exited
        ready = False
        while True:
            port, function, arguments = connection.recv()
            try:
                if not ready:
                    os.environ["MASTER_PORT"] = str(port)
                    start_rank(device, simulate_world)
                    ready = True
                answer = ("returned", function(state, *arguments))
            except BaseException as error:
                answer = (_outcome(error), traceback.format_exc())
            connection.send(answer)


def _outcome(error: BaseException) -> str:
    return DOES_NOT_FIT if is_out_of_memory(error) else "raised"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host is out of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or OUT_OF_HOST_MEMORY in str(error)


def set_environment(rank: int, ranks: int, device: str, simulate_world: int | None) -> None:
    """Set the environment of one of ``ranks`` ranks on one host; call it before deepspeed is imported."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(simulate_world or ranks),
        "LOCAL_WORLD_SIZE": str(simulate_world or ranks),
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": device,
    }


def start_rank(device: str, simulate_world: int | None) -> None:
    """Join the process group that the environment describes, and silence this process."""
    import logging
    import warnings

    import torch

    from benchmarks.lib.simulated_ranks import start_simulated_process_group
    from lomo_ds.distributed.process_group import start_process_group

    if device == "cpu":  # with several threads, small operations spend more time waiting than computing
        torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # deepspeed's output would disturb the progress bar
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    if simulate_world:
        start_simulated_process_group(simulate_world)
    else:
        start_process_group()


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
