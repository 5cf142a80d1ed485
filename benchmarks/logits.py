"""Memory, time and accuracy of the loss of a long batch, from the last hidden states to their gradient.

    python benchmarks/logits.py

Forward and backward of lm_head and cross-entropy alone, in bf16, on one GPU or else on the CPU:

- whole logits: torch's linear layer and transformers' ForCausalLMLoss;
- lomo_ds: its tiles, with --tile_mib of fp32 logits in each;
- DeepSpeed: its TiledFusedLogitsLoss, in shards of the same size;
- Liger: its fused linear cross-entropy, with the weight's gradient summed in bf16 and in fp32, if liger_kernel is
  installed and there is a GPU.

Results for each method and each number of --tokens:

- peak memory above the start, the two gradients included: by torch's allocator. On the CPU it is the running sum of the
  allocations and frees that torch's profiler has recorded.
- seconds, the median of --repetitions, in which the methods take turns; on the CPU, the processor time of one
  thread, which does not depend on other processes.
- errors of the gradients of the hidden states and of the weight, relative to fp32 gradients of the same bf16 values.
- the error of the weight's gradient if the loss is halved before backward, like an engine that scales losses.
- how often a gradient hook on the weight is called, and how often that is before backward has begun.
"""

import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import result_files

# Modules that import deepspeed are imported where they are used: deepspeed chooses its accelerator at import.

WHOLE, LOMO_DS, DEEPSPEED, LIGER, LIGER_FP32 = "whole logits", "lomo_ds", "DeepSpeed", "Liger", "Liger, fp32 sum"
COLORS = {WHOLE: "#777777", LOMO_DS: "#1b7f79", DEEPSPEED: "#e08e45", LIGER: "#7a5195", LIGER_FP32: "#b79ad0"}
MIB = 2**20
DTYPE = torch.bfloat16
SHARE = 0.5  # factor of the loss in the second measurement

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # mean loss of hidden states, weight and labels


class Batch:
    """Hidden states, a weight, and labels that these predict in part, on one device.

    Attributes:
        hidden: (tokens, hidden size).
        weight: (vocabulary, hidden size).
        labels: (tokens,); every eighth is ignored.
    """

    def __init__(self, tokens: int, vocabulary: int, hidden_size: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        weight = torch.randn(vocabulary, hidden_size, generator=generator, device=device) / math.sqrt(hidden_size)
        noise = torch.randn(tokens, hidden_size, generator=generator, device=device)
        hidden = noise + 6 * weight[self.labels]
        self.labels[::8] = -100
        self.hidden = hidden.to(DTYPE).requires_grad_()
        self.weight = Parameter(weight.to(DTYPE))

    def truth(self, tile_bytes: int) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the mean loss in fp32, by autograd on a few tokens at a time."""
        weight = self.weight.detach().float().requires_grad_()
        counted = (self.labels != -100).sum()
        gradients = []
        rows = max(1, tile_bytes // (4 * len(weight)))
        for hidden, labels in zip(self.hidden.detach().split(rows), self.labels.split(rows), strict=True):
            leaf = hidden.float().requires_grad_()
            (torch.nn.functional.cross_entropy(leaf @ weight.T, labels, reduction="sum") / counted).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        assert weight.grad is not None
        return torch.cat(gradients), weight.grad

    def forget(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


def methods(tile_bytes: int, on_gpu: bool) -> dict[str, Loss]:
    """Return the methods to compare, by name."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    from lomo_ds.models.tiled_loss import tiled_cross_entropy

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return ForCausalLMLoss(hidden @ weight.T, None, len(weight), shift_labels=labels)

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return tiled_cross_entropy(hidden, weight, None, labels, tile_bytes=tile_bytes) / (labels != -100).sum()

    def deepspeed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        counted = (labels != -100).sum()

        def loss(_: None, hidden: Tensor, labels: Tensor) -> Tensor:
            logits = (hidden @ weight.T).float()
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / counted

        shards = math.ceil(4 * len(hidden) * len(weight) / tile_bytes)
        arguments = (loss, None, hidden[None], labels[None], None, shards, [weight], "sum")
        mean: Tensor = TiledFusedLogitsLoss.apply(*arguments)
        return mean

    def liger(sum_dtype: torch.dtype | None) -> Loss:
        fused = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        return lambda hidden, weight, labels: fused(hidden, weight, labels, accum_dtype=sum_dtype)

    losses: dict[str, Loss] = {WHOLE: whole, LOMO_DS: ours, DEEPSPEED: deepspeed}
    if on_gpu and importlib.util.find_spec("liger_kernel"):
        losses |= {LIGER: liger(None), LIGER_FP32: liger(torch.float32)}
    return losses


def peak_bytes(step: Callable[[], Any], on_gpu: bool) -> int:
    """Measure the peak bytes of tensors in ``step``, above the bytes at its start."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def seconds(step: Callable[[], Any], on_gpu: bool) -> float:
    """Measure the seconds of ``step``."""
    if not on_gpu:
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(loss: Loss, batch: Batch, truth: tuple[Tensor, Tensor], on_gpu: bool) -> Row:
    """Measure everything except time of one method on one batch."""

    def step(share: float = 1.0) -> None:
        (loss(batch.hidden, batch.weight, batch.labels) * share).backward()

    batch.forget()
    row: Row = {"peak_bytes": peak_bytes(step, on_gpu)}
    row["error_of_hidden"] = _error(batch.hidden.grad, truth[0])
    row["error_of_weight"] = _error(batch.weight.grad, truth[1])
    batch.forget()
    hook_calls: list[bool] = []  # for each call of the hook, whether backward had begun
    begun = False
    hook = batch.weight.register_post_accumulate_grad_hook(lambda _: hook_calls.append(begun))
    scaled_loss = loss(batch.hidden, batch.weight, batch.labels) * SHARE
    begun = True
    scaled_loss.backward()
    hook.remove()
    row["error_of_weight_at_half"] = _error(batch.weight.grad, truth[1] * SHARE)
    row |= {"hook_calls": len(hook_calls), "hook_calls_in_forward": hook_calls.count(False)}
    batch.forget()
    return row


def _error(gradient: Tensor | None, truth: Tensor) -> float:
    assert gradient is not None
    return float((gradient.float() - truth).norm() / truth.norm())


def compare(
    tokens: list[int],
    vocabulary: int,
    hidden_size: int,
    tile_mib: int,
    repetitions: int,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure every method at every size, and return the results; ``write`` is called with them after each size."""
    on_gpu = torch.cuda.is_available() and os.environ["DS_ACCELERATOR"] == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False  # the truth is fp32
    if not on_gpu:
        torch.set_num_threads(1)
    compared = methods(tile_mib * MIB, on_gpu)
    results: dict[str, Any] = {
        "environment": result_files.environment(*(["liger_kernel"] if LIGER in compared else [])),
        "device": "cuda" if on_gpu else "cpu",
        "dtype": str(DTYPE).removeprefix("torch."),
        "vocabulary": vocabulary,
        "hidden_size": hidden_size,
        "tile_mib": tile_mib,
        "repetitions": repetitions,
        "rows": [],
    }
    bar = tqdm(desc="measuring", total=len(tokens) * len(compared) * (1 + repetitions), unit=" steps")
    for count in tokens:
        batch = Batch(count, vocabulary, hidden_size, "cuda" if on_gpu else "cpu")
        results["rows"] += _compare_on(batch, count, compared, tile_mib, repetitions, on_gpu, bar.update)
        write(results)
    bar.close()
    return results


def _compare_on(
    batch: Batch,
    count: int,
    compared: dict[str, Loss],
    tile_mib: int,
    repetitions: int,
    on_gpu: bool,
    done: Callable[[], Any],
) -> list[Row]:
    """Return a row for each method on one batch; the methods take turns while they are timed."""
    truth = batch.truth(tile_mib * MIB)
    rows: dict[str, Row] = {}
    for method, loss in compared.items():
        rows[method] = {"method": method, "tokens": count, **_outcome_of(loss, batch, truth, on_gpu)}
        done()
    del truth
    measured = [method for method in compared if rows[method]["peak_bytes"] is not None]
    times: dict[str, list[float]] = {method: [] for method in measured}
    for method in measured * repetitions:
        batch.forget()
        times[method].append(seconds(partial(_step, compared[method], batch), on_gpu))
        done()
    for method in compared:
        rows[method]["all_seconds"] = times.get(method, [])
        rows[method]["seconds"] = statistics.median(times[method]) if times.get(method) else None
    return list(rows.values())


def _step(loss: Loss, batch: Batch) -> None:
    loss(batch.hidden, batch.weight, batch.labels).backward()


def _outcome_of(loss: Loss, batch: Batch, truth: tuple[Tensor, Tensor], on_gpu: bool) -> Row:
    """Return the row of ``measure``; if memory runs out or the method fails, ``outcome`` and figures that are None."""
    try:
        return {"outcome": "measured", **measure(loss, batch, truth, on_gpu)}
    except torch.OutOfMemoryError:
        outcome = "does not fit"
    except Exception as error:  # third-party methods may raise anything; the other methods are still measured
        outcome = f"failed: {(str(error).strip().splitlines() or [repr(error)])[0]}"
    batch.forget()
    figures = ("peak_bytes", "error_of_hidden", "error_of_weight", "error_of_weight_at_half", "hook_calls",
               "hook_calls_in_forward")  # fmt: skip
    return {"outcome": outcome} | dict.fromkeys(figures)


def describe(results: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    header = ["method", "tokens", "peak MiB", "ms", "error of hidden", "of weight", "of weight, loss x 0.5",
              "hook calls on the weight", "of these in forward"]  # fmt: skip
    lines = []
    for row in results["rows"]:
        line = [row["method"], str(row["tokens"])]
        if row["peak_bytes"] is None:
            lines.append([*line, row["outcome"], *[""] * (len(header) - 3)])
            continue
        errors = [row["error_of_hidden"], row["error_of_weight"], row["error_of_weight_at_half"]]
        calls = [f"{row['hook_calls']} x", str(row["hook_calls_in_forward"])]
        figures = [f"{row['peak_bytes'] / MIB:.0f}", f"{1000 * row['seconds']:.1f}"]
        lines.append([*line, *figures, *(f"{error:.2%}" for error in errors), *calls])
    gradients = DTYPE.itemsize * results["hidden_size"] / MIB
    most = max(row["tokens"] for row in results["rows"])
    return (
        f"# From hidden states to the loss and back, on {'a GPU' if results['device'] == 'cuda' else 'the CPU'}\n\n"
        f"lm_head of {results['vocabulary']} x {results['hidden_size']} in {results['dtype']}, forward and backward; "
        f"tiles of {results['tile_mib']} MiB of fp32 logits. Peaks are above the start and hold the gradients, "
        f"{gradients * (results['vocabulary'] + most):.0f} MiB for {most} tokens. Times are medians of "
        f"{results['repetitions']}. Errors are relative to the gradients in fp32.\n\n"
        + "".join(f"- {finding}\n" for finding in findings(results))
        + "\n"
        + result_files.table(header, lines)
    )


def findings(results: dict[str, Any]) -> list[str]:
    """Describe the results of the largest batch."""
    most = max(row["tokens"] for row in results["rows"])
    rows = {row["method"]: row for row in results["rows"] if row["tokens"] == most}
    lomo_ds = rows.pop(LOMO_DS)
    if lomo_ds["peak_bytes"] is None:
        return [f"At {most} tokens {LOMO_DS}: {lomo_ds['outcome']}."]
    lines = []
    for method, row in rows.items():
        if row["peak_bytes"] is None:
            lines.append(f"At {most} tokens {method}: {row['outcome']}.")
            continue
        lines.append(
            f"At {most} tokens {LOMO_DS} takes {lomo_ds['peak_bytes'] / row['peak_bytes']:.2f} of the memory and "
            f"{lomo_ds['seconds'] / row['seconds']:.2f} of the time of {method}, and the error of its weight's "
            f"gradient is {lomo_ds['error_of_weight'] / row['error_of_weight']:.2f} of its error."
        )
        if row["error_of_weight_at_half"] > 0.1:
            lines.append(
                f"{method} ignores the factor of the loss in the weight's gradient: at 0.5 the error is "
                f"{row['error_of_weight_at_half']:.0%}."
            )
    return lines


def draw(results: dict[str, Any]) -> Any:
    """Draw peak memory and time over the number of tokens."""
    figure, all_axes = result_files.pyplot().subplots(1, 2, figsize=(11.6, 5.0), layout="constrained")
    panels = (("peak_bytes", MIB, "Peak memory above the start, MiB"), ("seconds", 1e-3, "Forward and backward, ms"))
    for axes, (name, unit, title) in zip(all_axes, panels, strict=True):
        for method, color in COLORS.items():
            rows = [row for row in results["rows"] if row["method"] == method and row[name] is not None]
            if rows:
                axes.plot(
                    [row["tokens"] for row in rows], [row[name] / unit for row in rows],
                    color=color, marker="o", linewidth=2.5 if method == LOMO_DS else 1.6, label=method,
                )  # fmt: skip
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("tokens")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["tokens"] for row in results["rows"]}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"lm_head of {results['vocabulary']} x {results['hidden_size']} and its loss, {results['dtype']}",
        fontsize=13,
        fontweight="bold",
    )
    return figure


def main() -> None:
    """Run the benchmark and write its results."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"
    parser = result_files.build_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536] if on_gpu else [512, 2048])
    parser.add_argument("--vocabulary", type=int, default=32000 if on_gpu else 8000, help="rows of lm_head")
    parser.add_argument("--hidden_size", type=int, default=4096 if on_gpu else 128, help="columns of lm_head")
    parser.add_argument("--tile_mib", type=int, default=64 if on_gpu else 4, help="MiB of fp32 logits in a tile")
    parser.add_argument("--repetitions", type=int, default=10 if on_gpu else 2, help="number of timed repetitions")
    args = parser.parse_args()
    result_files.require("matplotlib")

    def write(results: dict[str, Any]) -> None:
        result_files.write_results(args.output_dir, "logits", results, describe(results), show=False)

    results = compare(args.tokens, args.vocabulary, args.hidden_size, args.tile_mib, args.repetitions, write)
    result_files.write_results(args.output_dir, "logits", results, describe(results), draw(results))


if __name__ == "__main__":
    main()
