"""Run a plain function on N ranks: ``ranks(2).run(function, argument)`` returns what each rank returned.

The processes of a world size are started once and wait for further functions. They are forked from one server that
has already imported torch, deepspeed and transformers, which is what takes the time.
"""

import contextlib
import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from lomo_ds.errors import LomoError
from tests.limits import HUNG

GRACE = 10.0  # seconds the other ranks have to end when one has failed


class Ranks:
    """``world_size`` processes in one process group, which may take ``hung`` seconds for a function."""

    def __init__(self, world_size: int, accelerator: str = "cpu", hung: float = HUNG) -> None:
        if accelerator == "cpu":
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["lomo_ds.train.loop"])
        else:
            context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.world_size, self.hung = world_size, hung
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_serve, args=(child_end, rank, world_size, port, accelerator))
            process.start()
            self.connections.append(parent_end)
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the result of ``function(*arguments)`` on each rank; a failure on any rank fails the test."""
        for connection in self.connections:
            connection.send((function, arguments))
        results = [None] * self.world_size
        failures: dict[int, str] = {}
        waiting = set(range(self.world_size))
        deadline = time.monotonic() + self.hung
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                if self.connections[rank].poll(0.005):
                    outcome, value = self.connections[rank].recv()
                    waiting.remove(rank)
                    if outcome == "returned":
                        results[rank] = value
                    else:
                        failures[rank] = value
                        deadline = min(deadline, time.monotonic() + GRACE)
        if failures or waiting:
            if waiting:
                self.stop()
            output = "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in failures.items())
            hung = f"\nranks {sorted(waiting)} did not end" if waiting else ""
            pytest.fail(f"{function.__name__}{arguments}:\n{output}{hung}", pytrace=False)
        return results

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


GroupOf = Callable[..., Ranks]


@contextlib.contextmanager
def groups(hung: float = HUNG) -> Iterator[GroupOf]:
    """``group_of(world_size)``: that many processes in one group, started once, and again if they have ended."""
    started: dict[tuple[int, str], Ranks] = {}

    def group_of(world_size: int, accelerator: str = "cpu") -> Ranks:
        key = (world_size, accelerator)
        if key not in started or not started[key].alive:
            started[key] = Ranks(world_size, accelerator, hung)
        return started[key]

    yield group_of
    for group in started.values():
        group.stop()


def _serve(connection: Connection, rank: int, world_size: int, port: int, accelerator: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
    }
    if accelerator == "cuda":  # cuBLAS reads it once, and needs it to be deterministic where a test wants that
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import logging

    import torch
    from deepspeed.runtime.zero.partition_parameters import Init

    from lomo_ds.distributed.process_group import start_process_group

    gc.freeze()  # what is imported is no test's, and need not be looked at again and again
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    start_process_group()
    calls = 0
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        # DeepSpeed numbers parameters as they come, and a function may have failed on one rank sooner than on another
        calls += 1
        Init.param_id = 1_000_000 * calls
        try:
            connection.send(("returned", function(*arguments)))
        except BaseException:
            connection.send(("raised", traceback.format_exc()))
        _end_savers()
        _exclude_leftovers_from_collections()


def _end_savers() -> None:
    """End the process groups of a test that has ended: their threads poll, and DeepSpeed's hooks keep engines alive."""
    from lomo_ds.checkpoint.save import Saver

    for thing in gc.get_objects():
        if type(thing) is Saver and hasattr(thing, "group"):
            with contextlib.suppress(LomoError):  # of a save in the background
                thing.close()


def _exclude_leftovers_from_collections() -> None:
    """Exempt what a test leaves alive from garbage collections, which would look at all of it again and again."""
    gc.collect()
    gc.freeze()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
