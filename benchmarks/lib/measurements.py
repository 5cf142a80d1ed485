"""The kinds of measurements that rows of ``gpu.py`` make, each in its own process.

``prepare`` imports, plans and starts further processes without the GPU, while another row may still be measured. The
function that it returns measures within a number of seconds, and passes every part of the results to ``emit`` at once.
A part without a ``name`` describes the whole row. A part may have these fields: ``step_seconds``,
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
from benchmarks.lib.workers import PRELOAD, free_port, set_environment, start_rank
from benchmarks.lib.workload import TINY, Workload

# Modules that import deepspeed are imported in ``prepare``: deepspeed chooses its accelerator at import.

GIB = 2**30
SLACK = 3.0  # seconds from the last answer of a rank to the end of a row
Part = dict[str, Any]
Emit = Callable[[Part], None]
Measure = Callable[[float, Emit], None]


class Measurement(Protocol):
    """One kind of measurement."""

    def prepare(self, device: str) -> Measure:
        """Prepare for ``cpu`` or ``cuda``; return a function of the time limit in seconds and of ``emit``."""
        ...

    def toy(self) -> "Measurement":
        """Return the same measurement with a tiny model, for trying it out on the CPU."""
        ...


def tiny_workload(work: Workload) -> Workload:
    """Return the workload with a tiny model, for trying it out on the CPU."""
    return replace(work, model=TINY, sequence=16, batch=1, precision="fp32", lomo={}, tiled_logits=False)


def title_of(method: str, work: Workload, world: int = 1) -> str:
    """Return a short title of a measurement."""
    tiled = ", tiled logits" if work.tiled_logits and methods.base_method(method) in methods.LOMO_DS else ""
    ranks = f", rank 0 of {world}" if world > 1 else ""
    return f"{work.model}, {work.batch} x {work.sequence}{ranks}: {method}{tiled}"


@dataclass(frozen=True)
class PeakMemory:
    """The peak memory of a step.

    Attributes:
        world: world size; if it is not 1, rank 0 is simulated, and times mean nothing.
        at_most: upper limit for the peak, GiB.
        papers: peak that the paper reports, GiB.
        card: memory of the GPU to imitate, GiB: it determines the settings and the allocator's limit.
    """

    method: str
    work: Workload
    world: int = 1
    at_most: float | None = None
    papers: float | None = None
    card: int | None = None

    def toy(self) -> "PeakMemory":
        """Implement ``Measurement.toy``."""
        return replace(self, work=tiny_workload(self.work), card=None)

    def prepare(self, device: str) -> Measure:
        """Implement ``Measurement.prepare``."""
        simulate_world = self.world if self.world > 1 else None
        work = prepare_rank(device, simulate_world, self.method, self.work, self.world, self.card)
        name = title_of(self.method, work, self.world)

        def measure(seconds: float, emit: Emit) -> None:
            from benchmarks.lib.footprint import take_steps, track_step

            start_rank(device, simulate_world)
            limit_memory(device, self.card)
            figures = planned_figures(self.method, work, self.world, current_machine(device))
            limits = {"at_most": self.at_most, "papers": self.papers, "workload": methods.workload_as_dict(work)}
            if simulate_world:
                figures.pop("planned_seconds", None)
            emit({"name": name, **figures, **limits})
            built = methods.build(self.method, work)
            measured = take_steps(built)
            times = {} if simulate_world else step_times(work, measured["seconds"])
            kernels = kernel_status(built.device, self.method)
            emit({"name": name, **measured, **times, **kernels})
            emit({"name": name, **track_step(built, measured)})

        return measure


@dataclass(frozen=True)
class Group:
    """Methods that take turns on one workload, first with its own batch size and then with each of ``batches``.

    Attributes:
        until: fraction of the row's time limit after which the group must have ended.
    """

    entrants: tuple[Entrant, ...]
    batches: tuple[int, ...] = ()
    until: float = 1.0

    def toy(self) -> "Group":
        """Implement ``Measurement.toy``."""
        return replace(
            self, entrants=tuple(replace(entrant, work=tiny_workload(entrant.work)) for entrant in self.entrants)
        )


@dataclass(frozen=True)
class Throughput:
    """The throughput of methods that take turns, each in its own process.

    Attributes:
        rounds_seconds: duration of the rounds with one batch size; a few rounds are taken in any case.
    """

    groups: tuple[Group, ...]
    rounds_seconds: float = 8.0

    def toy(self) -> "Throughput":
        """Implement ``Measurement.toy``."""
        return Throughput(tuple(group.toy() for group in self.groups), rounds_seconds=0.0)

    def prepare(self, device: str) -> Measure:
        """Implement ``Measurement.prepare``."""
        os.environ["DS_ACCELERATOR"] = device
        contests = []
        for group in self.groups:
            available = [entrant for entrant in group.entrants if methods.unavailability(entrant.method, 1) is None]
            contests.append(Contest(available, 1, device))
        for entrant in (entrant for group in self.groups for entrant in group.entrants):
            planned_figures(entrant.method, entrant.work, 1, machine_without_gpu(device))

        def measure(seconds: float, emit: Emit) -> None:
            start, machine = time.monotonic(), current_machine(device)
            for group, contest in zip(self.groups, contests, strict=True):
                for entrant in group.entrants:
                    if (reason := methods.unavailability(entrant.method, 1)) is not None:
                        emit({"name": title_of(entrant.label, entrant.work), "outcome": f"left out: {reason}"})
                with contest:
                    self._compare(contest, group, device, machine, start + (seconds - SLACK) * group.until, emit)

        return measure

    def _compare(self, contest: Contest, group: Group, device: str, machine: Any, deadline: float, emit: Emit) -> None:
        """Compare the methods of a group; a method that has not answered by ``deadline`` is dropped."""

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
class UpdateKernels:
    """The update kernels' bandwidth as a share of a copy's; on the CPU, that of updates in PyTorch operations."""

    elements: tuple[int, ...] = (4096 * 4096, 11008 * 4096, 32000 * 4096)
    kinds: tuple[str, ...] = ("bf16 nearest", "bf16 stochastic", "int8 nearest", "int8 stochastic")
    repetitions: int = 10

    def toy(self) -> "UpdateKernels":
        """Implement ``Measurement.toy``."""
        return replace(self, elements=(2**14,), repetitions=2)

    def prepare(self, device: str) -> Measure:
        """Implement ``Measurement.prepare``."""
        os.environ["DS_ACCELERATOR"] = device
        importlib.import_module("benchmarks.update")

        def measure(seconds: float, emit: Emit) -> None:
            from benchmarks import update
            from benchmarks.lib.kernels import fallbacks, kernel_states

            torch_device = torch.device(device)
            way = update.TRITON if device == "cuda" else update.EAGER
            remarks = fallbacks(kernel_states(torch_device, int8=True))
            for kind in (kind for kind in update.KINDS if kind.name in self.kinds):
                for elements in self.elements:
                    updates = {way: update.update_of(way, kind, torch_device)}
                    (row,) = update.measure(kind, elements, updates, torch_device, self.repetitions)
                    name = f"update of {elements:,} elements, {kind.name}"
                    figures = {"step_seconds": row["seconds"], "share": row["share_of_copy"], "remarks": remarks}
                    emit({**row, "name": name, **figures, "share_of": "a copy"})

        return measure


@dataclass(frozen=True)
class OffloadedParams:
    """Training with parameters in host memory on a GPU of ``card`` GiB, with several batch sizes in turn."""

    work: Workload
    batches: tuple[int, ...]
    method: str = "immediate"
    card: int | None = 24
    steps: int = 3

    def toy(self) -> "OffloadedParams":
        """Implement ``Measurement.toy``."""
        return replace(self, work=tiny_workload(self.work), batches=(1,), card=None, steps=1)

    def prepare(self, device: str) -> Measure:
        """Implement ``Measurement.prepare``."""
        from benchmarks.offload import OFFLOAD

        work = replace(self.work, zero=OFFLOAD | self.work.zero)
        work = prepare_rank(device, None, self.method, work, 1, self.card)

        def measure(seconds: float, emit: Emit) -> None:
            from benchmarks import offload

            start_rank(device, None)
            limit_memory(device, self.card)
            state: dict[str, Any] = {}
            link = offload.measure_link(state)
            emit({"link": link})
            machine = current_machine(device, pcie=link["each of both"])
            host = offload.build(state, self.method, work)
            for batch in self.batches:
                work_of_batch = replace(work, batch=batch)
                name = f"{title_of(self.method, work_of_batch)}, in host memory"
                emit({"name": name, **planned_figures(self.method, work_of_batch, 1, machine)})
                measured = offload.measure(state, work_of_batch, self.steps)
                row = {
                    "batch": batch,
                    "workload": methods.workload_as_dict(work_of_batch),
                    "link": link,
                    "host": host,
                    **measured,
                }
                kernels = kernel_status(state["built"].device, self.method)
                share = {"share": offload.share_of_link(row), "share_of": "the link"}
                times = step_times(work_of_batch, measured["seconds"])
                emit({**row, "name": name, **times, **share, **kernels, "peak": measured["peak_allocated"]})

        return measure


def prepare_rank(
    device: str, simulate_world: int | None, method: str, work: Workload, world: int, card: int | None
) -> Workload:
    """Make this process rank 0, and return its workload with the settings of a GPU of ``card`` GiB."""
    set_environment(0, 1, device, simulate_world)
    os.environ["MASTER_PORT"] = str(free_port())
    for module in [*PRELOAD, "lomo_ds.planner", "benchmarks.lib.footprint"]:
        importlib.import_module(module)
    from benchmarks.lib.planned import with_granularity_of_card

    if card is not None:
        work = with_granularity_of_card(method, work, world, card * GIB)
    planned_figures(
        method, work, world, machine_without_gpu(device)
    )  # tracing a step takes seconds; the trace is cached
    return work


def limit_memory(device: str, card: int | None) -> None:
    """Limit torch's allocator to the memory of a GPU of ``card`` GiB."""
    from benchmarks.lib.footprint import limit_allocator

    if device == "cuda" and card is not None:
        limit_allocator(card)


def machine_without_gpu(device: str) -> Any:
    """Return a machine to plan for before the GPU may be used."""
    from benchmarks.lib.planned import ample_machine

    return ample_machine(device)


def current_machine(device: str, **fields: Any) -> Any:
    """Return the machine to plan for: this GPU's arithmetic, with ``fields`` of ``Machine`` that were measured."""
    from benchmarks.lib.planned import ample_machine
    from benchmarks.throughput import PEAK_TFLOPS, known_gpu
    from lomo_ds.planner import detect_machine

    if device != "cuda":
        return ample_machine(device)
    gpu, machine = known_gpu(torch.cuda.get_device_name()), detect_machine(1)
    flops = PEAK_TFLOPS[gpu] * 1e12 if gpu is not None else machine.flops
    detected = {"flops": flops, "workspace": machine.workspace, "memory_bandwidth": machine.memory_bandwidth}
    return ample_machine(device, **detected, **fields)


def planned_figures(method: str, work: Workload, world: int, machine: Any) -> Part:
    """Return ``planned_peak`` and, on a GPU, ``planned_seconds``; nothing if the method cannot be planned."""
    from benchmarks.lib.planned import plan_method, tensor_bytes

    plan = plan_method(method, work, world, machine)
    if plan is None:
        return {}
    peak = {"planned_peak": tensor_bytes(plan)}
    return peak | ({"planned_seconds": plan.time.total} if machine.device == "gpu" else {})


def step_times(work: Workload, seconds: float) -> Part:
    """Return time and throughput of a step on one rank."""
    return {"step_seconds": seconds, "tokens_per_second": work.tokens / seconds}


def kernel_status(device: torch.device, method: str) -> Part:
    """Return the states of the Triton kernels, and a remark for each that is not in use."""
    from benchmarks.lib.kernels import fallbacks, kernel_states

    kernels = kernel_states(device, methods.uses_int8(method)) if methods.base_method(method) in methods.LOMO_DS else {}
    return {"kernels": kernels, "remarks": fallbacks(kernels)}
