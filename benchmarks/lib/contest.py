"""Methods taking turns: one steps while the others wait, so that what slows the machine down slows down all of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.lib import methods
from benchmarks.lib.footprint import Tensors, forget_peak
from benchmarks.lib.kernels import kernels_of
from benchmarks.lib.methods import Method
from benchmarks.lib.workers import DOES_NOT_FIT, Desk, DoesNotFit, WorkerError, Workers
from benchmarks.lib.workload import Workload

WARM_UP = 2  # steps; DeepSpeed traces the first, and goes by its trace from the second on
LEAST_ROUNDS = 3
TURN_SECONDS = {"cpu": 0.25, "cuda": 1.0}  # that a turn takes at least, if one step does not

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


def enter(desk: Desk, method: str, work: Workload) -> None:
    """On a rank: build the method and warm it up."""
    desk["method"] = methods.build(method, work)
    for _ in range(WARM_UP):
        desk["method"].step()
    synchronize()


def change_batch(desk: Desk, work: Workload) -> None:
    """On a rank: let the method that was built train on the batch of another workload from here on."""
    desk["method"].batch = work.rows(desk["method"].device)


def kernels_in_use(desk: Desk, int8: bool) -> dict[str, str]:
    """On a rank: which Triton kernels its method trains with; see ``kernels_of``."""
    return kernels_of(desk["method"].device, int8)


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
    """Methods taking turns, each in processes of its own, which are started at once and ended by ``with``.

    Args:
        ranks: of each method.
        told: is called with what is happening.

    Attributes:
        turns: of each method that is still in, by its label.
        outcome: of each that is out.
    """

    def __init__(
        self, entrants: list[Entrant], ranks: int, device: str, told: Callable[[str], None] = lambda text: None
    ) -> None:
        self.entrants, self.device, self.told = entrants, device, told
        self.workers = {entrant.label: Workers(ranks, device) for entrant in entrants}
        self.expected: dict[str, float] = {}  # seconds of a step, by label
        self.outcome: dict[str, str] = {}
        self.turns: dict[str, list[Row]] = {}
        self.kernels: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *exception: object) -> None:
        for workers in self.workers.values():
            workers.stop()

    def build(self, deadline: float) -> None:
        """Build every method, all at the same time; who has not answered by ``deadline`` is out."""
        self.told("building")
        for entrant in self.entrants:
            self._guard(entrant.label, partial(_begin_to_enter, entrant))
        for label in list(self.workers):
            self._guard(label, lambda workers: workers.finish(_until(deadline)))

    def change_batch(self, batch: int, deadline: float) -> None:
        """Go on with ``batch`` rows in a step."""
        self.entrants = [replace(entrant, work=replace(entrant.work, batch=batch)) for entrant in self.entrants]
        for entrant in self.entrants:
            self._ask(entrant.label, deadline, change_batch, entrant.work)

    def compare(
        self, seconds: float, deadline: float, on_round: Callable[[list[Row]], None] = lambda rows: None
    ) -> list[Row]:
        """What came out, in the order of the entrants.

        Args:
            seconds: that the rounds may take.
            deadline: of ``time.monotonic``; who has not answered by then is out.
            on_round: is called with what came out so far, after every round.
        """
        self.turns = {}
        for label in list(self.workers):
            self.told(f"first step of {label}")
            found = self._ask(label, deadline, take_turn, 1, 1 if self.device == "cuda" else 0)
            if found is not None:
                slowest = max(found, key=lambda turn: turn["seconds"])
                self.expected[label], self.turns[label] = slowest["seconds"], [slowest]
                self._look_for_kernels(label, deadline)
        # that step is a whole turn, and counts, where turns have one step
        if any(self._steps_of_a_turn(label) > 1 for label in self.workers):
            self.turns = {label: [] for label in self.turns}
        self._rounds(seconds, deadline, on_round)
        peaks = {label: self._follow(label, deadline) for label in list(self.workers)} if self.device == "cpu" else {}
        return [row | ({"peak": peaks.get(row["label"])} if peaks else {}) for row in self.rows()]

    def rows(self) -> list[Row]:
        """What came out so far, in the order of the entrants."""
        return [self._row(entrant) for entrant in self.entrants]

    def _rounds(self, seconds: float, deadline: float, on_round: Callable[[list[Row]], None]) -> None:
        start, rounds = time.monotonic(), min((len(turns) for turns in self.turns.values()), default=0)
        while self.workers and (rounds < LEAST_ROUNDS or time.monotonic() - start < seconds):
            for label in list(self.workers):
                self.told(f"round {rounds + 1}: {label}")
                steps = self._steps_of_a_turn(label)
                # with caches filled anew, the allocator's above all; a long step fills the processor's by itself
                untimed = 1 if self.device == "cuda" or steps > 1 else 0
                found = self._ask(label, deadline, take_turn, steps, untimed)
                if found is not None:
                    slowest = max(found, key=lambda turn: turn["seconds"])
                    self.turns[label].append(slowest)
                    self.expected[label] = min(self.expected[label], slowest["seconds"])
            rounds += 1
            on_round(self.rows())

    def _steps_of_a_turn(self, label: str) -> int:
        return max(1, round(TURN_SECONDS[self.device] / self.expected[label]))

    def _look_for_kernels(self, label: str, deadline: float) -> None:
        method = next(entrant.method for entrant in self.entrants if entrant.label == label)
        if self.device == "cuda" and methods.base_of(method) in methods.OURS:
            found = self._ask(label, deadline, kernels_in_use, methods.in_eight_bits(method))
            self.kernels[label] = found[0] if found else {}

    def _follow(self, label: str, deadline: float) -> int | None:
        self.told(f"memory of {label}")
        peaks = self._ask(label, deadline, follow)
        return None if peaks is None else max(peaks)

    def _row(self, entrant: Entrant) -> Row:
        label = entrant.label
        row: Row = {"label": label, "method": entrant.method, "leads": entrant.leads}
        row["workload"] = methods.settings(entrant.work)
        turns = self.turns.get(label)
        if not turns:  # who was out after some rounds has been measured in these
            return row | {"outcome": self.outcome.get(label, "no round was finished")}
        seconds = [turn["seconds"] for turn in turns]
        peak = max(turn["peak"] or 0 for turn in turns)
        tokens = entrant.work.tokens / statistics.median(seconds)
        losses = {"first_loss": turns[0]["loss"], "last_loss": turns[-1]["loss"]}
        measured = {"outcome": "measured", "seconds": seconds, "tokens_per_second": tokens, "peak": peak}
        return row | measured | losses | {"kernels": self.kernels.get(label, {})}

    def _ask(self, label: str, deadline: float, function: Callable[..., Any], *arguments: Any) -> list[Any] | None:
        """What the ranks of a method answer; None, and it is out, where they cannot."""
        return self._guard(label, lambda workers: workers.call(function, *arguments, timeout=_until(deadline)))

    def _guard(self, label: str, action: Callable[[Workers], Any]) -> Any:
        """What ``action`` returns for a method that is still in; None, and the method is out, where it fails."""
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


def _begin_to_enter(entrant: Entrant, workers: Workers) -> None:
    workers.begin(enter, entrant.method, entrant.work)


def _until(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


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
