"""The causes of a step's time: waiting for other ranks, DeepSpeed's hooks, lomo_ds, or the model's own arithmetic.

    python benchmarks/causes.py

The toy model has sixteen narrow layers, so that overhead beside arithmetic is as visible as possible. While rank 0
steps, a thread samples its stack every millisecond; the innermost file that belongs to a cause determines the cause. A
plain PyTorch step of the same model, which drops its gradients, is measured for comparison.
"""

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import methods, result_files
from benchmarks.lib.workers import RankState, Workers
from benchmarks.lib.workload import TOY, Workload

# parts of file names by cause; the innermost frame that matches counts, and the first cause that matches it
CAUSES = {
    "collectives": ("/torch/distributed/", "/deepspeed/comm/"),
    "linear layers": ("/lomo_ds/zero3/linear.py",),
    "lomo_ds": ("/lomo_ds/",),
    "DeepSpeed's hooks": ("/deepspeed/",),
    "backward": ("/torch/autograd/graph.py",),
    "forward": ("/transformers/", "/torch/nn/functional.py", "/torch/nn/modules/linear.py"),
}
OTHER = "other"
COLORS = dict(
    zip([*CAUSES, OTHER], ("#c0392b", "#1b7f79", "#d9b44a", "#e08e45", "#5b7f95", "#9fb8c4", "#d7dee1"), strict=True)
)
INTERVAL = 0.001  # seconds between two samples
WARM_UP = 4
CASES = [(1, "plain", ""), (1, "stash+clip", ""), (2, "stash+clip", "module"), (2, "stash+clip", "layer")]

Row = dict[str, Any]


class StackSampler:
    """Samples the stack of the main thread while it is entered.

    Attributes:
        samples: number of samples by cause.
    """

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(threading.get_ident(),), daemon=True)

    def __enter__(self) -> "StackSampler":
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(INTERVAL / 2)  # by default the main thread would run for longer than the interval
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()
        sys.setswitchinterval(self._interval)

    def _sample(self, thread: int) -> None:
        while not self._stopped.wait(INTERVAL):
            self.samples[cause_of(sys._current_frames()[thread])] += 1


def cause_of(frame: FrameType | None) -> str:
    """Return the cause of the innermost frame that belongs to one."""
    while frame is not None:
        for cause, words in CAUSES.items():
            if any(word in frame.f_code.co_filename for word in words):
                return cause
        frame = frame.f_back
    return OTHER


def measure(state: RankState, method: str, work: Workload, steps: int) -> Row:
    """Measure the seconds of a step without sampling, then the share of each cause, on a rank."""
    built = methods.build(method, work)
    for _ in range(WARM_UP):
        built.step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        built.step()
        seconds.append(time.perf_counter() - start)
    with StackSampler() as sampler:
        for _ in range(steps):
            built.step()
    total = sampler.samples.total()
    return {
        "seconds": sorted(seconds)[steps // 2],
        "looks": total,
        "shares": {cause: sampler.samples[cause] / total for cause in [*CAUSES, OTHER]},
    }


def run(steps: int) -> list[Row]:
    """Measure every case in its own processes."""
    rows = []
    for ranks, method, granularity in tqdm(CASES, desc="sampling", unit="case"):
        lomo = {"gather_granularity": granularity} if granularity else {}
        with Workers(ranks, "cpu") as workers:
            measured = workers.call(measure, method, Workload(TOY, sequence=16, batch=2, lomo=lomo), steps)[0]
        label = f"{method}, {ranks} rank{'s' if ranks > 1 else ''}{', by ' + granularity if granularity else ''}"
        rows.append({"label": label, "ranks": ranks, "method": method, "granularity": granularity, **measured})
    return rows


def markdown(rows: list[Row]) -> str:
    """Format the milliseconds of a step by cause as Markdown."""
    shown = [
        [row["label"], f"**{1e3 * row['seconds']:.1f}**"]
        + [f"{1e3 * row['seconds'] * share:.1f}" for share in row["shares"].values()]
        for row in rows
    ]
    return (
        "# Where the time of a step goes\n\n16 layers of hidden size 64, 32 tokens per rank, fp32; milliseconds of a "
        "step (median), divided by what rank 0 was running, sampled every millisecond. Linear layers that do not save "
        "their weight include their matrix products; collectives include the wait for other ranks and for shared "
        "cores.\n\n" + result_files.table(["", "step", *CAUSES, OTHER], shown)
    )


def draw(rows: list[Row]) -> Any:
    """Draw a bar for each case, divided by cause."""
    figure, axes = result_files.pyplot().subplots(figsize=(9, 0.7 * len(rows) + 1.8), layout="constrained")
    left = [0.0] * len(rows)
    for cause in [*CAUSES, OTHER]:
        widths = [1e3 * row["seconds"] * row["shares"][cause] for row in rows]
        axes.barh([row["label"] for row in rows], widths, left=left, label=cause, color=COLORS[cause])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    parser.add_argument(
        "--steps", type=int, default=40, help="number of sampled steps and of timed steps; 40 by default"
    )
    args = parser.parse_args()
    result_files.require("matplotlib")
    rows = run(args.steps)
    results = {"environment": result_files.environment(), "rows": rows}
    result_files.write_results(args.output_dir, "causes", results, markdown(rows), draw(rows))


if __name__ == "__main__":
    main()
