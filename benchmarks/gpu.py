"""Every figure that wants a GPU, on one of them, in one command and ten minutes; a clean skip where there is none.

    python benchmarks/gpu.py

Rows are run in the order of their worth, each in processes of its own with a time limit; what does not fit is said so,
and the results are written anew after each of them, so that what is cut off loses no more than the row under way:

- memory.*: the LOMO paper's Table 1 (7B, sequence 512, batch 8), 7B at sequence 1024, and rank 0 of the paper's
  multi-GPU runs, simulated
- throughput.*: 7B, sequence 1024, batch 1, against plain PyTorch, lomo-optim and torchtune
- update.*, logits.*, offload.*: benchmarks/update.py, benchmarks/logits.py and benchmarks/offload.py
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import memory, report, throughput
from benchmarks.contest import Entrant
from benchmarks.planned import planned_peak
from benchmarks.workers import Workers
from benchmarks.workload import TOY, Workload

TABLE_1 = Workload("7b", sequence=512, batch=8, precision="bf16", checkpointing=True)
TABLE_2 = Workload("7b", sequence=1024, batch=1, precision="bf16", checkpointing=True)
LEAST_SECONDS = 20.0  # that a row is begun for
STASH = {"stash_device": "gpu"}

Row = dict[str, Any]


@dataclass(frozen=True)
class MemoryRow:
    """One row of memory.md.

    Attributes:
        world: where it is not 1, rank 0 of so many is simulated.
        at_most: GiB that the peak is to keep to.
        papers: GiB that the paper reports.
    """

    method: str
    work: Workload
    world: int = 1
    at_most: float | None = None
    papers: float | None = None
    timeout: float = 150.0

    @property
    def name(self) -> str:
        """What the progress bar shows."""
        return f"memory of {self.work.model}, {self.method}"

    def start(self, device: str) -> Workers:
        """Its processes, which import what they need while something else is measured."""
        return Workers(1, device, self.world if self.world > 1 else None)

    def run(self, workers: Workers, seconds: float) -> Row:
        """The measured row."""
        row = memory.measure_row(workers, self.method, self.work, min(self.timeout, seconds))
        compared = {"at most": self.at_most, "the paper's": self.papers}
        planned = planned_peak(self.method, self.work, self.world, "cuda")
        return row | {"ranks": self.world, "simulated": self.world > 1, "planned": planned, **compared}


@dataclass(frozen=True)
class ContestRow:
    """One group of throughput.md: methods that take turns on one GPU."""

    entrants: list[Entrant]
    seconds: float = 25.0

    @property
    def name(self) -> str:
        """What the progress bar shows."""
        return " against ".join(entrant.label for entrant in self.entrants)


@dataclass(frozen=True)
class Script:
    """Another benchmark, which writes results of its own."""

    name: str
    timeout: float = 120.0


AnyRow = MemoryRow | ContestRow | Script


def rows() -> list[AnyRow]:
    """What is measured, first what matters most."""
    tiled, unclipped, clipped = replace(TABLE_1, tiled_logits=True), "immediate", "stash+clip"
    without = replace(TABLE_1, checkpointing=False)
    fused = _entrants([unclipped], "plain", "torchtune", "lomo-optim")
    exact = [
        Entrant(clipped, clipped, replace(TABLE_2, lomo=STASH), leads=True),
        Entrant("immediate, tiled logits", unclipped, replace(TABLE_2, tiled_logits=True), leads=True),
        *_entrants([], "lomo-optim+clip", "lomo-optim"),
    ]
    return [
        MemoryRow(unclipped, tiled, at_most=14.0, papers=14.58),
        MemoryRow(unclipped, TABLE_1, at_most=14.58, papers=14.58),
        MemoryRow(unclipped, replace(TABLE_2, tiled_logits=True), at_most=13.3, papers=13.61),
        ContestRow(fused),
        ContestRow(exact),
        MemoryRow(unclipped, _large("65b"), world=8, at_most=18.6, papers=19.18),
        MemoryRow("immediate+int8", _large("65b"), world=4, at_most=24.0),
        Script("offload", timeout=240.0),
        Script("update"),
        Script("logits"),
        MemoryRow("two_pass+clip", tiled, at_most=14.0, papers=14.58),
        MemoryRow(clipped, replace(tiled, lomo=STASH)),
        MemoryRow("two_pass+clip", _large("65b"), world=8, at_most=18.6, papers=19.18),
        MemoryRow("deepspeed-sgd", TABLE_1, papers=51.99),
        MemoryRow(unclipped, without, papers=59.40),
        MemoryRow("deepspeed-adamw", TABLE_1, papers=102.20),
        MemoryRow(unclipped, _large("30b"), world=4, papers=19.78),
        MemoryRow(unclipped, _large("13b"), world=2, papers=15.92),
        MemoryRow("deepspeed-sgd", TABLE_2, world=8, papers=9.49),
        MemoryRow("deepspeed-adamw", TABLE_2, world=8, papers=15.76),
        MemoryRow("deepspeed-sgd", replace(TABLE_2, model="13b"), world=8, papers=15.74),
        ContestRow(_entrants([unclipped], "deepspeed-sgd"), seconds=10.0),
    ]


def _entrants(ours: list[str], *others: str) -> list[Entrant]:
    return [Entrant(name, name, TABLE_2, leads=name in ours) for name in [*ours, *others]]


def _large(model: str) -> Workload:
    return replace(TABLE_2, model=model, tiled_logits=True)


@dataclass
class Results:
    """What has been measured so far."""

    folder: Path
    device: str
    flops: float
    flops_from: str
    memory_rows: list[Row] = field(default_factory=list)
    groups: list[Row] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)

    def add(self, row: AnyRow, workers: Workers | None, seconds: float, told: Callable[[str], None]) -> None:
        """Run a row within ``seconds``, and write all there is."""
        if isinstance(row, MemoryRow):
            assert workers is not None
            self.memory_rows.append(row.run(workers, seconds))
        elif isinstance(row, ContestRow):
            entrants, limit = row.entrants, min(150.0, seconds)
            group = throughput.compare(entrants, 1, self.device, self.flops, min(row.seconds, seconds / 3), limit, told)
            self.groups.append(group)
        else:
            self._run_script(row, seconds)
        self.write(show=False)

    def _run_script(self, script: Script, seconds: float) -> None:
        path = report.ROOT / f"benchmarks/{script.name}.py"
        if not path.exists():
            self.not_run[script.name] = "there is no such benchmark"
            return
        command = [sys.executable, str(path), f"--output_dir={self.folder}"]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=min(script.timeout, seconds), check=False
            )
        except subprocess.TimeoutExpired as error:
            self.not_run[script.name] = f"it took more than {error.timeout:.0f} s"
            return
        if run.returncode:
            self.not_run[script.name] = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1]

    def write(self, show: bool) -> None:
        """Write results, and print them too if ``show``."""
        environment = report.environment(*throughput.installed_peers())
        if self.memory_rows:
            found: Row = {"environment": environment, "device": self.device, "rows": self.memory_rows}
            found |= {"skipped": {}, "not_run": self.not_run}
            text = memory.describe(found) + "".join(f"\nNot run: {n}: {why}.\n" for n, why in self.not_run.items())
            report.write_results(self.folder, "memory", found, text, memory.draw(found), show)
        if self.groups:
            found = {"environment": environment, "device": self.device, "peak_flops": self.flops}
            found |= {"peak_flops_from": self.flops_from, "groups": self.groups}
            report.write_results(
                self.folder, "throughput", found, throughput.describe(found), throughput.draw(found), show
            )


def run(wanted: list[AnyRow], results: Results, deadline: float) -> None:
    """Run every row that there is time for; the next one's processes are started while one is measured."""
    started: dict[int, Workers] = {}
    bar = tqdm(wanted, desc="measuring", unit=" rows")
    try:
        for position, row in enumerate(bar):
            bar.set_postfix_str(row.name)
            seconds = deadline - time.monotonic()
            if seconds < LEAST_SECONDS:
                results.not_run[f"{position + 1}. {row.name}"] = "no time was left"
                continue
            # importing beside a contest would disturb it
            ahead = [position, position + 1] if isinstance(row, MemoryRow) else [position]
            for index in ahead:
                following = wanted[index] if index < len(wanted) else None
                if isinstance(following, MemoryRow) and index not in started:
                    started[index] = following.start(results.device)
            results.add(row, started.pop(position, None), seconds, bar.set_postfix_str)
    finally:
        for workers in started.values():
            workers.stop()
        results.write(show=True)


def shrunk(row: AnyRow) -> AnyRow:
    """The same row at a size for trying it on the CPU."""
    if isinstance(row, MemoryRow):
        return replace(row, work=_toy(row.work))
    if isinstance(row, ContestRow):
        return replace(row, entrants=[replace(e, work=_toy(e.work)) for e in row.entrants], seconds=1.0)
    return row


def _toy(work: Workload) -> Workload:
    return replace(work, model=TOY, sequence=16, batch=1, precision="fp32", lomo={}, tiled_logits=False)


def main() -> None:
    """Measure what fits into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=report.RESULTS / "gpu", help="of the results; benchmarks/results/gpu"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all rows; 10 by default")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="rows by their place in the list, from 1 on")
    parser.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    parser.add_argument(
        "--try_on_cpu", action="store_true", help="the same rows with a toy model, to see that all of this works"
    )
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    wanted = [shrunk(row) if given.try_on_cpu else row for row in rows()]
    if given.list:
        for place, row in enumerate(wanted, 1):
            print(f"{place:3} {row.name}")
        return
    if not torch.cuda.is_available() and not given.try_on_cpu:
        print("benchmarks/gpu.py: there is no CUDA GPU here, so nothing was measured")
        return
    report.require("matplotlib")
    wanted = [row for place, row in enumerate(wanted, 1) if given.only is None or place in given.only]
    device = "cpu" if given.try_on_cpu else "cuda"
    os.environ["DS_ACCELERATOR"] = device
    flops, origin = throughput.peak_flops(device, "fp32" if given.try_on_cpu else "bf16", None)
    run(wanted, Results(given.output_dir, device, flops, origin), deadline)


if __name__ == "__main__":
    main()
