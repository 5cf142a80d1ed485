"""Compares the bandwidth of the update of a shard with that of a plain copy of the same number of bytes.

    python benchmarks/update.py

An update by SGD reads a shard and its gradient and writes the shard, so no update is faster than a plain copy of the
same number of bytes. AdaLomo reads the gradient three times, for its row and column sums, for the norm of its direction
and for the update, and the shard twice, because a step is proportional to its norm. For each kind of shard (fp32; bf16
rounded to nearest; bf16 and fp16 rounded stochastically; int8 weights, whose gradients are bf16), each size and each
implementation, the benchmark reports

- the update's bytes per second: the bytes that it must read and write, divided by its median time
- its share of the copy's bandwidth: median and quartiles, with copy and update timed one after the other

The implementations are lomo_ds's update in PyTorch operations (eager), lomo_ds's update by its Triton kernel (triton),
and the same arithmetic compiled by torch.compile (compiled), which draws its noise from torch's global generator. fp32
has no kernel: one PyTorch operation updates all shards. AdaLomo computes with PyTorch operations up to the last step,
which is applied as in training. On a GPU, times are measured with events after overwriting the
cache, and sizes are those of LLaMA's matrices. On a CPU, small sizes stay in the cache, for the copy and the update.
"""

import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import result_files
from benchmarks.lib.kernels import fallbacks, kernel_states
from lomo_ds.numerics import apply, int8
from lomo_ds.numerics.flat import ceil_div, pieces
from lomo_ds.numerics.float_eager import update_half, update_single
from lomo_ds.numerics.int8 import Values, eager
from lomo_ds.numerics.rounding_noise import RoundingNoise
from lomo_ds.update.rules import AdaLomo, Gradient
from lomo_ds.update.target import Target

GB = 1e9
LR, DECAY = 1e-3, 0.999  # DECAY multiplies the weights, so that weight decay is computed too
EAGER, TRITON, COMPILED = "eager", "triton", "compiled"
COLORS = {EAGER: "#e08e45", TRITON: "#1b7f79", COMPILED: "#7a6fb0"}
GPU_ELEMENTS = [4096 * 4096, 11008 * 4096, 32000 * 4096]
CPU_ELEMENTS = [2**20]
GPU_CACHE_BYTES = 2**28  # larger than the cache of any GPU
COLUMNS = 4096  # of the matrix that AdaLomo updates
WARM_UP = 2  # rounds that are not counted, for compilation

Update = Callable[[Any, Tensor], None]  # writes a shard from its gradient
Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """The dtype of a shard, its rounding and its rule. Gradients of int8 weights are bf16."""

    name: str
    dtype: torch.dtype
    stochastic: bool = False
    rule: str = "lomo"

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Data type of the gradient that updates a shard."""
        return torch.bfloat16 if self.dtype == torch.int8 else self.dtype

    def shard(self, elements: int, device: torch.device) -> Values:
        """Return a shard of random values."""
        values = torch.randn(elements, device=device).to(self.gradient_dtype)
        return int8.view_blocks(int8.quantize_flat(values), elements) if self.dtype == torch.int8 else values

    def bytes_moved(self, elements: int) -> int:
        """Return the bytes that an update moves: it reads the shard and the gradient, and writes the shard."""
        shard = int8.quantized_bytes(elements) if self.dtype == torch.int8 else elements * self.dtype.itemsize
        gradient = elements * self.gradient_dtype.itemsize
        return 3 * shard + 3 * gradient if self.rule == "adalomo" else 2 * shard + gradient


KINDS = [
    Kind("fp32", torch.float32),
    Kind("bf16 nearest", torch.bfloat16),
    Kind("bf16 stochastic", torch.bfloat16, stochastic=True),
    Kind("fp16 stochastic", torch.float16, stochastic=True),
    Kind("int8 nearest", torch.int8),
    Kind("int8 stochastic", torch.int8, stochastic=True),
    Kind("fp32 adalomo", torch.float32, rule="adalomo"),
    Kind("bf16 stochastic adalomo", torch.bfloat16, stochastic=True, rule="adalomo"),
    Kind("int8 stochastic adalomo", torch.int8, stochastic=True, rule="adalomo"),
]


def ways_here(device: torch.device) -> list[str]:
    """Return the implementations that are available on this machine."""
    has_triton = importlib.util.find_spec("triton") is not None
    if device.type == "cuda":
        return [EAGER, TRITON, COMPILED] if has_triton else [EAGER]
    return [EAGER, COMPILED] if shutil.which("c++") else [EAGER]


def ways_by_default(device: torch.device) -> list[str]:
    """Return the implementations compared by default; on a CPU only eager, because compilation takes too long."""
    return ways_here(device) if device.type == "cuda" else [EAGER]


def ways_of(kind: Kind, ways: list[str]) -> list[str]:
    """Return the implementations among ``ways`` that exist for shards of this kind."""
    if kind.rule == "adalomo":
        return [way for way in ways if way != COMPILED][-1:]
    missing = {torch.float32: TRITON, torch.int8: COMPILED}
    return [way for way in ways if way != missing.get(kind.dtype)]


def update_of(way: str, kind: Kind, device: torch.device) -> Update:
    """Return an implementation of the update for shards of this kind."""
    generator = torch.Generator(device).manual_seed(0) if kind.stochastic else None
    noise = None if generator is None else RoundingNoise(generator)
    if kind.rule == "adalomo":
        return _adalomo(noise)
    if way == COMPILED:
        return _compiled(kind)
    if way == TRITON:  # as in training
        return lambda shard, gradient: apply.apply([(shard, apply.Update(gradient, LR, DECAY))], noise)
    if kind.dtype == torch.float32:
        return lambda shard, gradient: update_single([shard], [gradient], LR, DECAY)
    if kind.dtype == torch.int8:
        block_noise = int8.Noise(0, 0, 0) if kind.stochastic else None
        return lambda shard, gradient: eager.update_(shard.codes, shard.scales, gradient, LR, DECAY, block_noise)

    def update(shard: Tensor, gradient: Tensor) -> None:
        for part, gradient_part in pieces([shard], [gradient]):
            update_half(part, gradient_part, LR, DECAY, generator)

    return update


def _adalomo(noise: RoundingNoise | None) -> Update:
    """Return the update by AdaLomo of a slice of a matrix, as on one of several ranks but without their sums."""
    rule = AdaLomo()
    states: dict[int, dict[str, Tensor]] = {}

    def update(shard: Values, gradient: Tensor) -> None:
        numel = gradient.numel()
        shape = torch.Size([ceil_div(numel, COLUMNS), COLUMNS])
        target = Target("shard", shape, 0, numel, 0, {"lr": LR, "weight_decay": 1 - DECAY})
        if numel not in states:
            specs = rule.state(target)
            states[numel] = {name: torch.zeros(spec.shape, device=gradient.device) for name, spec in specs.items()}
        sums = rule.update(target, shard, Gradient(gradient), states[numel], step=1)
        partial = next(sums)
        try:
            while True:
                partial = sums.send(partial)
        except StopIteration as end:
            apply.apply([(shard, end.value)], noise)

    return update


def _compiled(kind: Kind) -> Update:
    """Compile the update of a whole tensor into one pass with torch.compile."""
    dropped_bits = 16 if kind.dtype == torch.bfloat16 else 13

    def update(shard: Tensor, gradient: Tensor) -> None:
        exact = shard.float() * DECAY - gradient.float() * LR
        if not kind.stochastic:
            shard.copy_(exact)
            return
        lift = torch.zeros_like(exact)
        if kind.dtype == torch.float16:
            lift = torch.where(exact.abs() < 2.0**-14, 2.0**-14, 0.0).copysign(exact)
        noise = torch.randint(0, 1 << dropped_bits, exact.shape, dtype=torch.int32, device=exact.device)
        bits = ((exact + lift).view(torch.int32) + noise) & -(1 << dropped_bits)
        shard.copy_(torch.where(exact.isnan(), exact, bits.view(torch.float32) - lift))

    return torch.compile(update, dynamic=True)


class Clock:
    """Measures the seconds of work on a device; on a GPU, with a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.cache = torch.empty(GPU_CACHE_BYTES if self.on_gpu else 0, dtype=torch.int8, device=device)

    def __call__(self, work: Callable[[], Any]) -> float:
        """Time one call of ``work``."""
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.cache.zero_()  # takes long enough for the host to run ahead of the device
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3


def measure(kind: Kind, elements: int, updates: dict[str, Update], device: torch.device, repetitions: int) -> list[Row]:
    """Time the copy and then every update, ``repetitions`` times, and return a row for each implementation."""
    shard = kind.shard(elements, device)
    gradient = torch.randn(elements, device=device).to(kind.gradient_dtype)
    source = torch.zeros(
        kind.bytes_moved(elements) // 2, dtype=torch.int8, device=device
    )  # each byte is read and written once
    target = torch.zeros_like(source)
    clock = Clock(device)
    copies: list[float] = []
    times: dict[str, list[float]] = {way: [] for way in updates}
    for _ in range(WARM_UP + repetitions):
        copies.append(clock(partial(target.copy_, source)))
        for way, update in updates.items():
            times[way].append(clock(partial(update, shard, gradient)))
    return [_row(kind, elements, way, copies[WARM_UP:], seconds[WARM_UP:]) for way, seconds in times.items()]


def _row(kind: Kind, elements: int, way: str, copies: list[float], times: list[float]) -> Row:
    shares = [copy / seconds for copy, seconds in zip(copies, times, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
    moved = kind.bytes_moved(elements)
    return {
        "kind": kind.name,
        "elements": elements,
        "way": way,
        "bytes": moved,
        "seconds": statistics.median(times),
        "copy_seconds": statistics.median(copies),
        "bytes_per_second": moved / statistics.median(times),
        "copy_bytes_per_second": moved / statistics.median(copies),
        "share_of_copy": middle,
        "share_quartiles": [low, high],
    }


def compare(
    all_elements: list[int],
    ways: list[str],
    repetitions: int,
    device: torch.device,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure every kind and size, and return the results; ``write`` is called with the results so far after each."""
    results: dict[str, Any] = {
        "environment": result_files.environment(*(["triton"] if TRITON in ways else [])),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "repetitions": repetitions,
        "rows": [],
    }
    with tqdm(total=len(KINDS) * len(all_elements), desc="updating", unit=" shards") as bar:
        for kind in KINDS:
            updates = {way: update_of(way, kind, device) for way in ways_of(kind, ways)}
            for elements in all_elements if updates else []:
                bar.set_postfix_str(f"{kind.name}, {elements:,} elements")
                results["rows"] += measure(kind, elements, updates, device, repetitions)
                bar.update()
                write(results)
    results["kernels"] = kernel_states(device, int8=True) if TRITON in ways else {}
    return results


def describe(results: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    lines = []
    for row in results["rows"]:
        low, high = row["share_quartiles"]
        lines.append(
            [
                row["kind"],
                f"{row['elements']:,}",
                row["way"],
                f"{1e3 * row['seconds']:.3f}",
                f"{row['bytes_per_second'] / GB:.1f}",
                f"{row['copy_bytes_per_second'] / GB:.1f}",
                f"**{row['share_of_copy']:.0%}**",
                f"{low:.0%} to {high:.0%}",
            ]
        )
    on = "the GPU" if results["device"] == "cuda" else f"the CPU, {results['threads']} thread"
    return (
        f"# The update compared with a copy of the same bytes, on {on}\n\n"
        f"Figures are medians of {results['repetitions']} rounds. "
        "Each round times the copy and then each implementation of the update.\n\n"
        + "".join(f"- {finding}\n" for finding in findings(results))
        + "\n"
        + result_files.table(["shard", "elements", "way", "ms", "GB/s", "copy GB/s", "of the copy", "quartiles"], lines)
        + "\nA GB is 10^9 bytes. An update reads a shard and its gradient and writes the shard; "
        "AdaLomo reads the shard twice, and the gradient three times.\n"
    )


def findings(results: dict[str, Any]) -> list[str]:
    """Describe the fastest implementation for each kind of shard at the largest size."""
    largest = max(row["elements"] for row in results["rows"])
    lines = [f"**{remark}**" for remark in fallbacks(results.get("kernels", {}))]
    for kind in KINDS:
        rows = [row for row in results["rows"] if row["kind"] == kind.name and row["elements"] == largest]
        if not rows:
            continue
        best = max(rows, key=lambda row: row["share_of_copy"])
        slower = [f"{row['way']} {row['share_of_copy']:.0%}" for row in rows if row is not best]
        lines.append(
            f"{kind.name}: {best['way']} reaches **{best['share_of_copy']:.0%}** of a copy's bandwidth at "
            f"{largest:,} elements" + (f" ({', '.join(slower)})." if slower else ".")
        )
    return lines


def draw(results: dict[str, Any]) -> Any:
    """Draw a panel for each size: bars of the share of the copy's bandwidth, by kind of shard and implementation."""
    sizes = sorted({row["elements"] for row in results["rows"]})
    ways = [way for way in COLORS if any(row["way"] == way for row in results["rows"])]
    figure, all_axes = result_files.pyplot().subplots(
        1, len(sizes), figsize=(1.5 + 5.0 * len(sizes), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, elements in zip(all_axes[0], sizes, strict=True):
        for side, way in enumerate(ways):
            _draw_bars(axes, way, side - (len(ways) - 1) / 2, 0.8 / len(ways), elements, results)
        axes.axhline(1.0, color="#222222", linestyle="--", linewidth=1.3, label="a copy of the same bytes", zorder=0)
        axes.set_title(f"{elements:,} elements", fontsize=11, loc="left")
        axes.set_xticks(range(len(KINDS)), [kind.name.replace(" ", "\n") for kind in KINDS])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0][0].set_ylabel("of a copy's bandwidth")
    figure.legend(
        *all_axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ways) + 1, frameon=False
    )
    figure.suptitle("Bandwidth of the update of a shard, as a share of a copy's", fontsize=13, fontweight="bold")
    return figure


def _draw_bars(axes: Any, way: str, side: float, width: float, elements: int, results: dict[str, Any]) -> None:
    places = {kind.name: place + side * width for place, kind in enumerate(KINDS)}
    rows = [row for row in results["rows"] if row["way"] == way and row["elements"] == elements]
    shares = [row["share_of_copy"] for row in rows]
    spread = list(zip(*(row["share_quartiles"] for row in rows), strict=True))
    errors = [
        [max(0.0, share - low) for share, low in zip(shares, spread[0], strict=True)],
        [max(0.0, high - share) for share, high in zip(shares, spread[1], strict=True)],
    ]
    bars = axes.bar(
        [places[row["kind"]] for row in rows],
        shares,
        width * 0.92,
        yerr=errors,
        color=COLORS[way],
        label=way,
        error_kw={"linewidth": 1.0, "ecolor": "#222222"},
    )
    axes.bar_label(bars, labels=[f"{share:.0%}" for share in shares], fontsize=8, padding=3)


def main() -> None:
    """Run the benchmark and write its results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # with several threads on shared cores, times would include waiting
    default = GPU_ELEMENTS if device.type == "cuda" else CPU_ELEMENTS
    parser = result_files.build_parser(__doc__)
    parser.add_argument(
        "--elements",
        type=int,
        nargs="+",
        default=default,
        help=f"sizes of a shard; {default} by default on this machine",
    )
    parser.add_argument("--repetitions", type=int, default=10, help="rounds; 10 by default")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=ways_here(device),
        default=ways_by_default(device),
        help="by default all on a GPU, eager on a CPU",
    )
    args = parser.parse_args()
    result_files.require("matplotlib")

    def write(results: dict[str, Any]) -> None:
        result_files.write_results(args.output_dir, "update", results, describe(results), show=False)

    results = compare(args.elements, args.ways, args.repetitions, device, write)
    result_files.write_results(args.output_dir, "update", results, describe(results), draw(results))


if __name__ == "__main__":
    main()
