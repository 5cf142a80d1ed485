"""Runs all benchmarks that need a GPU on one GPU, in one command and a few minutes.

    python benchmarks/gpu.py --minutes 7 --out FOLDER

Rows are measured in the order of their importance, each in its own process group, which is killed at a time limit.
FOLDER/gpu.json and FOLDER/gpu.md are rewritten after every part of a row, so an interrupted run keeps its results.
A picture is added at the end if matplotlib is installed. A row that fails or runs out of memory is reported as such,
and the next row follows. Each peak and each time is printed beside the prediction of lomo_ds.planner. A row whose
Triton kernel fell back is marked.

With --only, rows in FOLDER from the same commit and the same versions are kept beside the new ones.

It runs from a checkout and needs no network. It skips measurements whose packages are not installed, and lists these
packages in its first line. Without a CUDA GPU it prints a message and exits; --try_on_cpu runs every row with a toy
model instead.
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
from benchmarks.lib.row_process import BenchmarkRow, Results, RowOutput, run_rows
from benchmarks.lib.workers import DOES_NOT_FIT, is_out_of_memory
from benchmarks.lib.workload import Workload

TABLE_1 = Workload("7b", sequence=512, batch=8, precision="bf16", checkpointing=True)
TABLE_2 = Workload("7b", sequence=1024, batch=1, precision="bf16", checkpointing=True)
TILED_1, TILED_2 = replace(TABLE_1, tiled_logits=True), replace(TABLE_2, tiled_logits=True)
LAYERED = replace(TILED_2, accumulation=8)
STASH = {"stash_device": "gpu"}
CARD = 24  # GiB of the GPU that rows of larger models imitate
PEERS = ("plain", "lomo-optim", "torchtune")
# maps pinned memory with several threads, which is much faster for tens of GB
PIN_FAST = {"PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"}
OPTIONAL = ("triton", "lomo_optim", "torchtune", "matplotlib")


@dataclass(frozen=True)
class RowSpec:
    """A row and its measurement; see ``BenchmarkRow``."""

    place: str
    title: str
    needs: float
    limit: float
    measurement: Measurement
    pins_memory: bool = False


def entrants(work: Workload, own_rows: str, *others: str) -> tuple[Entrant, ...]:
    """Return the entrants of one workload; the first method is the one that the others are compared with."""
    return tuple(Entrant(name, name, work, leads=name == own_rows) for name in (own_rows, *others))


def rows() -> list[RowSpec]:
    """Return all rows, the most important first."""
    small, stash = replace(TABLE_2, model="1b"), replace(TABLE_2, lomo=STASH)
    fused = (
        Group(entrants(small, "immediate", *PEERS), batches=(8,), until=0.4),
        Group(entrants(TABLE_2, "immediate", *PEERS), batches=(8,)),
    )
    clipped = Group((*entrants(stash, "stash+clip"), Entrant("lomo-optim+clip", "lomo-optim+clip", TABLE_2)))
    large = replace(TILED_2, model="65b")
    lean = replace(large, lomo={"gather_granularity": "module"}, zero={"stage3_prefetch_bucket_size": 0})
    return [
        RowSpec("1", "the paper's Table 1", 25, 60, PeakMemory("immediate", TILED_1, at_most=14.0, papers=14.58)),
        RowSpec("2", "throughput without clipping", 45, 120, Throughput(fused)),
        RowSpec("3", "update kernels", 10, 30, UpdateKernels()),
        RowSpec("4", "13B in host memory", 30, 80, _in_host_memory("13b", 1, 8), pins_memory=True),
        RowSpec("5", "throughput with clipping", 25, 75, Throughput((clipped,))),
        RowSpec("6", "65B on 8", 20, 45, PeakMemory("immediate", lean, world=8, at_most=18.6, papers=19.18, card=CARD)),
        RowSpec("7a", "7B, a row of 1024", 12, 30, PeakMemory("immediate", TILED_2, at_most=13.3, papers=13.61)),
        RowSpec("7b", "Table 1, untiled", 15, 30, PeakMemory("immediate", TABLE_1, at_most=14.58, papers=14.58)),
        RowSpec("7c", "65B int8 on 4", 20, 40, PeakMemory("immediate+int8", large, world=4, at_most=24.0, card=CARD)),
        RowSpec(
            "7d", "65B on 8, prefetching", 20, 45, PeakMemory("immediate", large, world=8, papers=19.18, card=CARD)
        ),
        RowSpec(
            "7e", "7B, 8 micro-batches of a row of 1024", 20, 40, PeakMemory("immediate+layered", LAYERED, card=CARD)
        ),
        RowSpec("8", "30B in host memory", 80, 130, _in_host_memory("30b", 1, 8), pins_memory=True),
    ]


def _in_host_memory(model: str, *batches: int) -> OffloadedParams:
    return OffloadedParams(replace(TILED_2, model=model), batches, card=CARD)


def toy(spec: RowSpec) -> RowSpec:
    """Return the same row with a tiny model, for trying it out on the CPU."""
    return replace(spec, measurement=spec.measurement.toy(), pins_memory=False, needs=1, limit=200)


def row_of(spec: RowSpec, try_on_cpu: bool) -> BenchmarkRow:
    """Return the row with the command that measures it in its own process."""
    command = [sys.executable, str(Path(__file__).resolve()), *(["--try_on_cpu"] if try_on_cpu else [])]
    environment = PIN_FAST if spec.pins_memory else {}
    return BenchmarkRow(
        spec.place, spec.title, spec.needs, spec.limit, [*command, "--row", spec.place, "--to"], environment
    )


def measure_row(spec: RowSpec, device: str, path: Path) -> None:
    """Measure a row in its own process, and write the results to ``path``; see ``row_process``."""
    output = RowOutput(path)
    try:
        measure = spec.measurement.prepare(device)
        seconds = output.wait_to_begin()
        if device == "cuda":
            output.write({"gpu": torch.cuda.get_device_name()})
        measure(seconds, output.write)
    except Exception as error:
        outcome = DOES_NOT_FIT if is_out_of_memory(error) else "failed"
        output.write({"outcome": outcome, "error": (str(error).strip().splitlines() or [repr(error)])[0]})
        traceback.print_exc()
        sys.exit(1)


def write(
    folder: Path, results_of_rows: list[dict[str, Any]], environment: dict[str, Any], picture: bool = False
) -> None:
    """Write the results so far."""
    gpus = list(dict.fromkeys(row["gpu"] for row in results_of_rows if "gpu" in row))
    machine = environment["machine"] | {"gpus": gpus}
    results = {"environment": environment | {"machine": machine}, "rows": results_of_rows}
    figure = gpu_report.draw(results_of_rows) if picture else None
    result_files.write_results(folder, "gpu", results, gpu_report.describe(results_of_rows), figure, show=False)


def earlier_rows(folder: Path, environment: dict[str, Any], places: set[str]) -> list[dict[str, Any]]:
    """Return the rows of ``places`` in the results in ``folder``, if they were measured in the same environment.

    The command that measured them is added to that of ``environment``.
    """
    path = folder / "gpu.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"environment": {}, "rows": []}
    same = all(results["environment"].get(field) == environment[field] for field in ("commit", "versions"))
    rows = [row for row in results["rows"] if same and row["place"] in places]
    if rows:
        environment["command"] = f"{results['environment']['command']}; {environment['command']}"
    return rows


def run(specs: list[RowSpec], folder: Path, minutes: float, try_on_cpu: bool) -> None:
    """Measure rows until the time is up."""
    deadline = time.monotonic() + 60 * minutes
    environment = result_files.environment(*(package for package in methods.INSTALL), gpus=[])
    chosen = [row_of(row, try_on_cpu) for row in specs]
    places = [row.place for row in rows()]
    kept_rows = earlier_rows(folder, environment, set(places) - {row.place for row in specs})

    def all_rows() -> list[dict[str, Any]]:
        return sorted([*kept_rows, *results.rows], key=lambda row: places.index(row["place"]))

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
    """Run the benchmark of the command line."""
    args = arguments()
    specs = [toy(row) if args.try_on_cpu else row for row in rows()]
    if args.list:
        for row in specs:
            print(f"{row.place:>3}  {row.limit:3.0f} s  {row.title}")
        return
    if args.row is not None:
        row = next(row for row in specs if row.place == args.row)
        measure_row(row, "cpu" if args.try_on_cpu else "cuda", args.to)
        return
    if not torch.cuda.is_available() and not args.try_on_cpu:
        print("benchmarks/gpu.py: no CUDA GPU found, so nothing was measured")
        return
    if missing := result_files.missing_packages(OPTIONAL):
        print(f"skipping measurements that need packages which are not installed: {', '.join(missing)}", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        run([row for row in specs if args.only is None or row.place in args.only], args.out, args.minutes,
            args.try_on_cpu)  # fmt: skip
    except KeyboardInterrupt:
        sys.exit(130)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
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
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in the process of a row: its name,
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)  # and its result file
    return parser.parse_args()


if __name__ == "__main__":
    main()
