"""The ranks that a benchmark measures: processes that are started once, and run one function after the other.

    with Workers(ranks=2, device="cpu") as workers:
        workers.call(build, "stash")        # build(desk, "stash") on every rank; what each returned
        workers.call(step)

The first argument of every function is the rank's ``desk``, a dictionary that lasts as long as its process.
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

# Whatever imports deepspeed is imported in the processes: deepspeed chooses its accelerator then.

Desk = dict[str, Any]

TIMEOUT = 600.0  # seconds that a call may take
GRACE = 5.0  # seconds the other ranks have to say something when one has failed
DOES_NOT_FIT = "does not fit"  # the outcome of what ran out of memory
OUT_OF_HOST_MEMORY = "can't allocate memory"  # how torch's allocator on the CPU says it
PRELOAD = ["benchmarks.lib.methods", "lomo_ds.engine.lomo", "lomo_ds.models", "transformers.models.llama"]


class WorkerError(Exception):
    """A rank failed, died or did not answer."""


class DoesNotFit(Exception):
    """A rank ran out of memory."""


class Workers:
    """``ranks`` processes in one process group.

    Args:
        device: ``cpu`` or ``cuda``.
        simulate_world: instead of real ranks, start rank 0 of a group of so many, whose collectives move nothing
            (torch's fake process group). Memory is that of a real rank; times mean nothing.
    """

    def __init__(self, ranks: int, device: str, simulate_world: int | None = None) -> None:
        assert simulate_world is None or ranks == 1
        # a forked process has imported everything at once, but cannot use CUDA
        context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device == "cpu":
            context.set_forkserver_preload(PRELOAD)
        self.port = 0  # found when it is needed: others of this kind, started meanwhile, take ports too
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        os.environ["DS_ACCELERATOR"] = device  # a spawned process imports deepspeed before it has read anything
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, ranks, device, simulate_world), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        """What ``function(desk, *arguments)`` returned on each rank.

        Raises:
            DoesNotFit: a rank ran out of memory; the ranks have been stopped.
            WorkerError: a rank raised something else, died, or took longer than ``timeout`` seconds; likewise.
        """
        self.begin(function, *arguments)
        return self.finish(timeout)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a call whose results ``finish`` will return."""
        self.port = self.port or free_port()
        try:
            for connection in self.connections:
                connection.send((self.port, function, arguments))
        except OSError:
            self.stop()
            raise WorkerError("a rank has died") from None

    def finish(self, timeout: float = TIMEOUT) -> list[Any]:
        """The results of the call under way; raises what ``call`` raises."""
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self.connections) and time.monotonic() < deadline:
            waiting = [rank for rank in range(len(self.connections)) if rank not in answers]
            ready = multiprocessing.connection.wait([self.connections[rank] for rank in waiting], timeout=0.2)
            for rank in waiting:
                if self.connections[rank] in ready:
                    answers[rank] = _receive(self.connections[rank])
                    if answers[rank][0] != "returned":  # the others wait for it in a collective, perhaps for ever
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
        """End the processes."""
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
        return "died", "it has died"


def _serve(connection: Connection, rank: int, ranks: int, device: str, simulate_world: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and the first one stops the others
    set_environment(rank, ranks, device, simulate_world)
    for module in PRELOAD:  # at once, while whoever started us has other things to do
        importlib.import_module(module)
    desk: Desk = {}
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # whoever started us is gone, or wants us gone
        ready = False
        while True:
            port, function, arguments = connection.recv()
            try:
                if not ready:
                    os.environ["MASTER_PORT"] = str(port)
                    get_ready(device, simulate_world)
                    ready = True
                answer = ("returned", function(desk, *arguments))
            except BaseException as error:
                answer = (_outcome(error), traceback.format_exc())
            connection.send(answer)


def _outcome(error: BaseException) -> str:
    return DOES_NOT_FIT if is_out_of_memory(error) else "raised"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or OUT_OF_HOST_MEMORY in str(error)


def set_environment(rank: int, ranks: int, device: str, simulate_world: int | None) -> None:
    """Make this process one of ``ranks`` on one host, before it imports deepspeed; see ``Workers``."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(simulate_world or ranks),
        "LOCAL_WORLD_SIZE": str(simulate_world or ranks),
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": device,
    }


def get_ready(device: str, simulate_world: int | None) -> None:
    """Join the process group that the environment names, and print nothing from here on."""
    import logging
    import warnings

    import torch

    from benchmarks.lib.simulated_ranks import start_simulated_process_group
    from lomo_ds.distributed.process_group import start_process_group

    if device == "cpu":  # with several, small operations would wait for each other longer than they take
        torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # deepspeed prints into the progress bar
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    if simulate_world:
        start_simulated_process_group(simulate_world)
    else:
        start_process_group()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
