"""Compares loading a checkpoint on several ranks with lomo_ds and with transformers' ZeRO-3 from_pretrained.

    python benchmarks/loading.py

It writes a random LLaMA of --gigabytes (bf16, safetensors, several files) and loads it with both in turn. Every load
runs in fresh processes, one per rank, after their imports and after a warm-up load of a tiny model. The files are
dropped from the page cache before each load. Results for each rank, as the median of --repetitions:

- bytes read: the increase of read_bytes in /proc/self/io. The kernel counts whole pages that it fetches from the disk
  for this process, by read calls, by page faults in mapped files and by read-ahead. A page that another rank has
  fetched before is not counted. Nothing is reported for file systems without a disk (tmpfs).
- peak host memory: VmHWM of /proc/self/status, reset at the start, minus VmRSS at the start. It is exact, and includes
  pages of mapped files, which the kernel may drop at any time. The peaks of anonymous memory (RssAnon) and of mapped
  pages (RssFile), sampled every few milliseconds, show how much of it these are.
- peak device memory: of torch's allocator, minus the bytes allocated at the start. GPUs are used only if there is one
  for every rank.
- seconds, from a barrier to the end of this rank's load.

Afterwards the shards of both are compared by checksums. lomo_ds guarantees an upper bound in host memory and in device
memory: a rank's own shards plus twice the largest tensor.
"""

import ctypes
import gc
import hashlib
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import result_files
from lomo_ds.numerics.flat import ceil_div

# Modules that import deepspeed are imported where they are used: deepspeed chooses its accelerator at import.

GB = 1e9
DTYPE = torch.bfloat16
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
LOMO_DS, TRANSFORMERS = "lomo_ds", "transformers"
SHAPES = {8.0: "7b", 0.5: "1b", 0.0: "40m"}  # presets by minimum gigabytes; the number of layers is adapted
COLORS = {LOMO_DS: "#1b7f79", TRANSFORMERS: "#e08e45"}
PARTS = 5  # files of the checkpoint
SAMPLE_SECONDS = 0.005
PRELOAD = ["lomo_ds.models", "accelerate", "transformers.integrations.deepspeed", "transformers.models.llama"]
COUNTED_BY = "read_bytes of /proc/self/io"

Row = dict[str, Any]  # results of one rank


def write_checkpoint(folder: Path, config: Any, parts: int) -> int:
    """Write a random LLaMA file by file, and return the bytes of its tensors."""
    from lomo_ds.models import Export, meta_model
    from lomo_ds.models.random_weights import random_piece

    model = meta_model(config, DTYPE)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    total = DTYPE.itemsize * sum(shape.numel() for shape in shapes.values())
    export = Export(folder, model, f"{ceil_div(total, parts * 10**6)}MB")
    export.start()
    bar = tqdm(desc=f"writing {folder.name}", total=total, unit="B", unit_scale=True)
    for file, names in export.files.items():
        drawn = (random_piece(name, shapes[name], 0, shapes[name].numel(), 0.02, seed=0) for name in names)
        export.write(file, {name: piece.to(DTYPE).view(shapes[name]) for name, piece in zip(names, drawn, strict=True)})
        bar.update(DTYPE.itemsize * sum(shapes[name].numel() for name in names))
    export.finish(model, None)
    bar.close()
    return total


def llama_config(gigabytes: float) -> Any:
    """Return the configuration of a LLaMA of about this many gigabytes in ``DTYPE``."""
    from lomo_ds.models.presets import preset_config

    preset = next(name for least, name in SHAPES.items() if gigabytes >= least)
    vocabulary = {"vocab_size": 4000} if preset == "40m" else {}  # otherwise embeddings would be most of the model
    one, two = (_numel(preset_config(preset, num_hidden_layers=layers, **vocabulary)) for layers in (1, 2))
    layers = max(1, 1 + round((gigabytes * GB / DTYPE.itemsize - one) / (two - one)))
    return preset_config(preset, num_hidden_layers=layers, **vocabulary)


def _numel(config: Any) -> int:
    from lomo_ds.models import meta_model

    return sum(parameter.numel() for parameter in meta_model(config, DTYPE).parameters())


def load(method: str, folder: Path) -> Any:
    """Load the model in ``folder``, partitioned over the ranks."""
    if method == LOMO_DS:
        from lomo_ds.models import load_config, load_model

        return load_model(str(folder), load_config(str(folder)), DS_CONFIG, DTYPE)
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    hf_config = HfDeepSpeedConfig(DS_CONFIG)  # must be alive during the load: transformers looks for it
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    del hf_config
    return model


def memory(process: int | str = "self") -> dict[str, int]:
    """Return the resident bytes of a process: now (VmRSS, with RssAnon and RssFile), and at the peak (VmHWM)."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def bytes_read() -> int:
    """Return the bytes that the kernel has fetched from disks for this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["read_bytes"])


def measure(method: str, folder: Path) -> tuple[Row, Any]:
    """Load the model, and return the results of this rank and the shards."""
    from lomo_ds import zero3

    on_gpu = torch.cuda.is_available() and os.environ["DS_ACCELERATOR"] == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    device_start = torch.cuda.memory_allocated() if on_gpu else 0
    torch.distributed.barrier()
    start, read_start, host_start = time.perf_counter(), bytes_read(), memory()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    model = load(method, folder)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, read, host = time.perf_counter() - start, bytes_read() - read_start, memory()["VmHWM"] - host_start
    shards = zero3.shards(model)
    row = {
        "bytes_read": read,
        "peak_host_bytes": host,
        "peak_device_bytes": torch.cuda.max_memory_allocated() - device_start if on_gpu else None,
        "seconds": seconds,
        "shard_bytes": sum(shard.data.nbytes for shard in shards),
        "largest_tensor_bytes": max(shard.shape.numel() * shard.data.itemsize for shard in shards),
    }
    return row, shards


def checksums(shards: Any) -> dict[str, str]:
    """Return the checksum of each parameter's shard by name."""
    return {shard.name: hashlib.sha256(shard.data.cpu().view(torch.uint8).numpy().data).hexdigest() for shard in shards}


def _rank_process(
    connection: Connection, method: str, folder: Path, warm_up: Path, rank: int, ranks: int, port: int
) -> None:
    """Run one rank: prepare, report, load on request, then send the results and the checksums."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        _start_rank(method, warm_up, ranks)
        connection.send(memory())
        connection.recv()
        row, shards = measure(method, folder)
        connection.send(row)
        connection.recv()  # by now the others are done, and nobody's memory is looked at any more
        connection.send(checksums(shards))
    except Exception:
        connection.send(traceback.format_exc())


def _start_rank(method: str, warm_up: Path, ranks: int) -> None:
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    from lomo_ds.distributed.process_group import start_process_group

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # deepspeed's output would disturb the progress bar
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    transformers_logging.disable_progress_bar()
    start_process_group()
    load(method, warm_up)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the load would reuse freed memory of the warm-up


def load_on_ranks(method: str, folder: Path, warm_up: Path, ranks: int) -> tuple[list[Row], list[dict[str, str]]]:
    """Load once in fresh processes; return the results and the checksums of all ranks."""
    context: Any = multiprocessing.get_context("spawn" if os.environ["DS_ACCELERATOR"] == "cuda" else "forkserver")
    port = _free_port()
    connections, processes = [], []
    for rank in range(ranks):
        parent_end, child_end = context.Pipe()
        arguments = (child_end, method, folder, warm_up, rank, ranks, port)
        processes.append(context.Process(target=_rank_process, args=arguments, daemon=True))
        connections.append(parent_end)
        processes[rank].start()
        child_end.close()
    try:
        starts = [_receive(connection) for connection in connections]
        drop_from_page_cache(folder)
        for connection in connections:
            connection.send("load")
        peaks = _sample_until_answered(connections, processes)
        rows = [_receive(connection) for connection in connections]
        for connection in connections:
            connection.send("checksums")
        sums = [_receive(connection) for connection in connections]
    finally:
        for process in processes:
            process.join(5.0)
            process.kill()
    for rank, (row, start, peak) in enumerate(zip(rows, starts, peaks, strict=True)):
        row |= {"method": method, "rank": rank, "bound_bytes": row["shard_bytes"] + 2 * row["largest_tensor_bytes"]}
        row["peak_anonymous_bytes"] = max(0, peak["RssAnon"] - start["RssAnon"])
        row["peak_mapped_bytes"] = max(0, peak["RssFile"] - start["RssFile"])
    return rows, sums


def _sample_until_answered(connections: list[Connection], processes: list[Any]) -> list[dict[str, int]]:
    """Sample ``memory`` of each process until all have answered, and return the maximum of each figure."""
    peaks = [memory(process.pid) for process in processes]
    while len(wait(connections, timeout=SAMPLE_SECONDS)) < len(connections):
        if not all(process.is_alive() for process in processes):
            break
        for peak, process in zip(peaks, processes, strict=True):
            peak |= {name: max(peak[name], value) for name, value in memory(process.pid).items()}
        time.sleep(SAMPLE_SECONDS)  # wait returns at once when one rank has answered
    return peaks


def _receive(connection: Connection) -> Any:
    try:
        received = connection.recv()
    except EOFError:
        sys.exit("a rank died")
    if isinstance(received, str):
        sys.exit(f"a rank failed:\n{received}")
    return received


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def drop_from_page_cache(folder: Path) -> None:
    """Drop the files in ``folder`` from the page cache, so that the next read goes to the disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # dirty pages would stay in the cache
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reads_are_counted(folder: Path) -> bool:
    """Return whether ``drop_from_page_cache`` and ``bytes_read`` work for the files in ``folder``."""
    drop_from_page_cache(folder)
    before = bytes_read()
    size = sum(len(file.read_bytes()) for file in folder.iterdir())
    return bytes_read() - before >= size


def medians(loads: list[list[Row]], counted: bool) -> list[Row]:
    """Return a row for each rank: medians of its loads, and whether every load was within the bound."""
    rows = []
    for of_rank in zip(*loads, strict=True):
        row = dict(of_rank[0])
        for name in (name for name in row if name.startswith(("peak_", "bytes_", "seconds"))):
            row[name] = None if row[name] is None else statistics.median(load[name] for load in of_rank)
        if not counted:
            row["bytes_read"] = None
        row["within_bound"] = all(
            max(load["peak_host_bytes"], load["peak_device_bytes"] or 0) <= load["bound_bytes"] for load in of_rank
        )
        rows.append(row)
    return rows


def compare(
    folder: Path, gigabytes: float, ranks: int, repetitions: int, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Write the checkpoint into ``folder``, load it with both in turn, and return all that is reported.

    Args:
        write: callback that receives the results so far after each repetition.
    """
    from transformers import LlamaConfig

    config = llama_config(gigabytes)
    tiny = LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=2, vocab_size=4000)
    checkpoint, warm_up = folder / "checkpoint", folder / "warm_up"
    total = write_checkpoint(checkpoint, config, PARTS)
    write_checkpoint(warm_up, tiny, 1)
    counted = reads_are_counted(warm_up)
    loads: dict[str, list[list[Row]]] = {LOMO_DS: [], TRANSFORMERS: []}
    sums = []
    results: dict[str, Any] = {
        "environment": result_files.environment("accelerate"),
        "accelerator": os.environ["DS_ACCELERATOR"],
        "ranks": ranks,
        "bytes_read_counted_by": COUNTED_BY if counted else None,
        "loads": loads,
    }
    for method in tqdm([LOMO_DS, TRANSFORMERS] * repetitions, desc="loading", unit=" loads"):
        rows, of_ranks = load_on_ranks(method, checkpoint, warm_up, ranks)
        loads[method].append(rows)
        sums.append(of_ranks)
        if method == LOMO_DS:
            continue
        reported = {method: medians(of_method, counted) for method, of_method in loads.items()}
        results["checkpoint"] = {
            "bytes": total,
            "files": len(list(checkpoint.glob("*.safetensors"))),
            "largest_tensor_bytes": reported[LOMO_DS][0]["largest_tensor_bytes"],
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
        }
        results["repetitions"] = len(loads[TRANSFORMERS])
        results["bound_holds"] = {name: all(row["within_bound"] for row in rows) for name, rows in reported.items()}
        results["same_shards"] = all(of_ranks == sums[0] for of_ranks in sums)
        results["rows"] = [*reported[LOMO_DS], *reported[TRANSFORMERS]]
        write(results)
    return results


def rows_of(method: str, results: dict[str, Any]) -> list[Row]:
    """Return the rows of one method."""
    return [row for row in results["rows"] if row["method"] == method]


def describe(results: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    columns = {
        "GB read": "bytes_read",
        "own shards GB": "shard_bytes",
        "peak host GB": "peak_host_bytes",
        "anonymous GB": "peak_anonymous_bytes",
        "mapped files GB": "peak_mapped_bytes",
        "peak device GB": "peak_device_bytes",
        "bound GB": "bound_bytes",
    }
    if results["accelerator"] == "cpu":
        del columns["peak device GB"]
    lines = []
    for row in results["rows"]:
        figures = [_gb(row[name]) for name in columns.values()]
        within = "yes" if row["within_bound"] else "**no**"
        lines.append([row["method"], str(row["rank"]), *figures, within, f"{row['seconds']:.2f}"])
    checkpoint = results["checkpoint"]
    return (
        f"# Loading a checkpoint of {_gb(checkpoint['bytes'])} GB on {results['ranks']} ranks\n\n"
        f"A random LLaMA of {checkpoint['layers']} layers in {checkpoint['files']} safetensors files, bf16, dropped "
        f"from the page cache before each load. Figures are medians of {results['repetitions']} loads, each in fresh "
        "processes.\n\n"
        + "".join(f"- {finding}\n" for finding in findings(results))
        + "\n"
        + result_files.table(["method", "rank", *columns, "within bound", "seconds"], lines)
        + "\nA GB is 10^9 bytes. Peaks are relative to the start of the load. The peak of host memory includes "
        "anonymous memory and pages of mapped files, which the kernel may drop at any time; these two may reach their "
        "peaks at different times.\n"
    )


def findings(results: dict[str, Any]) -> list[str]:
    """Describe the results."""
    largest = _gb(results["checkpoint"]["largest_tensor_bytes"])
    lines = []
    for method, holds in results["bound_holds"].items():
        rows = [row for load in results["loads"][method] for row in load]
        most = max(max(row["peak_host_bytes"], row["peak_device_bytes"] or 0) / row["bound_bytes"] for row in rows)
        verdict = "holds" if holds else "does not hold"
        lines.append(
            f"The bound, a rank's own shards and twice the largest tensor ({largest} GB), **{verdict}** for {method}: "
            f"the highest peak of any load is {most:.0%} of it."
        )
    if results["bytes_read_counted_by"] is None:
        lines.append("Bytes read are not reported: the kernel counts none for files on this file system.")
    else:
        most = max(row["bytes_read"] / row["shard_bytes"] for row in rows_of(LOMO_DS, results))
        read = {
            method: sum(row["bytes_read"] for row in rows_of(method, results)) for method in (LOMO_DS, TRANSFORMERS)
        }
        lines.append(
            f"With {LOMO_DS} no rank reads more than {most:.1%} of the bytes of its own shards. All ranks together "
            f"read {_gb(read[LOMO_DS])} GB with {LOMO_DS} and {_gb(read[TRANSFORMERS])} GB with {TRANSFORMERS}, "
            f"counted by {results['bytes_read_counted_by']}."
        )
    same = "the same" if results["same_shards"] else "**not the same**"
    lines.append(f"The shards of all loads are {same}, according to a checksum of each parameter on each rank.")
    return lines


def _gb(count: float | None) -> str:
    return "not counted" if count is None else f"{count / GB:.3f}"


def draw(results: dict[str, Any]) -> Any:
    """Draw bars for each rank: bytes read, and memory peaks with their bound."""
    panels = {
        "bytes_read": ("Read from disk by each rank", "shard_bytes", "a rank's own shards"),
        "peak_host_bytes": (
            "Peak host memory of each rank, above the start",
            "bound_bytes",
            "bound: own shards + 2 x largest tensor",
        ),
        "peak_device_bytes": (
            "Peak device memory of each rank",
            "bound_bytes",
            "bound: own shards + 2 x largest tensor",
        ),
    }
    if results["accelerator"] == "cpu":
        del panels["peak_device_bytes"]
    figure, all_axes = result_files.pyplot().subplots(
        1, len(panels), figsize=(5.8 * len(panels), 5.0), layout="constrained", gridspec_kw={"wspace": 0.06}
    )
    for axes, (name, (title, limit, meaning)) in zip(all_axes, panels.items(), strict=True):
        for side, method in enumerate(COLORS):
            _draw_bars(axes, name, method, side, results)
        axes.axhline(
            results["rows"][0][limit] / GB, color="#222222", linestyle="--", linewidth=1.3, label=meaning, zorder=3
        )
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_ylabel("GB")
        axes.set_xticks(range(results["ranks"]), [f"rank {rank}" for rank in range(results["ranks"])])
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.1)
        (line, *bars), (limit_label, *labels) = axes.get_legend_handles_labels()
        axes.legend(
            [*bars, line],
            [*labels, limit_label],
            frameon=False,
            fontsize=9,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.08),
            ncols=2,
        )
    seconds = [f"{method} {max(row['seconds'] for row in rows_of(method, results)):.1f} s" for method in COLORS]
    figure.suptitle(
        f"Loading a LLaMA of {results['checkpoint']['bytes'] / GB:.2g} GB into {results['ranks']} ZeRO-3 ranks: "
        + ", ".join(seconds),
        fontsize=13,
        fontweight="bold",
    )
    return figure


def _draw_bars(axes: Any, name: str, method: str, side: int, results: dict[str, Any]) -> None:
    """Draw one method's bars; the part of host memory above the peak of anonymous memory is lighter."""
    rows = rows_of(method, results)
    places = [row["rank"] + (side - 0.5) * 0.4 for row in rows]
    heights = [(row[name] or 0) / GB for row in rows]
    split = name == "peak_host_bytes"
    solid = [min(row["peak_anonymous_bytes"], row[name]) / GB if split else (row[name] or 0) / GB for row in rows]
    bars = axes.bar(places, heights, 0.37, color=COLORS[method], alpha=0.4 if split else 1.0)
    axes.bar(places, solid, 0.37, color=COLORS[method], label=method)
    if split and method == TRANSFORMERS:
        axes.bar(places[0], 0, 0.37, color=COLORS[method], alpha=0.4, label="pages of mapped files")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=3, bbox=box, zorder=4)


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="processes that load; 4 by default")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint; 2 by default")
    parser.add_argument("--repetitions", type=int, default=3, help="loads with each method; 3 by default")
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to read from; the system's temporary folder by default"
    )
    args = parser.parse_args()
    result_files.require("accelerate", "matplotlib")
    gpu_each = torch.cuda.device_count() >= args.ranks
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu_each else "cpu")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)

    def write(results: dict[str, Any]) -> None:
        result_files.write_results(args.output_dir, "loading", results, describe(results), show=False)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = compare(Path(folder), args.gigabytes, args.ranks, args.repetitions, write)
    result_files.write_results(args.output_dir, "loading", results, describe(results), draw(results))


if __name__ == "__main__":
    main()
