"""Bytes that a step moves between ranks, by collective: lomo_ds, DeepSpeed's ZeRO-3, and the published LOMO.

The benchmark counts the arguments of every collective of one step on real ranks: the full tensor that is gathered or
scattered, and twice the full tensor that is all-reduced, because an all-reduce is a reduce-scatter and an all-gather. A
ring moves (ranks - 1) / ranks of that over each link. The unit is P, the bytes of all parameters as stored.

Weights that are gathered in int8 (+qgather, zero_quantized_weights; +int8, which also stores them in int8) halve the
gathers. With several micro-batches in a step, all parameters are gathered and all gradients reduced once for each of
them, in DeepSpeed and where lomo_ds adds up gradients in the stash, but once for all of them in layered accumulation
(+layered). So bytes per micro-batch, and with them bytes per token, are what to compare.

DeepSpeed keeps the parameters that forward has gathered for backward if the model has less than a billion parameters.
So each method is counted both as in a large model (nothing is kept) and as it runs on this small one.

The published LOMO (arXiv 2306.09782) fails on current DeepSpeed, so its traffic is derived from its code: a pass
gathers every parameter in forward and again in backward, and all-reduces every gradient; exact clipping takes two
passes.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import methods, options, result_files
from benchmarks.lib.workers import RankState, Workers
from benchmarks.lib.workload import LARGE, Workload

METHODS = ["immediate", "stash+clip", "two_pass+clip", "immediate+qgather", "immediate+int8", "deepspeed-sgd+clip"]
ACCUMULATING = ["immediate+layered", "stash+clip+layered", "stash", "deepspeed-sgd"]  # with several micro-batches
TRACED = 3  # steps in which DeepSpeed traces the model
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "other")
COLORS = dict(zip(KINDS, ("#1b7f79", "#e08e45", "#c0392b", "#b9c4c9"), strict=True))
PUBLISHED = "published LOMO"

Row = dict[str, Any]


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes of every collective while the mode is active.

    Attributes:
        moved: bytes by kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = kind_of(func._opname)
            # what goes in and what comes out are arguments, and the larger of them is the whole
            whole = max(sum(leaf.nbytes for leaf in tree_leaves(a) if isinstance(leaf, torch.Tensor)) for a in args)
            self.moved[kind] += 2 * whole if kind == "all-reduce" else whole
        return func(*args, **(kwargs or {}))


def kind_of(operation: str) -> str:
    """Return the kind of a collective from the name of torch's operator."""
    plain = operation.replace("_", "")
    return next((kind for kind in KINDS if kind.replace("-", "") in plain), "other")


def count(state: RankState, method: str, work: Workload) -> dict[str, float]:
    """Count the bytes of a step by kind of collective, in units of P, on a rank."""
    from lomo_ds import zero3

    built = methods.build(method, work)
    numels = [zero3.full_shape(parameter).numel() for parameter in built.model.parameters()]
    parameters = sum(numels) * work.dtype.itemsize
    for _ in range(TRACED):
        built.step()
    with TrafficCounter() as traffic:
        built.step()
    return {kind: traffic.moved[kind] / parameters for kind in KINDS}


def published(clips: bool) -> dict[str, float]:
    """Return the bytes that a step of the published code moves, in units of P."""
    passes = 2 if clips else 1
    gathers, all_reduces = 2 * passes, passes
    return {"all-gather": 1.0 * gathers, "reduce-scatter": 0.0, "all-reduce": 2.0 * all_reduces, "other": 0.0}


def count_all(args: Any, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Count every row; ``write`` is called with the results so far after each."""
    unchanged = options.build_workload(args, args.model, args.checkpointing)
    rows: list[Row] = []
    results = {
        "environment": result_files.environment(),
        "device": args.device,
        "ranks": args.simulate_world or args.ranks,
        "simulated": args.simulate_world is not None,
        "workload": methods.workload_as_dict(unchanged),
        "rows": rows,
    }
    for clips in (False, True):
        rows.append(row_of(PUBLISHED + (methods.CLIP if clips else ""), 1, True, published(clips)))
    for method, accumulation in tqdm(requested_rows(args), desc="counting", unit=" methods"):
        for large in (True, False):
            work = replace(unchanged, accumulation=accumulation, zero=LARGE if large else {})
            with Workers(1 if args.simulate_world else args.ranks, args.device, args.simulate_world) as workers:
                of_ranks = workers.call(count, method, work)
            highest = max(of_ranks, key=lambda moved: sum(moved.values()))
            rows.append(row_of(method, accumulation, large, highest))
            write(results)
    return results


def requested_rows(args: Any) -> list[tuple[str, int]]:
    """Return the methods to count, each with the micro-batches of its steps."""
    return [(method, 1) for method in args.methods] + [(method, args.accumulation) for method in args.accumulating]


def row_of(method: str, accumulation: int, large: bool, moved: dict[str, float]) -> Row:
    """Return the row of a method whose step of ``accumulation`` micro-batches moves ``moved``."""
    total = sum(moved.values())
    return {
        "method": method,
        "accumulation": accumulation,
        "large": large,
        "moved": moved,
        "total": total,
        "of_micro_batch": total / accumulation,
    }


def describe(results: dict[str, Any]) -> str:
    """Format the rows as Markdown."""
    work = results["workload"]
    lines = [
        [
            row["method"],
            str(row["accumulation"]),
            counted_as(row),
            *(f"{row['moved'][kind]:.2f}" for kind in KINDS),
            f"{row['total']:.2f}",
            f"**{row['of_micro_batch']:.2f}**",
        ]
        for row in results["rows"]
    ]
    header = ["method", "micro-batches", "counted as", *KINDS, "total", "**per micro-batch**"]
    recomputes = ", activations recomputed in backward" if work["checkpointing"] else ""
    return (
        "# Bytes between ranks in a step\n\n"
        f"{work['model']}, {results['ranks']} ranks, {work['precision']}{recomputes}. "
        "In units of P, the bytes of all parameters: the full tensors that are gathered or scattered, twice the full "
        "tensors that are all-reduced.\n\n"
        + "".join(f"- {finding}\n" for finding in findings(results["rows"]))
        + "\n"
        + result_files.table(header, lines)
        + "\nAs a large model: backward gathers all parameters again, as DeepSpeed does with more than a billion "
        "parameters. The traffic of the published scheme is derived from its code: with clipping two passes, each with "
        "a gather in forward, a gather in backward and an all-reduce of the gradients.\n"
    )


def findings(rows: list[Row]) -> list[str]:
    """Compare layered accumulation with the other ways to accumulate, each counted as a large model."""
    accumulating = [row for row in rows if row["large"] and row["accumulation"] > 1]
    layered = [row for row in accumulating if methods.LAYERED in row["method"]]
    return [
        f"{own['method']} moves **{other['of_micro_batch'] / own['of_micro_batch']:.1f}** times fewer bytes per token "
        f"than {other['method']}, with {own['accumulation']} micro-batches in a step."
        for own in layered
        for other in accumulating
        if other not in layered
    ]


def counted_as(row: Row) -> str:
    """Describe how a row was counted."""
    if row["method"].startswith(PUBLISHED):
        return "derived from code"
    return "a large model" if row["large"] else "this model"


def draw(results: dict[str, Any]) -> Any:
    """Draw a bar for each method as in a large model, divided by collective."""
    rows = [row for row in results["rows"] if row["large"]]
    figure, axes = result_files.pyplot().subplots(figsize=(9, 1.6 + 0.4 * len(rows)), layout="constrained")
    places = list(range(len(rows), 0, -1))
    left = [0.0] * len(rows)
    for kind in KINDS:
        widths = [row["moved"][kind] / row["accumulation"] for row in rows]
        hatches = ["//" if row["method"].startswith(PUBLISHED) else "" for row in rows]
        if max(widths) > 0.005:
            axes.barh(places, widths, 0.7, left=left, color=COLORS[kind], label=kind, hatch=hatches, edgecolor="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end in zip(places, left, strict=True):
        axes.annotate(f" {end:.2f} P", (end, place), va="center", fontsize=9, fontweight="bold")
    axes.set_yticks(places, [named(row) for row in rows])
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("in units of all parameters' bytes P, for a model too large to stay gathered")
    axes.set_title("Bytes between ranks for one micro-batch", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure


def named(row: Row) -> str:
    """Return the label of a row in the picture."""
    return row["method"] if row["accumulation"] == 1 else f"{row['method']}, {row['accumulation']} micro-batches"


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    options.add_workload(parser, models=None, sequence=32, batch=1)
    parser.set_defaults(precision="bf16")
    parser.add_argument("--model", default="toy", help="a preset of lomo_ds.models, toy or tiny; toy by default")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=options.methods_help(METHODS))
    parser.add_argument(
        "--accumulating", nargs="*", default=ACCUMULATING, metavar="METHOD",
        help=f"methods of further rows with several micro-batches in a step; {' '.join(ACCUMULATING)} by default",
    )  # fmt: skip
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of these rows; 8 by default")
    parser.add_argument("--ranks", type=int, default=2, help="2 by default")
    parser.add_argument("--simulate_world", type=int, help="simulate rank 0 of this world size in one process instead")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    args = parser.parse_args()
    result_files.require("matplotlib")
    options.resolve(args, parser, 1 if args.simulate_world else args.ranks)
    for method, accumulation in requested_rows(args):
        if reason := methods.unavailability(method, 2, accumulation):
            parser.error(f"{method} cannot be counted with {accumulation} micro-batches on several ranks: {reason}")

    def write(results: dict[str, Any]) -> None:
        result_files.write_results(args.output_dir, "traffic", results, describe(results), show=False)

    results = count_all(args, write)
    result_files.write_results(args.output_dir, "traffic", results, describe(results), draw(results))


if __name__ == "__main__":
    main()
