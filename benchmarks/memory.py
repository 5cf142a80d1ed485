"""Memory of a training step by kind: the LOMO paper's Table 1 and Figure 2, for any model.

    python benchmarks/memory.py                                                 # small, on CPU ranks
    python benchmarks/memory.py --models 7b --sequence 512 --batch 8            # the paper's, on a GPU
    python benchmarks/memory.py --models 65b --sequence 1024 --simulate_world 8 --checkpointing on
    python benchmarks/memory.py --checkpointing on --accumulation 8 --methods immediate+layered stash deepspeed-sgd

Each row is measured in its own processes, over four steps after the engine is built. The peak is that of torch's
allocator on a GPU (the JSON also has the reserved bytes), and that of all live tensors on the CPU. The last step tracks
every tensor from its creation to its end, to split the peak into kinds:

- parameters: this rank's shards, and full parameters while they are gathered
- gradients: gradients of autograd, full, reduced or stashed, and buffers for gradients
- optimizer state: all tensors that the optimizer keeps between steps, master weights included
- activations: the rest of the peak: tensors that forward saves for backward, temporaries of operations, and on a GPU
  the rounding of the allocator

The four kinds are measured at the peak and add up to it. Few gradients may be alive at the peak, so the table also has
the most bytes of gradients at any time, and the peak that ``lomo_ds.planner`` predicts. Host memory is the peak
resident memory of a process minus its resident memory before the model was built. With several ranks, the rank with
the highest peak is reported.

--simulate_world N runs rank 0 of N in one process, in torch's fake process group. It measures the true memory of one
GPU among N with the real allocator. Nothing is communicated, so times mean nothing and are not reported.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import methods, options, result_files
from benchmarks.lib.footprint import ACTIVATIONS, GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, measure, resident_bytes
from benchmarks.lib.kernels import fallbacks, kernel_states
from benchmarks.lib.planned import planned_peak
from benchmarks.lib.workers import DOES_NOT_FIT, DoesNotFit, RankState, WorkerError, Workers
from benchmarks.lib.workload import LARGE, Workload, parameter_count

METHODS = ["deepspeed-adamw", "deepspeed-sgd", "immediate", "stash+clip"]
UNKNOWN = "unknown"
COLORS = {PARAMETERS: "#1b7f79", GRADIENTS: "#e08e45", OPTIMIZER: "#8e6c8a", ACTIVATIONS: "#b9c4c9", UNKNOWN: "#555555"}
STAYS_GATHERED = 10**9  # DeepSpeed's stage3_max_live_parameters
# LLaMA 7B, sequence 512, batch 8, fp16, GiB: arXiv 2306.09782, Table 1
PAPER = {
    ("AdamW", True): (12.55, 12.55, 75.31, 1.79),
    ("SGD", True): (12.55, 12.55, 25.10, 1.79),
    ("LOMO", True): (12.55, 0.24, 0.0, 1.79),
    ("LOMO", False): (12.55, 0.24, 0.0, 45.61),
}

Row = dict[str, Any]


def build_and_measure(state: RankState, method: str, work: Workload) -> Row:
    """Build a method and measure the memory of its steps, on a rank."""
    before = resident_bytes()["now"]
    built = methods.build(method, work)
    measured = measure(built)
    kernels = (
        kernel_states(built.device, methods.uses_int8(method)) if methods.base_method(method) in methods.LOMO_DS else {}
    )
    return measured | {"resident": measured["resident"] - before, "kernels": kernels}


def measure_row(workers: Workers, method: str, work: Workload, timeout: float) -> Row:
    """Measure one row of the table, in fresh processes that then stop."""
    row: Row = {"method": method, "workload": methods.workload_as_dict(work)}
    try:
        of_ranks = workers.call(build_and_measure, method, work, timeout=timeout)
    except DoesNotFit:
        return row | {"outcome": DOES_NOT_FIT}
    except WorkerError as error:
        return row | {"outcome": str(error)}
    finally:
        workers.stop()
    highest = max(of_ranks, key=lambda of_rank: of_rank["peak"])
    if not all(math.isfinite(loss) for loss in highest["losses"]):
        return row | {"outcome": f"the loss is not finite: {highest['losses']}"}
    return row | {"outcome": "measured", **highest}


def measure_all(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure every requested row; ``write`` is called with the results so far after each."""
    results: dict[str, Any] = {
        "environment": result_files.environment(), "device": args.device, "rows": [], "skipped": {}
    }  # fmt: skip
    worlds = [args.simulate_world] if args.simulate_world else args.ranks
    requested = [(work, world) for work in workloads(args) for world in worlds]
    bar = tqdm(total=len(requested) * len(args.methods), desc="measuring", unit=" rows")
    for work, world in requested:
        for method in args.methods:
            bar.set_postfix_str(f"{method}, {work.model}, {options.pluralize(world, 'rank')}")
            reason = methods.unavailability(method, world, work.accumulation)
            if reason is not None:
                results["skipped"][f"{method} on {options.pluralize(world, 'rank')}"] = reason
            else:
                workers = Workers(1 if args.simulate_world else world, args.device, args.simulate_world)
                planned = planned_peak(method, work, world, args.device)  # while the workers do their imports
                row = measure_row(workers, method, work, args.timeout)
                row |= {"ranks": world, "simulated": args.simulate_world is not None, "planned": planned}
                results["rows"].append(row)
                write(results)
            bar.update()
    bar.close()
    return results


def workloads(args: argparse.Namespace) -> list[Workload]:
    """Return the requested workloads: each model, with and without checkpointing."""
    checkpointing = {"on": [True], "off": [False], "both": [True, False]}[args.checkpointing]
    works = [
        replace(options.build_workload(args, model, on), accumulation=args.accumulation)
        for model in args.models
        for on in checkpointing
    ]
    if args.as_is:
        return works
    return [replace(work, zero=LARGE) if parameter_count(work) < STAYS_GATHERED else work for work in works]


def describe(results: dict[str, Any]) -> str:
    """Format the rows as Markdown."""
    rows = results["rows"]
    unit, divisor = unit_of(rows)
    counted = "as torch's allocator counts" if results["device"] == "cuda" else "the bytes of all tensors"
    header = ["", "recomputes", *KINDS, "**peak**", "planned", "most gradients", "host memory"]
    lines = [[*named(row), *figures(row, divisor)] for row in rows]
    text = (
        f"# Memory of a training step, by kind\n\nIn {unit}, at the peak, {counted}; with several ranks, "
        f"that of the rank with the highest peak. Rows x sequence are per rank.\n\n" + result_files.table(header, lines)
    )
    if any(row["simulated"] for row in rows):
        text += (
            "\nOne process simulates rank 0: the memory is that of a real rank, the collectives communicate nothing, "
            "and times would mean nothing.\n"
        )
    if any(row["workload"]["zero"] for row in rows):
        text += (
            "\nDeepSpeed keeps a model with less than a billion parameters gathered. Here its limits are set to gather "
            "only the module in use, as with a larger model (--as_is leaves the limits alone).\n"
        )
    for name, reason in results["skipped"].items():
        text += f"\nLeft out: {name}: {reason}.\n"
    if any(row["workload"]["model"] == "7b" for row in rows):
        text += "\nThe paper's Table 1 (7B, sequence 512, batch 8, fp16), GiB:\n\n" + paper_table()
    return text + failures(rows)


def named(row: Row) -> list[str]:
    """Return the first two cells of a row."""
    work = row["workload"]
    ranks = f"rank 0 of {row['ranks']}" if row["simulated"] else options.pluralize(row["ranks"], "rank")
    tiled = ", tiled logits" if work["tiled_logits"] and row["method"].partition("+")[0] in methods.LOMO_DS else ""
    shape = f"{work['batch']} x {work['sequence']}"
    if work["accumulation"] > 1:
        shape = f"{work['accumulation']} micro-batches of {shape}"
    recomputes = "yes" if work["checkpointing"] else "no"
    return [f"{work['model']} {work['precision']}, {shape}, {ranks}: {row['method']}{tiled}", recomputes]


def figures(row: Row, divisor: float) -> list[str]:
    """Return the other cells of a row."""
    planned = f"{row['planned'] / divisor:.2f}" if row.get("planned") else ""
    if row["outcome"] != "measured":
        outcome = DOES_NOT_FIT if row["outcome"] == DOES_NOT_FIT else "failed"
        return [*["" for _ in KINDS], f"**{outcome}**", planned, "", ""]
    at_peak = [_format_size(row["at_peak"] and row["at_peak"][kind], divisor) for kind in KINDS]
    rest = (_format_size(row[name], divisor) for name in ("most_gradients", "resident"))
    return [*at_peak, f"**{row['peak'] / divisor:.2f}**", planned, *rest]


def _format_size(value: float | None, divisor: float) -> str:
    return UNKNOWN if value is None else f"{value / divisor:.2f}"


def failures(rows: list[Row]) -> str:
    """Return one line for each failure, including kernels that fell back."""
    fallen_back = [(named(row)[0], remark) for row in rows for remark in fallbacks(row.get("kernels", {}))]
    broken = [row for row in rows if row["outcome"] not in ("measured", DOES_NOT_FIT)]
    text = "".join(f"\n**{name}: {remark}**\n" for name, remark in fallen_back)
    return text + "".join(f"\nFailed: {named(row)[0]}: `{row['outcome'].strip().splitlines()[-1]}`\n" for row in broken)


def paper_table() -> str:
    """Format the figures of the paper."""
    lines = [
        [name, "yes" if on else "no", *(f"{value:.2f}" for value in values), f"**{sum(values):.2f}**"]
        for (name, on), values in PAPER.items()
    ]
    return result_files.table(["optimizer", "recomputes", *KINDS, "**total**"], lines)


def unit_of(rows: list[Row]) -> tuple[str, float]:
    """Return a unit that suits the largest peak, and its bytes."""
    most = max((row["peak"] for row in rows if row["outcome"] == "measured"), default=0)
    return ("GiB", 2.0**30) if most >= 4 * 2**30 else ("MiB", 2.0**20)


def draw(results: dict[str, Any]) -> Any:
    """Draw a bar for each row, divided into kinds; rows of the same settings are grouped."""
    rows = [row for row in results["rows"] if row["outcome"] == "measured"]
    unit, divisor = unit_of(rows)
    settings = [named(row)[0].rpartition(": ")[0] + _recomputing(row) for row in rows]
    groups = list(dict.fromkeys(settings))
    height = 0.33 * (len(rows) + 1.1 * len(groups))
    figure, axes = result_files.pyplot().subplots(figsize=(9.5, 1.5 + max(1.5, height)), layout="constrained")
    ticks, labels, top = [], [], 0.0
    most = max((row["peak"] for row in rows), default=1) / divisor
    for group in groups:
        axes.annotate(group, (0, top), xytext=(3, 0), textcoords="offset points", va="center", fontweight="bold")
        for row in (row for row, of_row in zip(rows, settings, strict=True) if of_row == group):
            top -= 1.0
            _bar(axes, row, top, divisor)
            ticks.append(top)
            labels.append(named(row)[0].rpartition(": ")[2])
        top -= 1.1
    axes.set_yticks(ticks, labels)
    axes.set_ylim(top + 0.5, 0.8)
    axes.set_xlim(0, 1.1 * most)
    axes.set_xlabel(f"{unit} at the peak of a step")
    axes.set_title("Memory of a training step, by kind", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    patches = [axes.barh(0, 0, color=COLORS[kind]) for kind in KINDS]
    figure.legend(patches, KINDS, ncols=len(KINDS), loc="outside lower center", frameon=False)
    return figure


def _bar(axes: Any, row: Row, place: float, divisor: float) -> None:
    left = 0.0
    for kind, size in (row["at_peak"] or {UNKNOWN: row["peak"]}).items():
        width = max(0.0, size) / divisor
        axes.barh(place, width, 0.8, left=left, color=COLORS[kind])
        left += width
    axes.annotate(f" {row['peak'] / divisor:.4g}", (left, place), va="center", fontsize=9)


def _recomputing(row: Row) -> str:
    return ", activations recomputed" if row["workload"]["checkpointing"] else ""


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    options.add_workload(parser, models=["40m"], sequence=128, batch=2)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=options.methods_help(METHODS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks; 2 by default")
    parser.add_argument("--simulate_world", type=int, help="simulate rank 0 of this world size in one process instead")
    parser.add_argument(
        "--checkpointing", choices=("on", "off", "both"), default="both", help="activations recomputed; both"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step; 1 by default")
    parser.add_argument(
        "--as_is",
        action="store_true",
        help="keep a model of less than a billion parameters gathered, as DeepSpeed does; by default only the module "
        "in use is gathered, as with a larger model",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="time limit of a row in seconds; 600 by default")
    args = parser.parse_args()
    result_files.require("matplotlib")
    options.resolve(args, parser, max([1] if args.simulate_world else args.ranks))

    def write(results: dict[str, Any]) -> None:
        result_files.write_results(args.output_dir, "memory", results, describe(results), show=False)

    results = measure_all(args, write)
    result_files.write_results(args.output_dir, "memory", results, describe(results), draw(results))
    if all(row["outcome"] not in ("measured", DOES_NOT_FIT) for row in results["rows"]):
        sys.exit("all rows have failed")


if __name__ == "__main__":
    main()
