"""Every figure that wants a GPU, on one of them, in one command and a few minutes.

    python benchmarks/gpu.py --minutes 7 --out FOLDER

Rows are measured in the order of their worth, each in a process group of its own with a time limit, at which all of it
is killed. After every part of a row FOLDER/gpu.json and FOLDER/gpu.md are written anew, so that whoever interrupts or
kills this command has all that was measured until then; at the end a picture joins them, where matplotlib is
installed. A row that fails, or runs out of memory, says so in its place, and the next one follows. Beside each peak and
each time stands what lomo_ds.planner predicts for it, and a row whose Triton kernel did not work is marked.

With --only, rows that the same commit and the same versions have left in FOLDER stay beside those measured now.

It runs from a checkout, needs no network, and leaves out what needs a package that is not installed, saying so in its
first line. Without a CUDA GPU it says so and ends; --try_on_cpu runs every row with a toy model instead.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import gpu_report, methods, result_files
from benchmarks.lib.contest import Entrant
from benchmarks.lib.measurements import Group, Measurement, OffloadedParams, PeakMemory, Throughput, UpdateKernels
from benchmarks.lib.row_process import Results, Row, RowOutput, run_rows
from benchmarks.lib.workers import DOES_NOT_FIT, is_out_of_memory
from benchmarks.lib.workload import Workload

TABLE_1 = Workload("7b", sequence=512, batch=8, precision="bf16", checkpointing=True)
TABLE_2 = Workload("7b", sequence=1024, batch=1, precision="bf16", checkpointing=True)
TILED_1, TILED_2 = replace(TABLE_1, tiled_logits=True), replace(TABLE_2, tiled_logits=True)
STASH = {"stash_device": "gpu"}
CARD = 24  # GiB: the card that rows of larger models imitate
PEERS = ("plain", "lomo-optim", "torchtune")
# pages of pinned memory are mapped by several threads, which takes a fraction of the time for tens of GB
PIN_FAST = {"PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"}
OPTIONAL = ("triton", "lomo_optim", "torchtune", "matplotlib")


@dataclass(frozen=True)
class Wanted:
    """A row to be measured; see ``Row``."""

    place: str
    title: str
    needs: float
    limit: float
    measurement: Measurement
    pins_memory: bool = False


def entrants(work: Workload, ours: str, *others: str) -> tuple[Entrant, ...]:
    """Ours, which the others are compared with."""
    return tuple(Entrant(name, name, work, leads=name == ours) for name in (ours, *others))


def rows() -> list[Wanted]:
    """What is measured, first what matters most."""
    small, stash = replace(TABLE_2, model="1b"), replace(TABLE_2, lomo=STASH)
    fused = (
        Group(entrants(small, "immediate", *PEERS), batches=(8,), until=0.4),
        Group(entrants(TABLE_2, "immediate", *PEERS), batches=(8,)),
    )
    clipped = Group((*entrants(stash, "stash+clip"), Entrant("lomo-optim+clip", "lomo-optim+clip", TABLE_2)))
    large = replace(TILED_2, model="65b")
    lean = replace(large, lomo={"gather_granularity": "module"}, zero={"stage3_prefetch_bucket_size": 0})
    return [
        Wanted("1", "the paper's Table 1", 25, 60, PeakMemory("immediate", TILED_1, at_most=14.0, papers=14.58)),
        Wanted("2", "throughput without clipping", 45, 120, Throughput(fused)),
        Wanted("3", "update kernels", 10, 30, UpdateKernels()),
        Wanted("4", "13B in host memory", 30, 80, _in_host_memory("13b", 1, 8), pins_memory=True),
        Wanted("5", "throughput with clipping", 25, 75, Throughput((clipped,))),
        Wanted("6", "65B on 8", 20, 45, PeakMemory("immediate", lean, world=8, at_most=18.6, papers=19.18, card=CARD)),
        Wanted("7a", "7B, a row of 1024", 12, 30, PeakMemory("immediate", TILED_2, at_most=13.3, papers=13.61)),
        Wanted("7b", "Table 1, untiled", 15, 30, PeakMemory("immediate", TABLE_1, at_most=14.58, papers=14.58)),
        Wanted("7c", "65B int8 on 4", 20, 40, PeakMemory("immediate+int8", large, world=4, at_most=24.0, card=CARD)),
        Wanted("7d", "65B on 8, prefetching", 20, 45, PeakMemory("immediate", large, world=8, papers=19.18, card=CARD)),
        Wanted("8", "30B in host memory", 80, 130, _in_host_memory("30b", 1, 8), pins_memory=True),
    ]


def _in_host_memory(model: str, *batches: int) -> OffloadedParams:
    return OffloadedParams(replace(TILED_2, model=model), batches, card=CARD)


def toy(wanted: Wanted) -> Wanted:
    """The same row at a size for trying it on the CPU."""
    return replace(wanted, measurement=wanted.measurement.toy(), pins_memory=False, needs=1, limit=200)


def row_of(wanted: Wanted, try_on_cpu: bool) -> Row:
    """The row as a command: this file, told to measure it."""
    command = [sys.executable, str(Path(__file__).resolve()), *(["--try_on_cpu"] if try_on_cpu else [])]
    environment = PIN_FAST if wanted.pins_memory else {}
    return Row(
        wanted.place, wanted.title, wanted.needs, wanted.limit, [*command, "--row", wanted.place, "--to"], environment
    )


def measure_row(wanted: Wanted, device: str, path: Path) -> None:
    """In a row's own process: measure it, and write to ``path``; see ``row_process``."""
    output = RowOutput(path)
    try:
        measure = wanted.measurement.prepare(device)
        seconds = output.wait_to_begin()
        if device == "cuda":
            output.write({"gpu": torch.cuda.get_device_name()})
        measure(seconds, output.write)
    except Exception as error:
        outcome = DOES_NOT_FIT if is_out_of_memory(error) else "failed"
        output.write({"outcome": outcome, "error": (str(error).strip().splitlines() or [repr(error)])[0]})
        traceback.print_exc()
        sys.exit(1)


def write(folder: Path, found: list[dict[str, Any]], environment: dict[str, Any], picture: bool = False) -> None:
    """Write all there is."""
    gpus = list(dict.fromkeys(row["gpu"] for row in found if "gpu" in row))
    machine = environment["machine"] | {"gpus": gpus}
    results = {"environment": environment | {"machine": machine}, "rows": found}
    figure = gpu_report.draw(found) if picture else None
    result_files.write_results(folder, "gpu", results, gpu_report.describe(found), figure, show=False)


def earlier_rows(folder: Path, environment: dict[str, Any], places: set[str]) -> list[dict[str, Any]]:
    """Rows of ``places`` that were measured in this environment, as results in ``folder`` have them.

    The command that measured them joins that of ``environment``.
    """
    path = folder / "gpu.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"environment": {}, "rows": []}
    same = all(found["environment"].get(field) == environment[field] for field in ("commit", "versions"))
    rows = [row for row in found["rows"] if same and row["place"] in places]
    if rows:
        environment["command"] = f"{found['environment']['command']}; {environment['command']}"
    return rows


def run(wanted: list[Wanted], folder: Path, minutes: float, try_on_cpu: bool) -> None:
    """Measure the rows that there is time for."""
    deadline = time.monotonic() + 60 * minutes
    environment = result_files.environment(*(package for package in methods.INSTALL), gpus=[])
    chosen = [row_of(row, try_on_cpu) for row in wanted]
    places = [row.place for row in rows()]
    others = earlier_rows(folder, environment, set(places) - {row.place for row in wanted})

    def all_rows() -> list[dict[str, Any]]:
        return sorted([*others, *results.rows], key=lambda row: places.index(row["place"]))

    results = Results(chosen, lambda: write(folder, all_rows(), environment))
    scratch = Path(tempfile.mkdtemp(prefix="lomo_ds_gpu_"))
    try:
        run_rows(chosen, results, scratch, deadline, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("interrupted")
        raise
    finally:
        write(folder, all_rows(), environment, picture=not result_files.missing_packages(["matplotlib"]))
        shutil.rmtree(scratch, ignore_errors=True)
        print(f"\n{gpu_report.describe(all_rows())}\nresults: {folder}/gpu.json, {folder}/gpu.md")


def _interrupt(signal_number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Measure what fits into the time."""
    args = arguments()
    wanted = [toy(row) if args.try_on_cpu else row for row in rows()]
    if args.list:
        for row in wanted:
            print(f"{row.place:>3}  {row.limit:3.0f} s  {row.title}")
        return
    if args.row is not None:
        row = next(row for row in wanted if row.place == args.row)
        measure_row(row, "cpu" if args.try_on_cpu else "cuda", args.to)
        return
    if not torch.cuda.is_available() and not args.try_on_cpu:
        print("benchmarks/gpu.py: there is no CUDA GPU here, so nothing was measured")
        return
    if missing := result_files.missing_packages(OPTIONAL):
        print(f"not installed, and what needs them is left out: {', '.join(missing)}", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        run([row for row in wanted if args.only is None or row.place in args.only], args.out, args.minutes,
            args.try_on_cpu)  # fmt: skip
    except KeyboardInterrupt:
        sys.exit(130)


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    places = [row.place for row in rows()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=result_files.RESULTS / "gpu", help="folder of the results; benchmarks/results/gpu"
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="for all rows; 7 by default")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", choices=places, help=f"measure these rows only, of {' '.join(places)}"
    )
    parser.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    parser.add_argument("--try_on_cpu", action="store_true", help="the same rows with a toy model, on the CPU")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in the process of a row: which,
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)  # and where its results go
    return parser.parse_args()


if __name__ == "__main__":
    main()
