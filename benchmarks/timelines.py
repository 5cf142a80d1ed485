"""Planned seconds of a step beside its timeline: the real engine on a simulated GPU, with a virtual clock.

    python benchmarks/timelines.py                                     # every preset and store, on 1 and 8 GPUs
    python benchmarks/timelines.py --models 7b --variants two_pass     # one variant of one model

It needs no GPU. Each row records a step of rank 0, which takes some tens of seconds, and runs the record on each
machine. The variants (int8 weights, layered accumulation, a stash, two passes) are those of ``--variant_models``; all
other rows update immediately, one row of tokens at a time. Results:

- the seconds of the timeline and of the plan (launch/plan.py), and their ratio
- the lane of the machine that is busy longest, and the busy share of each
- the longest stall of that lane: what it waits for, and the line of code that makes it wait
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import result_files
from benchmarks.lib.options import pluralize
from lomo_ds.models.presets import PRESETS
from lomo_ds.planner import Machine, PlannedModel, Settings, plan_run
from lomo_ds.planner.simulated_step import record_plan
from lomo_ds.simulate import Lane, Timeline, longest_stalls, run_program

STORES = ("none", "cpu", "nvme")
GPUS = [1, 8]
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "layered": {"accumulation_steps": 8, "accumulation": "layered"},
    "stash": {"update_schedule": "stash", "stash_device": "gpu", "gradient_clipping": 1.0},
    "two_pass": {"update_schedule": "two_pass", "gradient_clipping": 1.0},
}
AMPLE_HOST = 2**40
# the plan of a machine decides nothing else than speed: all of them have the memory of the first
MACHINES = {
    "RTX 3090": Machine(host_memory=AMPLE_HOST, nvme=3e9),
    "H100": Machine(
        host_memory=AMPLE_HOST, nvme=6e9, pcie=50e9, gpu_link=350e9, flops=989e12, memory_bandwidth=3.35e12
    ),
}
NEAR = 0.10  # by how much a plan may differ from its timeline
COLORS = {"RTX 3090": "#1b7f79", "H100": "#e08e45"}

Row = dict[str, Any]


@dataclass(frozen=True)
class SimulatedCase:
    """A job to plan and to record."""

    model: str
    gpus: int
    store: str
    variant: str

    def __str__(self) -> str:
        return f"{self.model}, {self.gpus} x {self.store}, {self.variant}"


def cases(args: argparse.Namespace) -> list[SimulatedCase]:
    """Return the cases of the command line."""
    rows = [
        SimulatedCase(model, gpus, store, "immediate")
        for model in args.models
        for gpus in args.gpus
        for store in args.stores
    ]
    models = [model for model in args.models if model in args.variant_models]
    return rows + [
        SimulatedCase(model, gpus, store, variant)
        for model in models
        for variant in args.variants
        for gpus in args.gpus
        for store in args.stores
        if (variant, store) != ("int8", "nvme")  # which the engine refuses
    ]


def measure(case: SimulatedCase, model: PlannedModel, args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each machine; the step is recorded once."""
    settings = Settings(
        gpus=case.gpus,
        sequence=args.sequence,
        offload_param=case.store,  # type: ignore[arg-type]
        gradient_checkpointing=True,
        **{"gradient_clipping": 0.0, **VARIANTS.get(case.variant, {})},
    )
    plans = {name: plan_run(model, settings, machine) for name, machine in MACHINES.items()}
    program = record_plan(next(iter(plans.values())), model)
    for name, plan in plans.items():
        timeline = run_program(program, plan.machine)
        yield (
            vars(case)
            | {"machine": name, "planned": plan.time.total, "bound": plan.time.bottleneck_name}
            | of_timeline(timeline)
        )


def of_timeline(timeline: Timeline) -> Row:
    """Return the seconds of a timeline, the busy share of each lane, and the longest stall of the busiest one."""
    busy = {lane: timeline.busy_share(lane) for lane in Lane}
    busiest = max(busy, key=lambda lane: busy[lane])
    stall = next(iter(longest_stalls(timeline, busiest, 1)), None)
    return {
        "seconds": timeline.seconds,
        "busy": {lane.value: share for lane, share in busy.items()},
        "busiest": busiest.value,
        "stall": None
        if stall is None
        else {"reason": stall.reason, "source": stall.source, "seconds": stall.seconds, "count": stall.count},
    }


def measure_all(args: argparse.Namespace, write: Callable[[Row], None]) -> Row:
    """Measure every case; ``write`` is called with the results so far after each."""
    rows: list[Row] = []
    results = {"environment": result_files.environment(gpus=[]), "sequence": args.sequence, "rows": rows}
    models: dict[str, PlannedModel] = {}
    bar = tqdm(cases(args), desc="recording", unit=" steps")
    for case in bar:
        bar.set_postfix_str(str(case))
        model = models.setdefault(case.model, PlannedModel.load(case.model))
        rows.extend(measure(case, model, args))
        write(results)
    return results


def ratio(row: Row) -> float:
    """Return the planned seconds as a multiple of those of the timeline."""
    return float(row["planned"] / row["seconds"])


def describe(results: Row) -> str:
    """Format the rows as Markdown."""
    rows = results["rows"]
    header = [
        "",
        "machine",
        "timeline s",
        "planned s",
        "ratio",
        "busiest",
        *(lane.value for lane in Lane),
        "its longest stall",
    ]
    far = [row for row in rows if abs(ratio(row) - 1) > NEAR]
    ratios = [ratio(row) for row in rows]
    return (
        f"# Plans and timelines\n\nA row of {results['sequence']} tokens on each GPU, activations recomputed, bf16. "
        "Lanes: their busy share of the step.\n\n"
        f"{result_files.table(header, [cells(row) for row in rows])}\n"
        f"Of {len(rows)} plans {len(rows) - len(far)} are within {NEAR:.0%} of their timeline; planned seconds are "
        f"{min(ratios):.2f} to {max(ratios):.2f} times those of the timeline.\n"
    )


def cells(row: Row) -> list[str]:
    """Return the cells of a row."""
    name = f"{row['model']}, {pluralize(row['gpus'], 'GPU')}, {STORE_NAMES[row['store']]}, {row['variant']}"
    stall = row["stall"]
    words = "" if stall is None else f"{stall['seconds']:.2g} s: {stall['reason']} (`{stall['source']}`)"
    shares = [f"{row['busy'][lane.value]:.0%}" for lane in Lane]
    mark = "" if abs(ratio(row) - 1) <= NEAR else "**"
    return [
        name,
        row["machine"],
        f"{row['seconds']:.3g}",
        f"{row['planned']:.3g}",
        f"{mark}{ratio(row):.2f}{mark}",
        row["busiest"],
        *shares,
        words,
    ]


STORE_NAMES = {"none": "on the GPU", "cpu": "in host memory", "nvme": "on NVMe"}


def draw(results: Row) -> Any:
    """Draw the ratio over the seconds of the timeline."""
    figure, axes = result_files.pyplot().subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, color in COLORS.items():
        rows = [row for row in results["rows"] if row["machine"] == name]
        axes.scatter([row["seconds"] for row in rows], [ratio(row) for row in rows], color=color, label=name, alpha=0.8)
    axes.axhspan(1 - NEAR, 1 + NEAR, color="#dddddd", zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of a step on the timeline")
    axes.set_ylabel("planned / timeline")
    axes.set_title("Planned seconds, all presets and stores", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=list(PRESETS), help="presets; all by default")
    parser.add_argument("--stores", nargs="+", choices=STORE_NAMES, default=STORES, help="where the parameters are")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="1 and 8 by default")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="all by default")
    parser.add_argument("--variant_models", nargs="*", choices=PRESETS, default=["7b"], help="7b by default")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a row; 1024 by default")
    args = parser.parse_args()
    result_files.require("matplotlib")

    def write(results: Row) -> None:
        result_files.write_results(args.output_dir, "timelines", results, describe(results), show=False)

    results = measure_all(args, write)
    result_files.write_results(args.output_dir, "timelines", results, describe(results), draw(results))


if __name__ == "__main__":
    main()
