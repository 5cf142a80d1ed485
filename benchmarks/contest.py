"""Methods taking turns: one steps while the others wait, so that what slows the machine down slows down all of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import methods
from benchmarks.footprint import Tensors, forget_peak
from benchmarks.memory import DOES_NOT_FIT
from benchmarks.methods import Method
from benchmarks.workers import Desk, DoesNotFit, WorkerError, Workers
from benchmarks.workload import Workload

WARM_UP = 3  # steps; DeepSpeed traces the first ones
LEAST_ROUNDS = 3
TURN_SECONDS = 0.25  # that a turn takes at least, if one step does not

Row = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """A method in the running, on a workload of its own.

    Attributes:
        leads: whether it is one of those that the others are compared with.
    """

    label: str
    method: str
    work: Workload
    leads: bool = False


def enter(desk: Desk, method: str, work: Workload) -> float:
    """On a rank: build the method and warm it up; seconds that a step takes."""
    desk["method"] = methods.build(method, work)
    for _ in range(WARM_UP - 1):
        desk["method"].step()
    return take_turn(desk, 1, 0)["seconds"]


def take_turn(desk: Desk, steps: int, untimed: int) -> Row:
    """On a rank: seconds per step over ``steps``, after ``untimed`` ones; the allocator's peak; the last loss."""
    forget_peak()
    for _ in range(untimed):
        desk["method"].step()
    synchronize()
    if torch.distributed.get_world_size() > 1:  # else NCCL would set up what one rank has no use for
        torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        loss = desk["method"].step()
    synchronize()
    seconds = (time.perf_counter() - start) / steps
    on_gpu = torch.cuda.is_initialized()
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    if on_gpu:
        torch.cuda.empty_cache()  # the next one needs room
    return {"seconds": seconds, "peak": peak, "loss": float(loss)}


def follow(desk: Desk) -> int:
    """On a rank: the most bytes of tensors alive at once in a step."""
    method: Method = desk["method"]
    with Tensors(method, method.device) as tensors:
        method.step()
    return tensors.peak


def synchronize() -> None:
    """Wait for the GPU, if there is one at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Contest:
    """Methods of one row taking turns.

    Args:
        ranks: of each method.
        seconds: that the rounds may take.
        timeout: seconds that all of it may take; who has not answered then is out.
        told: is called with what is happening.
    """

    def __init__(
        self, ranks: int, device: str, seconds: float, timeout: float, told: Callable[[str], None] = lambda text: None
    ) -> None:
        self.ranks, self.device = ranks, device
        self.seconds, self.told = seconds, told
        self.deadline = time.monotonic() + timeout
        self.workers: dict[str, Workers] = {}
        self.expected: dict[str, float] = {}  # seconds of a step, by label
        self.outcome: dict[str, str] = {}  # of those that are out
        self.turns: dict[str, list[Row]] = {}

    def run(self, entrants: list[Entrant]) -> list[Row]:
        """What came out, in the order of ``entrants``."""
        try:
            self.workers = {entrant.label: Workers(self.ranks, self.device) for entrant in entrants}
            for entrant in entrants:
                self.told(f"building {entrant.label}")
                found = self._ask(entrant.label, enter, entrant.method, entrant.work)
                if found is not None:
                    self.expected[entrant.label], self.turns[entrant.label] = max(found), []
            self._rounds()
            return [self._row(entrant) for entrant in entrants]
        finally:
            for workers in self.workers.values():
                workers.stop()

    def _rounds(self) -> None:
        start, rounds = time.monotonic(), 0
        while self.workers and (rounds < LEAST_ROUNDS or time.monotonic() - start < self.seconds):
            for label in list(self.workers):
                self.told(f"round {rounds + 1}: {label}")
                steps = max(1, round(TURN_SECONDS / self.expected[label]))
                # with caches filled anew, the allocator's above all; a long step fills the processor's by itself
                untimed = 1 if self.device == "cuda" or steps > 1 else 0
                found = self._ask(label, take_turn, steps, untimed)
                if found is not None:
                    slowest = max(found, key=lambda turn: turn["seconds"])
                    self.turns[label].append(slowest)
                    self.expected[label] = min(self.expected[label], slowest["seconds"])
            rounds += 1

    def _row(self, entrant: Entrant) -> Row:
        label = entrant.label
        row: Row = {"label": label, "method": entrant.method, "leads": entrant.leads}
        row["workload"] = methods.settings(entrant.work)
        if label in self.outcome:
            return row | {"outcome": self.outcome[label]}
        turns = self.turns[label]
        peak: Any = max(turn["peak"] or 0 for turn in turns)
        if self.device == "cpu":
            self.told(f"memory of {label}")
            peaks = self._ask(label, follow)
            peak = None if peaks is None else max(peaks)
        seconds = [turn["seconds"] for turn in turns]
        tokens = entrant.work.tokens / statistics.median(seconds)
        losses = {"first_loss": turns[0]["loss"], "last_loss": turns[-1]["loss"]}
        return row | {"outcome": "measured", "seconds": seconds, "tokens_per_second": tokens, "peak": peak, **losses}

    def _ask(self, label: str, function: Callable[..., Any], *arguments: Any) -> list[Any] | None:
        """What the ranks of a method answer; None, and it is out, where they cannot."""
        try:
            seconds = max(1.0, self.deadline - time.monotonic())
            return self.workers[label].call(function, *arguments, timeout=seconds)
        except DoesNotFit:
            self.outcome[label] = DOES_NOT_FIT
        except WorkerError as error:
            self.outcome[label] = str(error)
        del self.workers[label]
        return None


def ratios(rows: list[Row], goals: dict[tuple[str, str], float]) -> list[Row]:
    """The step of each method that leads over that of each other one that clips as it does.

    Args:
        goals: the most that a ratio is to be, by the two methods.
    """
    measured = [row for row in rows if row["outcome"] == "measured"]
    return [
        _ratio(ours, other, goals.get((ours["method"], other["method"])))
        for ours in measured
        for other in measured
        if ours["leads"] and not other["leads"] and methods.clips(ours["method"]) == methods.clips(other["method"])
    ]


def _ratio(ours: Row, other: Row, goal: float | None) -> Row:
    of_rounds = [one / two for one, two in zip(ours["seconds"], other["seconds"], strict=False)]
    median = statistics.median(of_rounds)
    return {
        "ours": ours["label"],
        "other": other["label"],
        "median": median,
        "lowest": min(of_rounds),
        "highest": max(of_rounds),
        "goal": goal,
        "met": None if goal is None else median <= goal,
        "memory": ours["peak"] / other["peak"] if ours["peak"] and other["peak"] else None,
    }
