"""Tokens per GPU and second, peak memory and share of peak FLOP/s: the LOMO paper's Table 2, with other methods.

    python benchmarks/throughput.py                                       # small, on CPU ranks
    python benchmarks/throughput.py --rows 7b:1 --sequence 1024 --checkpointing    # the paper's, on a GPU
    python benchmarks/throughput.py --rows 40m:2x8 --large --checkpointing --methods immediate+layered \
        --vs stash deepspeed-sgd --name accumulation                      # ways to accumulate 8 micro-batches

A row is a model, a number of ranks and, after an x, the micro-batches of a step if there are several. Every method of a
row has its own processes. All methods of a row are alive at once and take turns: one steps while the others wait.
Rounds of turns go on for --seconds. The result is the median over the rounds. Ratios are taken within a round, so that
a slow machine affects both sides; their median, lowest and highest values are reported. The first steps, which
DeepSpeed traces, are not timed.

The share of peak FLOP/s counts 6 operations for each weight that a token is multiplied with and 12 x layers x hidden
size x sequence for attention, without recomputation. The device's peak is the maker's figure for half precision on
known GPUs, and otherwise the rate of a large matrix multiplication. A CPU rank has one thread, so its peak is that of
one core, or a part of it if there are more ranks than cores. Memory is the allocator's peak on a GPU. On the CPU it is
the peak of all live tensors, tracked in a step that is not timed; see benchmarks/memory.py.

lomo-optim comes with the extra `bench`; for torchtune: pip install --no-deps torchtune==0.6.1 (its optimizer in
backward needs only torch; the rest of torchtune needs twenty more packages).
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import methods, options, result_files
from benchmarks.lib.contest import Contest, Entrant, ratios, synchronize
from benchmarks.lib.kernels import fallbacks
from benchmarks.lib.workers import DOES_NOT_FIT, RankState, Workers
from benchmarks.lib.workload import DTYPES, LARGE, flops_per_token
from lomo_ds.numerics.flat import ceil_div

METHODS = ["immediate", "stash+clip"]
# default methods to compare with, on one rank and on several
PEERS_ALONE = ["plain", "lomo-optim", "torchtune", "lomo-optim+clip"]
PEERS = ["two_pass+clip", "deepspeed-sgd+clip"]
ROWS = ["toy:1", "40m:1", "40m:2"]
# upper limits of step time ratios, by device and by whether there are several ranks
GOALS = {
    ("cpu", False): {
        ("immediate", "plain"): 1.10,
        ("immediate", "lomo-optim"): 1.00,
        ("stash+clip", "lomo-optim+clip"): 0.60,
    },
    ("cpu", True): {("stash+clip", "two_pass+clip"): 0.60, ("stash+clip", "deepspeed-sgd+clip"): 1.00},
    ("cuda", False): {
        ("immediate", "plain"): 1.03,
        ("immediate", "lomo-optim"): 1.00,
        ("immediate", "torchtune"): 1.00,
        ("stash+clip", "lomo-optim+clip"): 1 / 1.8,
    },
    ("cuda", True): {},
}
# dense half precision with fp32 accumulation, TFLOP/s, from the makers' data sheets; the first match counts
PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
}
OURS, DEEPSPEED, ALONE = "lomo_ds", "DeepSpeed's ZeRO-3", "one process only"
COLORS = {OURS: "#1b7f79", DEEPSPEED: "#8e6c8a", ALONE: "#e08e45"}

Row = dict[str, Any]


def matmul_flops(state: RankState, precision: str) -> float:
    """Measure the operations per second of a large matrix multiplication, on a rank."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name()
    size = 8192 if torch.cuda.is_available() and "cuda" in device else 1536
    matrix = torch.ones(size, size, dtype=DTYPES[precision], device=device)
    best = 0.0
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        matrix @ matrix
        synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def known_gpu(name: str) -> str | None:
    """Return the entry of ``PEAK_TFLOPS`` that matches the name of a GPU."""
    return next((known for known in PEAK_TFLOPS if all(word in name for word in known.split())), None)


def peak_flops(device: str, precision: str, given_tflops: float | None) -> tuple[float, str]:
    """Return the peak operations per second of a device, and the source of the figure."""
    if given_tflops is not None:
        return given_tflops * 1e12, "as given"
    if device == "cuda" and precision != "fp32":
        known = known_gpu(torch.cuda.get_device_name())
        if known is not None:
            return PEAK_TFLOPS[known] * 1e12, f"the maker's figure for {known}"
    with Workers(1, device) as workers:
        return workers.call(matmul_flops, precision)[0], "attained by a matrix multiplication on the idle machine"


def compare(
    entrants: list[Entrant],
    ranks: int,
    device: str,
    flops: float,
    seconds: float,
    timeout: float,
    report: Callable[[str], None],
) -> Row:
    """Compare the methods of one row; ``flops`` is the peak of a rank in operations per second."""
    accumulation = entrants[0].work.accumulation
    reasons = {entrant.label: methods.unavailability(entrant.method, ranks, accumulation) for entrant in entrants}
    available = [entrant for entrant in entrants if reasons[entrant.label] is None]
    deadline = time.monotonic() + timeout
    with Contest(available, ranks, device, report) as contest:
        contest.build(deadline)
        rows = contest.compare(seconds, deadline)
    add_share_of_peak(rows, available, flops)
    return {
        "model": entrants[0].work.model,
        "ranks": ranks,
        "workload": methods.workload_as_dict(entrants[0].work),
        "rows": rows,
        "ratios": ratios(rows, GOALS[device, ranks > 1]),
        "skipped": {label: reason for label, reason in reasons.items() if reason is not None},
    }


def add_share_of_peak(rows: list[Row], entrants: list[Entrant], flops: float) -> None:
    """Add to each measured row its share of ``flops``, the peak operations per second."""
    for row, entrant in zip(rows, entrants, strict=True):
        if row["outcome"] == "measured":
            row["share_of_peak"] = row["tokens_per_second"] * flops_per_token(entrant.work) / flops


def compare_all(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure every requested row; ``write`` is called with the results so far after each."""
    flops, origin = peak_flops(args.device, args.precision, args.peak_tflops)
    results: dict[str, Any] = {
        "environment": result_files.environment(*installed_peers()),
        "device": args.device,
        "peak_flops": flops,
        "peak_flops_from": origin,
        "groups": [],
    }
    bar = tqdm(args.rows, desc="comparing", unit=" rows")
    for model, ranks, accumulation in bar:
        work = options.build_workload(args, model, args.checkpointing)
        work = replace(work, accumulation=accumulation, zero=LARGE if args.large else {})
        peers = args.vs if args.vs is not None else PEERS_ALONE if ranks == 1 else PEERS
        names = dict.fromkeys([*args.methods, *peers])
        entrants = [Entrant(name, name, work, leads=name in args.methods) for name in names]
        share = flops if args.device == "cuda" else flops * min(1.0, len(os.sched_getaffinity(0)) / ranks)
        report = bar.set_postfix_str
        group = compare(entrants, ranks, args.device, share, args.seconds, args.timeout, report)
        results["groups"].append(group)
        write(results)
    return results


def installed_peers() -> list[str]:
    """Return the installed packages of other methods, whose versions are recorded."""
    return [name for name in methods.INSTALL if methods.unavailability(name, 1) is None]


def describe(results: dict[str, Any]) -> str:
    """Format the table and the ratios as Markdown."""
    unit, divisor = ("GiB", 2**30) if results["device"] == "cuda" else ("MiB", 2**20)
    lines = [
        [row["label"], group["model"], str(group["ranks"]), str(accumulation_of(group)), *_figures(row, divisor)]
        for group in results["groups"]
        for row in group["rows"]
    ]
    work = results["groups"][0]["workload"]
    settings = ", activations recomputed in backward" if work["checkpointing"] else ""
    if work["zero"]:
        settings += ", and parameters are gathered only while in use, as with more than a billion of them"
    text = (
        "# Throughput of a training step\n\n"
        f"Sequence {work['sequence']}, batch {work['batch']} per rank and micro-batch, {work['precision']}{settings}. "
        f"The device's peak is {results['peak_flops'] / 1e12:.3g} TFLOP/s, {results['peak_flops_from']}.\n\n"
        + result_files.table(
            [
                "method",
                "model",
                "ranks",
                "micro-batches",
                "tokens per rank and second",
                f"peak memory {unit}",
                "share of peak FLOP/s",
            ],
            lines,
        )
    )
    for group in results["groups"]:
        text += f"\n## {title_of(group)}\n\n" + _ratio_table(group)
        for name, reason in group["skipped"].items():
            text += f"\nLeft out: {name}: {reason}.\n"
        for row in group["rows"]:
            for remark in fallbacks(row.get("kernels", {})):
                text += f"\n**{row['label']}: {remark}**\n"
            if row["outcome"] not in ("measured", DOES_NOT_FIT):
                text += f"\nFailed: {row['label']}: `{row['outcome'].strip().splitlines()[-1]}`\n"
    return text


def _figures(row: Row, divisor: float) -> list[str]:
    if row["outcome"] != "measured":
        return [f"**{DOES_NOT_FIT if row['outcome'] == DOES_NOT_FIT else 'failed'}**", "", ""]
    peak = "" if row["peak"] is None else f"{row['peak'] / divisor:.2f}"
    return [f"{row['tokens_per_second']:.4g}", peak, f"{row['share_of_peak']:.1%}"]


def _ratio_table(group: Row) -> str:
    lines = []
    for ratio in group["ratios"]:
        verdict = "" if ratio["goal"] is None else f"{ratio['goal']:.2f}: {'met' if ratio['met'] else '**missed**'}"
        memory = "" if ratio["memory"] is None else f"{ratio['memory']:.2f}"
        spread = f"**{ratio['median']:.2f}** ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        lines.append([f"{ratio['ours']} / {ratio['other']}", spread, verdict, memory])
    return result_files.table(["ratio", "step time (range over rounds)", "at most", "peak memory"], lines)


def draw(results: dict[str, Any]) -> Any:
    """Draw a panel for each row, with a bar for each method and its range over rounds."""
    groups = results["groups"]
    across = min(2, len(groups))
    down = ceil_div(len(groups), across)
    tallest = max(len(group["rows"]) for group in groups)
    figure, panels = result_files.pyplot().subplots(
        down, across, figsize=(6.4 * across, (1.3 + 0.36 * tallest) * down), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, group in zip(panels.flat, groups, strict=False):
        _panel(axes, group)
    figure.suptitle("Tokens per rank and second, and the range over the rounds", fontweight="bold", x=0.01, ha="left")
    figure.legend(
        [panels[0, 0].barh(0, 0, color=color) for color in COLORS.values()],
        list(COLORS),
        ncols=len(COLORS),
        loc="outside lower left",
        frameon=False,
    )
    return figure


def _panel(axes: Any, group: Row) -> None:
    rows = [row for row in group["rows"] if row["outcome"] == "measured"]
    places = list(range(len(rows), 0, -1))
    rates = [row["tokens_per_second"] for row in rows]
    tokens = [row["workload"]["sequence"] * row["workload"]["batch"] * accumulation_of(group) for row in rows]
    lows = [rate - count / max(row["seconds"]) for row, rate, count in zip(rows, rates, tokens, strict=True)]
    highs = [count / min(row["seconds"]) - rate for row, rate, count in zip(rows, rates, tokens, strict=True)]
    axes.barh(places, rates, 0.7, color=[_color(row["method"]) for row in rows])
    axes.errorbar(rates, places, xerr=[lows, highs], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    ends = [rate + high for rate, high in zip(rates, highs, strict=True)]
    for place, end, rate in zip(places, ends, rates, strict=True):
        axes.annotate(f"  {rate:.4g}", (end, place), va="center", fontsize=8)
    axes.set_yticks(places, [row["label"] for row in rows], fontsize=9)
    axes.set_xlim(0, 1.18 * max(ends, default=1.0))
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.set_title(title_of(group), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def title_of(group: Row) -> str:
    """Return the title of a row of several methods."""
    accumulation = accumulation_of(group)
    suffix = f", {accumulation} micro-batches" if accumulation > 1 else ""
    return f"{group['model']} on {options.pluralize(group['ranks'], 'rank')}{suffix}"


def accumulation_of(group: Row) -> int:
    """Return the number of micro-batches in a step."""
    return int(group["workload"]["accumulation"])


def _color(method: str) -> str:
    base = methods.base_method(method)
    return COLORS[OURS if base in methods.LOMO_DS else DEEPSPEED if base in methods.DEEPSPEED_ZERO3 else ALONE]


def row_of(text: str) -> tuple[str, int, int]:
    """Parse ``MODEL:RANKS`` or ``MODEL:RANKSxACCUMULATION`` from the command line."""
    match = re.fullmatch(r"([^:]+):([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"a row is MODEL:RANKS or MODEL:RANKSxACCUMULATION, for example 40m:2 or 40m:2x8, got {text!r}"
        )
    model, ranks, accumulation = match.groups()
    return model, int(ranks), int(accumulation or 1)


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    parser.add_argument(
        "--rows", nargs="+", type=row_of, default=[row_of(text) for text in ROWS], metavar="MODEL:RANKS[xN]",
        help="presets of lomo_ds.models, toy or tiny, numbers of ranks, and N micro-batches of a step; "
        f"{' '.join(ROWS)} by default",
    )  # fmt: skip
    options.add_workload(parser, models=None, sequence=128, batch=2)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, metavar="METHOD",
        help=f"methods that the others are compared with, {options.methods_help(METHODS)}",
    )  # fmt: skip
    parser.add_argument(
        "--vs", nargs="*", metavar="METHOD",
        help=f"methods to run beside them; {' '.join(PEERS_ALONE)} on one rank, {' '.join(PEERS)} on several",
    )  # fmt: skip
    parser.add_argument(
        "--large", action="store_true", help="gather parameters only while in use, as with more than a billion of them"
    )
    parser.add_argument("--name", default="throughput", help="name of the result files; throughput by default")
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of the rounds of a row; 6 by default")
    parser.add_argument("--timeout", type=float, default=600.0, help="time limit of a row in seconds; 600 by default")
    parser.add_argument("--peak_tflops", type=float, help="peak of the device, if its maker's figure is not known")
    args = parser.parse_args()
    result_files.require("matplotlib")
    options.resolve(args, parser, max(ranks for _, ranks, _ in args.rows))

    def write(results: dict[str, Any]) -> None:
        result_files.write_results(args.output_dir, args.name, results, describe(results), show=False)

    results = compare_all(args, write)
    result_files.write_results(args.output_dir, args.name, results, describe(results), draw(results))


if __name__ == "__main__":
    main()
