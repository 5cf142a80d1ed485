"""Where the time of a step goes: waiting for other ranks, DeepSpeed's hooks, lomo_ds, or the model's own arithmetic.

    python benchmarks/causes.py

The toy has sixteen narrow layers, so that what a step costs beside arithmetic shows most. While rank 0 steps, a thread
looks every millisecond at what it is running; the innermost file that one of the causes owns tells the cause. A plain
PyTorch step of the same model, gradients dropped, stands beside them.
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

# the innermost frame whose file holds one of the words names the cause; the first that fits
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
EVERY = 0.001  # seconds between two looks
WARM_UP = 4
CASES = [(1, "plain", ""), (1, "stash+clip", ""), (2, "stash+clip", "module"), (2, "stash+clip", "layer")]

Row = dict[str, Any]


class Watch:
    """Looks at what the main thread runs, while it is entered.

    Attributes:
        seen: how often each cause was.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(threading.get_ident(),), daemon=True)

    def __enter__(self) -> "Watch":
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(EVERY / 2)  # the interpreter would let the main thread run longer than that
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        sys.setswitchinterval(self._interval)

    def _look(self, watched: int) -> None:
        while not self._over.wait(EVERY):
            self.seen[cause_of(sys._current_frames()[watched])] += 1


def cause_of(frame: FrameType | None) -> str:
    """The cause that owns the innermost frame that any of them owns."""
    while frame is not None:
        for cause, words in CAUSES.items():
            if any(word in frame.f_code.co_filename for word in words):
                return cause
        frame = frame.f_back
    return OTHER


def measure(state: RankState, method: str, work: Workload, steps: int) -> Row:
    """On a rank: seconds of a step, unwatched, and the share of each cause."""
    built = methods.build(method, work)
    for _ in range(WARM_UP):
        built.step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        built.step()
        seconds.append(time.perf_counter() - start)
    with Watch() as watch:
        for _ in range(steps):
            built.step()
    total = watch.seen.total()
    return {
        "seconds": sorted(seconds)[steps // 2],
        "looks": total,
        "shares": {cause: watch.seen[cause] / total for cause in [*CAUSES, OTHER]},
    }


def run(steps: int) -> list[Row]:
    """Every case, in processes of its own."""
    rows = []
    for ranks, method, granularity in tqdm(CASES, desc="watching", unit="case"):
        lomo = {"gather_granularity": granularity} if granularity else {}
        with Workers(ranks, "cpu") as workers:
            found = workers.call(measure, method, Workload(TOY, sequence=16, batch=2, lomo=lomo), steps)[0]
        label = f"{method}, {ranks} rank{'s' if ranks > 1 else ''}{', by ' + granularity if granularity else ''}"
        rows.append({"label": label, "ranks": ranks, "method": method, "granularity": granularity, **found})
    return rows


def markdown(rows: list[Row]) -> str:
    """Milliseconds of a step by cause."""
    shown = [
        [row["label"], f"**{1e3 * row['seconds']:.1f}**"]
        + [f"{1e3 * row['seconds'] * share:.1f}" for share in row["shares"].values()]
        for row in rows
    ]
    return (
        "# Where the time of a step goes\n\n16 layers of hidden size 64, 32 tokens a rank, fp32; milliseconds of a "
        "step (median), and of it what rank 0 was running, as looked at every millisecond. Linear layers "
        "that keep no weight hold their matrix products too; collectives hold the wait for other ranks, and for the "
        "cores they share.\n\n" + result_files.table(["", "step", *CAUSES, OTHER], shown)
    )


def draw(rows: list[Row]) -> Any:
    """A bar for each case, cut by cause."""
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
    """Run the benchmark of the command line."""
    parser = result_files.build_parser(__doc__)
    parser.add_argument("--steps", type=int, default=40, help="watched, and as many timed; 40 by default")
    args = parser.parse_args()
    result_files.require("matplotlib")
    rows = run(args.steps)
    results = {"environment": result_files.environment(), "rows": rows}
    result_files.write_results(args.output_dir, "causes", results, markdown(rows), draw(rows))


if __name__ == "__main__":
    main()
