"""Training models larger than GPU memory: parameters in host memory, one GPU of 24 GiB, and the use of its link.

    python benchmarks/offload.py                                    # 13B and 30B on a GPU capped at 24 GiB
    python benchmarks/offload.py --models 7b --batches 1 4          # what fits into 64 GB of host memory

All parameters are in pinned host memory (offload_param). A step copies them to the GPU twice, for forward and for
backward, and copies the updated ones back during backward. The bytes do not depend on the number of tokens. Results:

- tokens per second, and the seconds of a step (the median)
- the peak of torch's allocator on the GPU, which is limited to the cap, and pinned host memory
- counted GB per step to the GPU (up) and from the GPU (down)
- the share of the link: the rate of copies to the GPU in a step, divided by the rate of pinned copies alone
- the plan for 30B and 65B on one GPU of 24 GB with a link of 24 GB/s (launch/plan.py)

On a machine without CUDA a small model runs on the CPU, where host memory is the only memory. That shows that the code
runs and what it copies; its times mean nothing.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import methods, options, result_files
from benchmarks.lib.footprint import limit_allocator
from benchmarks.lib.kernels import fallbacks, kernel_states
from benchmarks.lib.workers import DoesNotFit, RankState, WorkerError, Workers
from benchmarks.lib.workload import LARGE, Workload, parameter_count
from benchmarks.memory import STAYS_GATHERED

GIB, GB = 2.0**30, 1e9
GPU_MODELS, CPU_MODELS = ["13b", "30b"], ["40m"]
GPU_BATCHES, CPU_BATCHES = [1, 2, 4, 8, 16], [1, 4]
TARGET_SHARE = 0.80
OFFLOAD: dict[str, Any] = {"offload_param": {"device": "cpu", "pin_memory": True}}
# tokens per second of all GPUs together, eight RTX 3090 or four: arXiv 2306.09782, Table 2
PAPER = {"30b": ("4 GPUs", 46.4), "65b": ("8 GPUs", 39.4)}
# makes a small model gather its parameters again in backward, like a large one
GATHER_AGAIN = {name: value for name, value in LARGE.items() if "prefetch" not in name}
PLANNED_LINK = 24e9  # bytes per second that PCIe 4.0 x16 reaches
PLANNED_BATCHES = [1, 4, 16]
TRACED = 2  # steps in which DeepSpeed traces the model
COLORS = {"up": "#1b7f79", "plan": "#e08e45"}

Row = dict[str, Any]


class Traffic:
    """Counts the bytes of every copy between host memory and the device."""

    def __init__(self) -> None:
        self.up = self.down = 0

    def start(self) -> None:
        """Start counting in this process."""
        from lomo_ds.memory.host_memory import Fetch, HostTransfer
        from lomo_ds.zero3.wire import PlainWireFormat

        pack, offload, start_fetch = PlainWireFormat.pack, HostTransfer.offload, HostTransfer.start_fetch

        def counted_pack(wire: PlainWireFormat, shard: Tensor) -> Tensor:
            self.up += shard.nbytes
            return pack(wire, shard)

        def counted_offload(transfer: HostTransfer, tensor: Tensor, host_tensor: Tensor) -> None:
            self.down += tensor.nbytes
            offload(transfer, tensor, host_tensor)

        def counted_fetch(transfer: HostTransfer, host_tensor: Tensor) -> Fetch:
            self.up += host_tensor.nbytes
            return start_fetch(transfer, host_tensor)

        vars_of: Any = (PlainWireFormat, HostTransfer)
        vars_of[0].pack, vars_of[1].offload, vars_of[1].start_fetch = counted_pack, counted_offload, counted_fetch


def limit(state: RankState, cap_gib: float) -> None:
    """Limit the allocator to the cap, on a rank."""
    if torch.cuda.is_initialized():
        limit_allocator(cap_gib)


def measure_link(state: RankState) -> dict[str, float]:
    """Measure bytes per second of pinned copies up, down, and in both directions at once, on a rank."""
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    on_gpu = device.type == "cuda"
    size = 2**28 if on_gpu else 2**24
    hosts = [torch.ones(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
    devices = [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2)]
    module = torch.get_device_module(device)
    streams = [module.Stream(device), module.Stream(device)]

    def seconds(up: bool, down: bool) -> float:
        best = float("inf")
        for _ in range(5):
            get_accelerator().synchronize()
            start = time.perf_counter()
            for _ in range(4):
                if up:
                    with module.stream(streams[0]):
                        devices[0].copy_(hosts[0], non_blocking=True)
                if down:
                    with module.stream(streams[1]):
                        hosts[1].copy_(devices[1], non_blocking=True)
            get_accelerator().synchronize()
            best = min(best, (time.perf_counter() - start) / 4)
        return best

    return {
        "up": size / seconds(True, False),
        "down": size / seconds(False, True),
        "each of both": size / seconds(True, True),
    }


def build(state: RankState, method: str, work: Workload) -> dict[str, Any]:
    """Build the model in host memory and return its bytes there, on a rank."""
    from lomo_ds import zero3
    from lomo_ds.memory.host_memory import storage_bytes

    state["traffic"] = Traffic()
    state["traffic"].start()
    state["built"] = methods.build(method, work)
    shards = zero3.shards(state["built"].model)
    return {"parameters": storage_bytes(shard.data for shard in shards)}


def measure(state: RankState, work: Workload, steps: int) -> Row:
    """Measure steps with the batch of a workload, on a rank."""
    from deepspeed.accelerator import get_accelerator

    from lomo_ds.memory.host_memory import storage_bytes

    built, traffic = state["built"], state["traffic"]
    built.micro_batches = work.micro_batches(built.device)
    for _ in range(TRACED):
        built.step()
    accelerator = get_accelerator()
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    traffic.up = traffic.down = 0
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = built.step()
        accelerator.synchronize()
        times.append(time.perf_counter() - start)
    on_gpu = torch.cuda.is_available() and built.device.type == "cuda"
    return {
        "seconds": statistics.median(times),
        "slowest": max(times),
        "up": traffic.up / steps,
        "down": traffic.down / steps,
        "peak_allocated": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
        "stash": storage_bytes(tensor for tensor in built.gradients() if tensor.device.type == "cpu") if on_gpu else 0,
        "loss": float(loss),
    }


def measure_all(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure every requested row; ``write`` is called with the results so far after each."""
    rows: list[Row] = []
    results = {
        "environment": result_files.environment(),
        "device": args.device,
        "cap": args.cap,
        "rows": rows,
        "plans": plans(),
    }
    bar = tqdm(total=len(args.models) * len(args.methods) * len(args.batches), desc="measuring", unit=" rows")
    for model in args.models:
        for method in args.methods:
            for row in measure_batches(args, model, method, bar.set_postfix_str):
                rows.append(row)
                bar.update()
                write(results)
    bar.close()
    return results


def measure_batches(
    args: argparse.Namespace, model: str, method: str, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch size in ascending order, until one fails."""
    work = replace(options.build_workload(args, model, True), zero=OFFLOAD | args.zero)
    if parameter_count(work) < STAYS_GATHERED:
        work = replace(work, zero=GATHER_AGAIN | work.zero)
    row: Row = {"model": model, "method": method, "workload": methods.workload_as_dict(work)}
    with Workers(1, args.device) as workers:
        try:
            report(f"building {model}, {method}")
            workers.call(limit, args.cap)
            row["link"] = workers.call(measure_link)[0]
            row["host"] = workers.call(build, method, work, timeout=args.timeout)[0]
            for batch in args.batches:
                report(f"{model}, {method}, batch {batch}")
                measured = workers.call(measure, replace(work, batch=batch), args.steps, timeout=args.timeout)[0]
                kernels = workers.call(kernels_in_use, methods.uses_int8(method))[0]
                yield row | {"outcome": "measured", "batch": batch, "kernels": kernels, **measured}
        except DoesNotFit:
            yield row | {"outcome": "does not fit"}
        except WorkerError as error:
            yield row | {"outcome": str(error)}


def kernels_in_use(state: RankState, int8: bool) -> dict[str, str]:
    """Return the states of the Triton kernels that the method uses, on a rank; see ``kernel_states``."""
    return kernel_states(state["built"].device, int8)


def plans() -> list[Row]:
    """Plan the paper's models on one GPU with all parameters in host memory."""
    from lomo_ds.planner import Machine, PlannedModel, Settings, plan_run

    rows: list[Row] = []
    machine = Machine(pcie=PLANNED_LINK, host_memory=256 * 2**30)
    for model in PAPER:
        planned_model = PlannedModel.load(model)
        for batch in PLANNED_BATCHES:
            run = Settings(
                batch=batch,
                gradient_clipping=0.0,
                gradient_checkpointing=True,
                activation_offload=True,
                offload_param="cpu",
            )
            for settings in (run, run.but(weights="int8")):
                plan = plan_run(planned_model, settings, machine)
                rows.append(
                    {
                        "model": model,
                        "weights": settings.weights,
                        "tokens": run.tokens,
                        "tokens_per_second": plan.tokens_per_second,
                        "bound": plan.time.bottleneck_name,
                        "gpu": plan.gpu_bytes,
                        "fits": plan.fits,
                        "host": plan.host_bytes,
                    }
                )
    return rows


def describe_plans(rows: list[Row]) -> str:
    """Format the plans as a Markdown table."""
    header = [
        "by plan",
        "weights",
        "tokens per step",
        "tokens/s",
        "bound by",
        "GiB on the GPU",
        "GiB pinned",
        "the paper's",
    ]
    lines = [
        [
            row["model"],
            "bf16" if row["weights"] == "auto" else row["weights"],
            str(row["tokens"]),
            f"**{row['tokens_per_second']:.0f}**" if row["fits"] else "**does not fit**",
            row["bound"],
            f"{row['gpu'] / GIB:.1f}",
            f"{row['host'] / GIB:.0f}",
            f"{PAPER[row['model']][1]:.0f} on {PAPER[row['model']][0]}",
        ]
        for row in rows
    ]
    return (
        f"\nPlans for one GPU of 24 GB, with a link of {PLANNED_LINK / GB:.0f} GB/s, 256 GB of host memory and 0.6 of "
        "71 TFLOP/s for matrix products; `immediate` without clipping, activations recomputed from checkpoints in host "
        "memory:\n\n" + result_files.table(header, lines)
    )


def share_of_link(row: Row) -> float:
    """Return the share of the link's rate that copies to the GPU reach in a step."""
    return row["up"] / row["seconds"] / row["link"]["up"]


def tokens_per_second(row: Row) -> float:
    """Return the tokens per second of the GPU."""
    return row["batch"] * row["workload"]["sequence"] / row["seconds"]


def describe(results: dict[str, Any]) -> str:
    """Format the rows as Markdown."""
    on_gpu = results["device"] == "cuda"
    header = [
        "",
        "tokens/s",
        "s per step",
        "GB up",
        "GB down",
        "share of the link",
        "peak GiB on the GPU",
        "GiB pinned",
    ]
    lines = [cells(row, on_gpu) for row in results["rows"]]
    setup = f"One GPU capped at {results['cap']:g} GiB" if on_gpu else "**No GPU: times and shares mean nothing.** CPU"
    text = f"# Parameters in host memory\n\n{setup}, all parameters in host memory.\n\n" + result_files.table(
        header, lines
    )
    measured = [row for row in results["rows"] if row["outcome"] == "measured"]
    if measured and on_gpu:
        link = measured[-1]["link"]
        text += (
            f"\nThe link: {link['up'] / GB:.1f} GB/s up, {link['down'] / GB:.1f} down, {link['each of both'] / GB:.1f} "
            f"in each direction when both are busy. Target: at least {TARGET_SHARE:.2f} of it.\n"
        )
    for model, (gpus, rate) in PAPER.items():
        if any(row["model"] == model for row in results["rows"]):
            text += f"\nThe paper's {model} on {gpus}: {rate:.0f} tokens/s in total, 1024 tokens per GPU and step.\n"
    text += "".join(f"\n**{name(row)}: {remark}**\n" for row in measured for remark in fallbacks(row["kernels"]))
    text += describe_plans(results["plans"])
    broken = [row for row in results["rows"] if row["outcome"] not in ("measured", "does not fit")]
    return text + "".join(f"\nFailed: {name(row)}: `{row['outcome'].strip().splitlines()[-1]}`\n" for row in broken)


def name(row: Row) -> str:
    """Return the first cell of a row."""
    batch = f", {row['batch']} x {row['workload']['sequence']}" if "batch" in row else ""
    return f"{row['model']}, {row['method']}{batch}"


def cells(row: Row, on_gpu: bool) -> list[str]:
    """Return the cells of a row."""
    if row["outcome"] != "measured":
        return [name(row), "**does not fit**" if row["outcome"] == "does not fit" else "**failed**", *[""] * 6]
    pinned = row["host"]["parameters"] + row["stash"]
    peak = f"{row['peak_reserved'] / GIB:.1f}" if on_gpu else ""
    return [
        name(row),
        f"**{tokens_per_second(row):.0f}**",
        f"{row['seconds']:.2f}",
        f"{row['up'] / GB:.2f}",
        f"{row['down'] / GB:.2f}",
        f"**{share_of_link(row):.2f}**",
        peak,
        f"{pinned / GIB:.1f}" if pinned >= GIB else f"{pinned / GIB:.2f}",
    ]


def draw(results: dict[str, Any]) -> Any:
    """Draw tokens per second over tokens per step, a line for each model and method."""
    figure, axes = result_files.pyplot().subplots(figsize=(7.5, 4.5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in results["rows"]:
        if row["outcome"] == "measured":
            tokens = row["batch"] * row["workload"]["sequence"]
            lines.setdefault(f"{row['model']}, {row['method']}", []).append((tokens, tokens_per_second(row)))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    for model, (gpus, rate) in PAPER.items():
        if any(row["model"] == model for row in results["rows"]):
            axes.axhline(rate, linestyle=":", color="#555555")
            axes.annotate(f"the paper's {model}, {gpus}", (0.02, rate), xycoords=("axes fraction", "data"), va="bottom")
    axes.set_xlabel("tokens per step")
    axes.set_ylabel("tokens per second")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    remark = "" if results["device"] == "cuda" else " (on a CPU: times mean nothing)"
    axes.set_title(f"Parameters in host memory, one GPU{remark}", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.legend(frameon=False)
    return figure


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    options.add_workload(parser, models=None, sequence=1024, batch=1)
    parser.add_argument("--models", nargs="+", help="presets; 13b 30b on a GPU, 40m on the CPU by default")
    parser.add_argument("--batches", type=int, nargs="+", help="rows in a step; 1 2 4 8 16 on a GPU by default")
    parser.add_argument("--methods", nargs="+", default=["immediate"], help=options.methods_help(["immediate"]))
    parser.add_argument("--cap", type=float, default=24.0, help="GiB of the GPU that may be used; 24 by default")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each row; 3 by default")
    parser.add_argument(
        "--zero", type=options.json_object, default={}, metavar="JSON", help="further fields of zero_optimization"
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="time limit of a call in seconds; 900 by default")
    args = parser.parse_args()
    result_files.require("matplotlib")
    options.resolve(args, parser, 1)
    on_gpu = args.device == "cuda"
    args.tiled_logits = True
    args.models = args.models or (GPU_MODELS if on_gpu else CPU_MODELS)
    args.batches = sorted(args.batches or (GPU_BATCHES if on_gpu else CPU_BATCHES))
    if not on_gpu:
        print("benchmarks/offload.py: no CUDA GPU found; times mean nothing")

    def write(results: dict[str, Any]) -> None:
        result_files.write_results(args.output_dir, "offload", results, describe(results), show=False)

    results = measure_all(args, write)
    result_files.write_results(args.output_dir, "offload", results, describe(results), draw(results))


if __name__ == "__main__":
    main()
