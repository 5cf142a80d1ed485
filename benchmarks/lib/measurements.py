"""What a row of ``gpu.py`` measures, in its own process: each kind prepares without the GPU, and then measures.

``prepare`` imports, plans and starts further processes while another row may still be measured. What it returns then
measures within some seconds, and hands every part of the results to ``emit`` as soon as it is known. A part has a
``name``, without which it is about the whole row, and of these fields those that it can have: ``step_seconds``,
``tokens_per_second``, ``peak`` (bytes of the allocator), ``planned_seconds``, ``planned_peak``, ``at_most`` and
``papers`` (GiB), ``share``, ``remarks``, ``ratio``.
"""

import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from benchmarks.lib import methods
from benchmarks.lib.contest import Contest, Entrant, ratios
from benchmarks.lib.workers import PRELOAD, free_port, get_ready, set_environment
from benchmarks.lib.workload import TINY, Workload

# Whatever imports deepspeed is imported in ``prepare``: deepspeed chooses its accelerator then.

GIB = 2**30
SLACK = 3.0  # seconds between the last answer of a rank and the end of a row
Part = dict[str, Any]
Emit = Callable[[Part], None]
Measure = Callable[[float, Emit], None]


class Measurement(Protocol):
    """One kind of row."""

    def prepare(self, device: str) -> Measure:
        """Get ready for ``cpu`` or ``cuda``; what to call with the seconds there are, and where parts go."""
        ...

    def toy(self) -> "Measurement":
        """The same at a size for trying it on the CPU."""
        ...


def tiny_of(work: Workload) -> Workload:
    """The workload at a size for trying it on the CPU."""
    return replace(work, model=TINY, sequence=16, batch=1, precision="fp32", lomo={}, tiled_logits=False)


def title_of(method: str, work: Workload, world: int = 1) -> str:
    """What is measured, in a few words."""
    tiled = ", tiled logits" if work.tiled_logits and methods.base_of(method) in methods.OURS else ""
    ranks = f", rank 0 of {world}" if world > 1 else ""
    return f"{work.model}, {work.batch} x {work.sequence}{ranks}: {method}{tiled}"


@dataclass(frozen=True)
class Peak:
    """The memory of a step.

    Attributes:
        world: where it is not 1, rank 0 of so many is simulated, whose times mean nothing.
        at_most: GiB that the peak is to keep to.
        papers: GiB that the paper reports.
        card: GiB of the card that is imitated: settings and the allocator's limit are those of one of this size.
    """

    method: str
    work: Workload
    world: int = 1
    at_most: float | None = None
    papers: float | None = None
    card: int | None = None

    def toy(self) -> "Peak":
        """See ``Measurement.toy``."""
        return replace(self, work=tiny_of(self.work), card=None)

    def prepare(self, device: str) -> Measure:
        """See ``Measurement.prepare``."""
        simulate_world = self.world if self.world > 1 else None
        work = prepared_rank(device, simulate_world, self.method, self.work, self.world, self.card)
        name = title_of(self.method, work, self.world)

        def measure(seconds: float, emit: Emit) -> None:
            from benchmarks.lib.footprint import follow_step, take_steps

            get_ready(device, simulate_world)
            limit_memory(device, self.card)
            figures = planned_figures(self.method, work, self.world, machine_here(device))
            compared = {"at_most": self.at_most, "papers": self.papers, "workload": methods.settings(work)}
            if simulate_world:
                figures.pop("planned_seconds", None)
            emit({"name": name, **figures, **compared})
            built = methods.build(self.method, work)
            found = take_steps(built)
            times = {} if simulate_world else times_of(work, found["seconds"])
            kernels = kernels_here(built.device, self.method)
            emit({"name": name, **found, **times, **kernels})
            emit({"name": name, **follow_step(built, found)})

        return measure


@dataclass(frozen=True)
class Group:
    """Methods that take turns on one workload, first with its batch and then with each of ``batches``.

    Attributes:
        until: share of the row's time by which it must have ended.
    """

    entrants: tuple[Entrant, ...]
    batches: tuple[int, ...] = ()
    until: float = 1.0

    def toy(self) -> "Group":
        """See ``Measurement.toy``."""
        return replace(self, entrants=tuple(replace(entrant, work=tiny_of(entrant.work)) for entrant in self.entrants))


@dataclass(frozen=True)
class TakingTurns:
    """The throughput of methods that take turns, a process for each.

    Attributes:
        rounds_seconds: that the rounds with one batch may take; a few rounds are taken in any case.
    """

    groups: tuple[Group, ...]
    rounds_seconds: float = 8.0

    def toy(self) -> "TakingTurns":
        """See ``Measurement.toy``."""
        return TakingTurns(tuple(group.toy() for group in self.groups), rounds_seconds=0.0)

    def prepare(self, device: str) -> Measure:
        """See ``Measurement.prepare``."""
        os.environ["DS_ACCELERATOR"] = device
        contests = []
        for group in self.groups:
            able = [entrant for entrant in group.entrants if methods.objection(entrant.method, 1) is None]
            contests.append(Contest(able, 1, device))
        for entrant in (entrant for group in self.groups for entrant in group.entrants):
            planned_figures(entrant.method, entrant.work, 1, machine_of_nothing(device))

        def measure(seconds: float, emit: Emit) -> None:
            start, machine = time.monotonic(), machine_here(device)
            for group, contest in zip(self.groups, contests, strict=True):
                for entrant in group.entrants:
                    if (objection := methods.objection(entrant.method, 1)) is not None:
                        emit({"name": title_of(entrant.label, entrant.work), "outcome": f"left out: {objection}"})
                with contest:
                    self._compare(contest, group, device, machine, start + (seconds - SLACK) * group.until, emit)

        return measure

    def _compare(self, contest: Contest, group: Group, device: str, machine: Any, deadline: float, emit: Emit) -> None:
        """Let the methods of a group take turns; those that have not answered by ``deadline`` are out."""

        def emit_rows(rows: list[Part]) -> None:
            _emit_rows(rows, contest, device, machine, emit)

        contest.build(deadline)
        emit_rows(contest.compare(self.rounds_seconds, deadline, emit_rows))
        for batch in group.batches:
            contest.change_batch(batch, deadline)
            emit_rows(contest.compare(self.rounds_seconds, deadline, emit_rows))


def _emit_rows(rows: list[Part], contest: Contest, device: str, machine: Any, emit: Emit) -> None:
    from benchmarks.lib.kernels import fallbacks
    from benchmarks.throughput import GOALS

    for row, entrant in zip(rows, contest.entrants, strict=True):
        planned = planned_figures(entrant.method, entrant.work, 1, machine)
        measured = {}
        if row["outcome"] == "measured":
            measured = {
                "step_seconds": statistics.median(row["seconds"]),
                "remarks": fallbacks(row["kernels"]),
            }
        emit({**row, "name": title_of(entrant.label, entrant.work), **planned, **measured})
    suffix = f"{contest.entrants[0].work.model}, {contest.entrants[0].work.batch} rows" if contest.entrants else ""
    for ratio in ratios(rows, GOALS[device, False]):
        emit({"name": f"{suffix}: {ratio['ours']} / {ratio['other']}", "ratio": ratio})


@dataclass(frozen=True)
class Updates:
    """The update kernels, their share of a copy's bandwidth; on the CPU the same in PyTorch's own operations."""

    elements: tuple[int, ...] = (4096 * 4096, 11008 * 4096, 32000 * 4096)
    kinds: tuple[str, ...] = ("bf16 nearest", "bf16 stochastic", "int8 nearest", "int8 stochastic")
    repetitions: int = 10

    def toy(self) -> "Updates":
        """See ``Measurement.toy``."""
        return replace(self, elements=(2**14,), repetitions=2)

    def prepare(self, device: str) -> Measure:
        """See ``Measurement.prepare``."""
        os.environ["DS_ACCELERATOR"] = device
        importlib.import_module("benchmarks.update")

        def measure(seconds: float, emit: Emit) -> None:
            from benchmarks import update
            from benchmarks.lib.kernels import fallbacks, kernels_of

            where = torch.device(device)
            way = update.TRITON if device == "cuda" else update.EAGER
            remarks = fallbacks(kernels_of(where, int8=True))
            for kind in (kind for kind in update.KINDS if kind.name in self.kinds):
                for elements in self.elements:
                    updates = {way: update.update_of(way, kind, where)}
                    (row,) = update.measure(kind, elements, updates, where, self.repetitions)
                    name = f"update of {elements:,} elements, {kind.name}"
                    figures = {"step_seconds": row["seconds"], "share": row["share_of_copy"], "remarks": remarks}
                    emit({**row, "name": name, **figures, "share_of": "a copy"})

        return measure


@dataclass(frozen=True)
class HostMemory:
    """Parameters in host memory, on a card of ``card`` GiB, with one batch after another."""

    work: Workload
    batches: tuple[int, ...]
    method: str = "immediate"
    card: int | None = 24
    steps: int = 3

    def toy(self) -> "HostMemory":
        """See ``Measurement.toy``."""
        return replace(self, work=tiny_of(self.work), batches=(1,), card=None, steps=1)

    def prepare(self, device: str) -> Measure:
        """See ``Measurement.prepare``."""
        from benchmarks.offload import OFFLOAD

        work = replace(self.work, zero=OFFLOAD | self.work.zero)
        work = prepared_rank(device, None, self.method, work, 1, self.card)

        def measure(seconds: float, emit: Emit) -> None:
            from benchmarks import offload

            get_ready(device, None)
            limit_memory(device, self.card)
            desk: dict[str, Any] = {}
            link = offload.measure_link(desk)
            emit({"link": link})
            machine = machine_here(device, pcie=link["each of both"])
            host = offload.build(desk, self.method, work)
            for batch in self.batches:
                of_batch = replace(work, batch=batch)
                name = f"{title_of(self.method, of_batch)}, in host memory"
                emit({"name": name, **planned_figures(self.method, of_batch, 1, machine)})
                found = offload.measure(desk, of_batch, self.steps)
                row = {"batch": batch, "workload": methods.settings(of_batch), "link": link, "host": host, **found}
                kernels = kernels_here(desk["built"].device, self.method)
                share = {"share": offload.share_of_link(row), "share_of": "the link"}
                times = times_of(of_batch, found["seconds"])
                emit({**row, "name": name, **times, **share, **kernels, "peak": found["peak_allocated"]})

        return measure


def prepared_rank(
    device: str, simulate_world: int | None, method: str, work: Workload, world: int, card: int | None
) -> Workload:
    """Make this process rank 0, and plan its workload, whose settings are then those of a card of ``card`` GiB."""
    set_environment(0, 1, device, simulate_world)
    os.environ["MASTER_PORT"] = str(free_port())
    for module in [*PRELOAD, "lomo_ds.planner", "benchmarks.lib.footprint"]:
        importlib.import_module(module)
    from benchmarks.lib.planned import pinned_to_card

    if card is not None:
        work = pinned_to_card(method, work, world, card * GIB)
    planned_figures(method, work, world, machine_of_nothing(device))  # rehearsals take seconds, and are kept
    return work


def limit_memory(device: str, card: int | None) -> None:
    """Let torch's allocator have no more than a card of ``card`` GiB."""
    from benchmarks.lib.footprint import limit_allocator

    if device == "cuda" and card is not None:
        limit_allocator(card)


def machine_of_nothing(device: str) -> Any:
    """A machine to plan for before the GPU may be asked."""
    from benchmarks.lib.planned import machine_of

    return machine_of(device)


def machine_here(device: str, **known: Any) -> Any:
    """The machine to plan for: this GPU's arithmetic, and what else is known of it."""
    from benchmarks.lib.planned import machine_of
    from benchmarks.throughput import PEAK_TFLOPS, known_gpu
    from lomo_ds.planner import detect_machine

    if device != "cuda":
        return machine_of(device)
    gpu, here = known_gpu(torch.cuda.get_device_name()), detect_machine(1)
    flops = PEAK_TFLOPS[gpu] * 1e12 if gpu is not None else here.flops
    return machine_of(device, flops=flops, workspace=here.workspace, **known)


def planned_figures(method: str, work: Workload, world: int, machine: Any) -> Part:
    """``planned_peak`` and, on a GPU, ``planned_seconds``; neither where nothing can be planned."""
    from benchmarks.lib.planned import bytes_of_tensors, plan_of

    found = plan_of(method, work, world, machine)
    if found is None:
        return {}
    peak = {"planned_peak": bytes_of_tensors(found)}
    return peak | ({"planned_seconds": found.time.total} if machine.device == "gpu" else {})


def times_of(work: Workload, seconds: float) -> Part:
    """Of a step on one rank."""
    return {"step_seconds": seconds, "tokens_per_second": work.tokens / seconds}


def kernels_here(device: torch.device, method: str) -> Part:
    """Which Triton kernels are in use, and a remark on each that is not."""
    from benchmarks.lib.kernels import fallbacks, kernels_of

    kernels = kernels_of(device, methods.in_eight_bits(method)) if methods.base_of(method) in methods.OURS else {}
    return {"kernels": kernels, "remarks": fallbacks(kernels)}
