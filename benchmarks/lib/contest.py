"""Compares methods that take turns: one steps while the others wait, so that a slow machine slows down all of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.lib import methods
from benchmarks.lib.footprint import TensorTracker, reset_peak
from benchmarks.lib.kernels import kernel_states
from benchmarks.lib.methods import Method
from benchmarks.lib.workers import DOES_NOT_FIT, DoesNotFit, RankState, WorkerError, Workers
from benchmarks.lib.workload import Workload

WARM_UP = 2  # steps; DeepSpeed traces the first and uses the trace from the second on
MIN_ROUNDS = 3
TURN_SECONDS = {"cpu": 0.25, "cuda": 1.0}  # minimum duration of a turn; a turn has at least one step

Row = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """A method that takes part, with its workload.

    Attributes:
        leads: whether the other methods are compared with this one.
    """

    label: str
    method: str
    work: Workload
    leads: bool = False


def build_and_warm_up(state: RankState, method: str, work: Workload) -> None:
    """Build the method and warm it up, on a rank."""
    state["method"] = methods.build(method, work)
    for _ in range(WARM_UP):
        state["method"].step()
    synchronize()


def change_batch(state: RankState, work: Workload) -> None:
    """Make the method train on the micro-batches of another workload from now on, on a rank."""
    state["method"].micro_batches = work.micro_batches(state["method"].device)


def kernels_in_use(state: RankState, int8: bool) -> dict[str, str]:
    """Return the states of the Triton kernels that the method uses, on a rank; see ``kernel_states``."""
    return kernel_states(state["method"].device, int8)


def time_steps(state: RankState, steps: int, untimed: int) -> Row:
    """Time ``steps`` steps after ``untimed`` ones, on a rank; return seconds per step, allocator peak and last loss."""
    reset_peak()
    for _ in range(untimed):
        state["method"].step()
    synchronize()
    if torch.distributed.get_world_size() > 1:  # on one rank, NCCL would allocate buffers for nothing
        torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        loss = state["method"].step()
    synchronize()
    seconds = (time.perf_counter() - start) / steps
    on_gpu = torch.cuda.is_initialized()
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    if on_gpu:
        torch.cuda.empty_cache()  # leave memory to the next method
    return {"seconds": seconds, "peak": peak, "loss": float(loss)}


def tracked_peak(state: RankState) -> int:
    """Return the peak bytes of tensors in a tracked step, on a rank."""
    method: Method = state["method"]
    with TensorTracker(method, method.device) as tensors:
        method.step()
    return tensors.peak


def synchronize() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Contest:
    """Methods that take turns, each in its own processes, which start at once and end with the ``with`` block.

    Args:
        ranks: number of ranks of each method.
        report: callback that receives progress messages.

    Attributes:
        turns: the turns of each method by label.
        outcome: why a method was dropped, by label.
    """

    def __init__(
        self, entrants: list[Entrant], ranks: int, device: str, report: Callable[[str], None] = lambda text: None
    ) -> None:
        self.entrants, self.device, self.report = entrants, device, report
        self.workers = {entrant.label: Workers(ranks, device) for entrant in entrants}
        self.expected: dict[str, float] = {}  # seconds per step, by label
        self.outcome: dict[str, str] = {}
        self.turns: dict[str, list[Row]] = {}
        self.kernels: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *exception: object) -> None:
        for workers in self.workers.values():
            workers.stop()

    def build(self, deadline: float) -> None:
        """Build all methods at the same time; a method that has not answered by ``deadline`` is dropped."""
        self.report("building")
        for entrant in self.entrants:
            self._call_or_drop(entrant.label, partial(_begin_build, entrant))
        for label in list(self.workers):
            self._call_or_drop(label, lambda workers: workers.finish(_until(deadline)))

    def change_batch(self, batch: int, deadline: float) -> None:
        """Change the batch size of all methods."""
        self.entrants = [replace(entrant, work=replace(entrant.work, batch=batch)) for entrant in self.entrants]
        for entrant in self.entrants:
            self._call(entrant.label, deadline, change_batch, entrant.work)

    def compare(
        self, seconds: float, deadline: float, on_round: Callable[[list[Row]], None] = lambda rows: None
    ) -> list[Row]:
        """Compare the methods, and return a row for each entrant in order.

        Args:
            seconds: duration of the rounds; at least ``MIN_ROUNDS`` rounds are taken.
            deadline: in terms of ``time.monotonic``; a method that has not answered by then is dropped.
            on_round: callback that receives the rows so far after every round.
        """
        self.turns = {}
        for label in list(self.workers):
            self.report(f"first step of {label}")
            turns = self._call(label, deadline, time_steps, 1, 1 if self.device == "cuda" else 0)
            if turns is not None:
                slowest = max(turns, key=lambda turn: turn["seconds"])
                self.expected[label], self.turns[label] = slowest["seconds"], [slowest]
                self._record_kernels(label, deadline)
        # if turns have one step, the first step is a whole turn and counts
        if any(self._steps_per_turn(label) > 1 for label in self.workers):
            self.turns = {label: [] for label in self.turns}
        self._rounds(seconds, deadline, on_round)
        peaks = (
            {label: self._tracked_peak(label, deadline) for label in list(self.workers)} if self.device == "cpu" else {}
        )
        return [row | ({"peak": peaks.get(row["label"])} if peaks else {}) for row in self.rows()]

    def rows(self) -> list[Row]:
        """Return a row for each entrant in order, with the results so far."""
        return [self._row(entrant) for entrant in self.entrants]

    def _rounds(self, seconds: float, deadline: float, on_round: Callable[[list[Row]], None]) -> None:
        start, rounds = time.monotonic(), min((len(turns) for turns in self.turns.values()), default=0)
        while self.workers and (rounds < MIN_ROUNDS or time.monotonic() - start < seconds):
            for label in list(self.workers):
                self.report(f"round {rounds + 1}: {label}")
                steps = self._steps_per_turn(label)
                # an untimed step warms the caches, above all the allocator's; a long step warms the CPU's by itself
                untimed = 1 if self.device == "cuda" or steps > 1 else 0
                turns = self._call(label, deadline, time_steps, steps, untimed)
                if turns is not None:
                    slowest = max(turns, key=lambda turn: turn["seconds"])
                    self.turns[label].append(slowest)
                    self.expected[label] = min(self.expected[label], slowest["seconds"])
            rounds += 1
            on_round(self.rows())

    def _steps_per_turn(self, label: str) -> int:
        return max(1, round(TURN_SECONDS[self.device] / self.expected[label]))

    def _record_kernels(self, label: str, deadline: float) -> None:
        method = next(entrant.method for entrant in self.entrants if entrant.label == label)
        if self.device == "cuda" and methods.base_method(method) in methods.LOMO_DS:
            states = self._call(label, deadline, kernels_in_use, methods.uses_int8(method))
            self.kernels[label] = states[0] if states else {}

    def _tracked_peak(self, label: str, deadline: float) -> int | None:
        self.report(f"memory of {label}")
        peaks = self._call(label, deadline, tracked_peak)
        return None if peaks is None else max(peaks)

    def _row(self, entrant: Entrant) -> Row:
        label = entrant.label
        row: Row = {"label": label, "method": entrant.method, "leads": entrant.leads}
        row["workload"] = methods.workload_as_dict(entrant.work)
        turns = self.turns.get(label)
        if not turns:  # a method that was dropped after some rounds counts as measured
            return row | {"outcome": self.outcome.get(label, "no round was finished")}
        seconds = [turn["seconds"] for turn in turns]
        peak = max(turn["peak"] or 0 for turn in turns)
        tokens = entrant.work.tokens / statistics.median(seconds)
        losses = {"first_loss": turns[0]["loss"], "last_loss": turns[-1]["loss"]}
        measured = {"outcome": "measured", "seconds": seconds, "tokens_per_second": tokens, "peak": peak}
        return row | measured | losses | {"kernels": self.kernels.get(label, {})}

    def _call(self, label: str, deadline: float, function: Callable[..., Any], *arguments: Any) -> list[Any] | None:
        """Run a function on the ranks of a method and return their results; drop the method if it fails."""
        return self._call_or_drop(label, lambda workers: workers.call(function, *arguments, timeout=_until(deadline)))

    def _call_or_drop(self, label: str, action: Callable[[Workers], Any]) -> Any:
        """Run ``action`` on the workers of a method and return its result; None if the method fails and is dropped."""
        if label not in self.workers:
            return None
        try:
            return action(self.workers[label])
        except DoesNotFit:
            self.outcome[label] = DOES_NOT_FIT
        except WorkerError as error:
            self.outcome[label] = str(error)
        del self.workers[label]
        return None


def _begin_build(entrant: Entrant, workers: Workers) -> None:
    workers.begin(build_and_warm_up, entrant.method, entrant.work)


def _until(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def ratios(rows: list[Row], goals: dict[tuple[str, str], float]) -> list[Row]:
    """Return the step time of each leading method divided by that of each other method with the same clipping.

    Args:
        goals: upper limits of the ratios, by the pair of methods.
    """
    measured = [row for row in rows if row["outcome"] == "measured"]
    return [
        _ratio(own, other, goals.get((own["method"], other["method"])))
        for own in measured
        for other in measured
        if own["leads"] and not other["leads"] and methods.clips(own["method"]) == methods.clips(other["method"])
    ]


def _ratio(own: Row, other: Row, goal: float | None) -> Row:
    ratio_per_round = [one / two for one, two in zip(own["seconds"], other["seconds"], strict=False)]
    median = statistics.median(ratio_per_round)
    return {
        "ours": own["label"],
        "other": other["label"],
        "median": median,
        "lowest": min(ratio_per_round),
        "highest": max(ratio_per_round),
        "goal": goal,
        "met": None if goal is None else median <= goal,
        "memory": own["peak"] / other["peak"] if own["peak"] and other["peak"] else None,
    }
