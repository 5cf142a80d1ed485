"""The benchmarks at a size that takes seconds: they run, write their result files, and the figures are right."""

import functools
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import golden, gpu, memory, offload, quality, sums, throughput, traffic
from benchmarks.lib import gpu_report, kernels, measurements, methods
from benchmarks.lib.contest import ratios
from benchmarks.lib.footprint import ACTIVATIONS, GRADIENTS, OPTIMIZER, PARAMETERS, TensorTracker
from benchmarks.lib.row_process import BenchmarkRow, Results, run_rows
from benchmarks.lib.workers import DoesNotFit, WorkerError, Workers
from benchmarks.lib.workload import Workload, flops_per_token
from lomo_ds.update.buckets import MIN_BUCKET_NUMEL
from tests.limits import HUNG
from tests.ranks import Ranks

ROOT = Path(__file__).parent.parent
GroupOf = Callable[..., Ranks]
SMALL = ["--device=cpu", "--sequence=16"]

needs_bench = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("accelerate", "matplotlib")),
    reason="needs the packages of the extra bench",
)


@pytest.fixture
def results_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return ``results_of(benchmark, *options)``, which runs a benchmark and returns its JSON."""

    def run(benchmark: Any, *options: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [benchmark.__file__, *options, f"--output_dir={tmp_path}"])
        benchmark.main()
        return written(tmp_path, benchmark.__name__.rpartition(".")[2])

    return run


def written(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON of a benchmark, after checking that it has also written a table and a picture."""
    results = json.loads((folder / f"{name}.json").read_text())
    assert {"commit", "versions", "machine", "command"} <= results["environment"].keys()
    assert (folder / f"{name}.md").read_text().startswith("# ")
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return results


@needs_bench
def test_loading(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/loading.py"), "--gigabytes=0.05", "--ranks=2", "--repetitions=1"]
    run = subprocess.run([*command, f"--output_dir={tmp_path}"], capture_output=True, text=True, timeout=HUNG)
    assert run.returncode == 0, run.stderr
    results = written(tmp_path, "loading")
    rows = {(row["method"], row["rank"]): row for row in results["rows"]}
    assert rows.keys() == {(method, rank) for method in ("lomo_ds", "transformers") for rank in (0, 1)}
    assert results["same_shards"]
    assert results["bound_holds"]["lomo_ds"], run.stdout
    for rank in (0, 1):
        row = rows["lomo_ds", rank]
        assert 0 < row["peak_host_bytes"] <= row["bound_bytes"] < results["checkpoint"]["bytes"]
        assert row["seconds"] > 0
        if results["bytes_read_counted_by"]:  # whole pages and headers, which are a larger share of a small shard
            assert row["bytes_read"] <= 1.05 * row["shard_bytes"]
    assert "**holds** for lomo_ds" in (tmp_path / "loading.md").read_text()
    assert (tmp_path / "loading.png").read_bytes().startswith(b"\x89PNG")


@needs_bench
def test_update(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/update.py"), "--ways=eager", "--repetitions=3"]
    sizes = ["--elements", "10000", "50001"]
    run = subprocess.run([*command, *sizes, f"--output_dir={tmp_path}"], capture_output=True, text=True, timeout=HUNG)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "update.json").read_text())
    assert {"commit", "versions", "machine", "command"} <= results["environment"].keys()
    rows = {(row["kind"], row["elements"]): row for row in results["rows"]}
    kinds = ["fp32", "bf16 nearest", "bf16 stochastic", "fp16 stochastic", "int8 nearest", "int8 stochastic"]
    kinds += ["fp32 adalomo", "bf16 stochastic adalomo", "int8 stochastic adalomo"]
    assert rows.keys() == {(kind, elements) for kind in kinds for elements in (10_000, 50_001)}
    for (kind, elements), row in rows.items():
        adalomo = "adalomo" in kind  # reads a shard once more, and a gradient three times
        if kind.startswith("int8"):  # read and write codes and scales, read gradients
            assert elements * (9 if adalomo else 4) < row["bytes"] < elements * (9.1 if adalomo else 4.07) + 96
        else:
            assert row["bytes"] == elements * (2 if adalomo else 1) * (12 if kind.startswith("fp32") else 6)
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["share_quartiles"][0] <= row["share_of_copy"] <= row["share_quartiles"][1]
    assert "of a copy's bandwidth at 50,001 elements" in (tmp_path / "update.md").read_text()
    assert (tmp_path / "update.png").read_bytes().startswith(b"\x89PNG")


@needs_bench
def test_logits(tmp_path: Path) -> None:
    sizes = ["--vocabulary=1000", "--hidden_size=16", "--tile_mib=1", "--repetitions=1", "--tokens", "512", "2048"]
    command = [sys.executable, str(ROOT / "benchmarks/logits.py"), *sizes, f"--output_dir={tmp_path}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "logits.json").read_text())
    rows = {(row["method"], row["tokens"]): row for row in results["rows"]}
    assert rows.keys() == {(name, size) for name in ("whole logits", "lomo_ds", "DeepSpeed") for size in (512, 2048)}
    lomo_ds, whole = rows["lomo_ds", 2048], rows["whole logits", 2048]
    assert lomo_ds["peak_bytes"] < whole["peak_bytes"] / 4
    assert whole["peak_bytes"] > 2 * 4 * 2048 * 1000, "logits and their gradient in fp32"
    for name in ("error_of_hidden", "error_of_weight", "error_of_weight_at_half"):
        assert lomo_ds[name] < 1.5 * whole[name]
    assert (lomo_ds["hook_calls"], lomo_ds["hook_calls_in_forward"]) == (1, 0)
    assert rows["DeepSpeed", 2048]["error_of_weight_at_half"] > 0.9, "DeepSpeed's tiled loss has become correct"
    assert "of the memory and" in (tmp_path / "logits.md").read_text()
    assert (tmp_path / "logits.png").read_bytes().startswith(b"\x89PNG")


@needs_bench
def test_memory(results_of: Callable[..., dict[str, Any]]) -> None:
    options = ["--models=toy", "--ranks", "2", "--checkpointing=on", *SMALL]
    results = results_of(memory, *options, "--methods", "deepspeed-adamw", "immediate", "stash+clip", "adalomo")
    rows = {row["method"]: row for row in results["rows"]}
    total = 4 * toy_parameters()
    for row in rows.values():
        assert row["outcome"] == "measured"
        assert sum(row["at_peak"].values()) == row["peak"] <= row["resident"]
        assert row["at_peak"][PARAMETERS] >= total / 2
    adamw, immediate, stash = rows["deepspeed-adamw"], rows["immediate"], rows["stash+clip"]
    assert adamw["at_peak"][OPTIMIZER] == pytest.approx(3 * total / 2, rel=0.01)  # two moments and master weights
    assert immediate["at_peak"][OPTIMIZER] == stash["at_peak"][OPTIMIZER] == 0
    in_flight = 1.5 * 4 * MIN_BUCKET_NUMEL  # a bucket, and its half after the reduce-scatter
    assert 0 < immediate["most_gradients"] < in_flight
    assert total / 2 < stash["most_gradients"] < total / 2 + in_flight
    assert immediate["peak"] < stash["peak"] < adamw["peak"]
    adalomo = rows["adalomo"]
    assert 0 < adalomo["at_peak"][OPTIMIZER] < 0.05 * total
    assert immediate["peak"] < adalomo["peak"] < stash["peak"]


@needs_bench
def test_memory_of_one_rank_of_eight(results_of: Callable[..., dict[str, Any]]) -> None:
    options = ["--models=toy", "--simulate_world=8", "--checkpointing=on", *SMALL]
    for row in results_of(memory, *options, "--methods", "stash+clip", "deepspeed-sgd")["rows"]:
        assert row["outcome"] == "measured"
        assert row["losses"] == sorted(row["losses"], reverse=True)
        assert row["losses"][-1] < row["losses"][0], "the steps have not updated the weights"
        assert row["at_peak"][PARAMETERS] < toy_parameters()  # of 4 bytes each
        shards, bucket = toy_parameters() * 4 / 8, 4 * MIN_BUCKET_NUMEL
        assert (
            shards < row["most_gradients"] < shards + 1.25 * bucket
        )  # a bucket, and its eighth after the reduce-scatter


def toy_parameters() -> int:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LlamaForCausalLM(Workload("toy").config()).parameters())


@needs_bench
def test_throughput(results_of: Callable[..., dict[str, Any]]) -> None:
    results = results_of(
        throughput, "--rows", "tiny:1", "tiny:2", "--seconds=0", *SMALL, "--methods", "immediate", "--vs", "plain"
    )
    alone, two = results["groups"]
    assert two["skipped"] == {"plain": "it runs in one process only"}
    immediate, plain = alone["rows"]
    (ratio,) = alone["ratios"]
    assert ratio["lowest"] <= ratio["median"] <= ratio["highest"]
    assert ratio["met"] == (ratio["median"] <= ratio["goal"])
    assert immediate["last_loss"] < immediate["first_loss"]
    assert plain["last_loss"] == plain["first_loss"]
    for row in (immediate, plain):
        attained = row["share_of_peak"] * results["peak_flops"]
        assert attained == pytest.approx(row["tokens_per_second"] * flops_per_token(Workload("tiny", 16)))


@needs_bench
def test_traffic(results_of: Callable[..., dict[str, Any]]) -> None:
    results = results_of(
        traffic, "--simulate_world=8", "--model=tiny", *SMALL, "--methods", "stash+clip", "deepspeed-sgd+clip",
        "--accumulation=4", "--accumulating", "immediate+layered", "stash", "deepspeed-sgd",
    )  # fmt: skip
    large = {row["method"]: row for row in results["rows"] if row["large"]}
    for method in ("stash+clip", "deepspeed-sgd+clip"):
        assert large[method]["total"] == pytest.approx(3.0, abs=0.05)
        assert large[method]["moved"]["all-gather"] == pytest.approx(2.0, abs=0.05)
    assert large["published LOMO+clip"]["total"] == 8.0
    assert large["immediate+layered"]["total"] == pytest.approx(3.0, abs=0.05)
    for method in ("stash", "deepspeed-sgd"):
        assert large[method]["of_micro_batch"] == pytest.approx(3.0, abs=0.05)
    ratios_of_bytes = [float(finding.split("**")[1]) for finding in traffic.findings(results["rows"])]
    assert ratios_of_bytes == pytest.approx([4.0, 4.0], abs=0.1)


@needs_bench
def test_offload(results_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(offload, "PLANNED_BATCHES", [1])
    results = results_of(offload, *SMALL, "--models=tiny", "--methods", "immediate", "stash+clip", "--batches=2")
    parameters = 4 * sum(parameter.numel() for parameter in LlamaForCausalLM(Workload("tiny").config()).parameters())
    for row in results["rows"]:
        stashed = row["method"] == "stash+clip"
        assert row["up"] == pytest.approx((3 if stashed else 2) * parameters), (
            "forward, backward, and for a stash the update"
        )
        assert row["down"] == pytest.approx(parameters)
    plans = {(row["model"], row["weights"]): row for row in results["plans"]}
    assert plans["65b", "auto"]["tokens"] == 1024
    assert plans["65b", "auto"]["fits"]
    assert plans["65b", "auto"]["tokens_per_second"] > offload.PAPER["65b"][1], "one GPU against the paper's eight"


def test_golden_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs agree in every bit, except where the second one has another learning rate."""
    table = tmp_path / "before.json"
    options = ["--ranks=2", "--steps=2", "--schedules=stash+clip", "--formats", "fp32", "bf16+int8"]
    monkeypatch.setattr(sys, "argv", ["golden.py", *options, f"--save={table}"])
    golden.main()
    saved = json.loads(table.read_text())["digests"]
    assert len(saved) == len(set(saved.values())) == 4
    monkeypatch.setattr(sys, "argv", ["golden.py", *options, f"--compare={table}"])
    monkeypatch.setitem(golden.LEARNING_RATES, "lomo", 0.101)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        golden.main()
    text = capsys.readouterr().out
    assert f"2 of 4 digests differ from {table}" in text
    assert "saved with another" not in text
    marked = {line.split(" | ")[3] for line in text.splitlines() if "**differs** from " in line}
    assert marked == {"lomo"}


def test_golden_weights_of_other_cases_and_conditions_are_named() -> None:
    digests = {"1 | fp32 | immediate | lomo": "a" * 64, "2 | fp32 | immediate | lomo": "b" * 64}
    saved = {"1 | fp32 | immediate | lomo": "c" * 64}
    rows = golden.describe(digests, saved).splitlines()[2:]
    assert [row.split(" | ")[5].strip(" |") for row in rows] == [f"**differs** from {'c' * 16}", "not saved"]
    assert golden.differing(digests, saved) == ["1 | fp32 | immediate | lomo"]
    assert golden.differing(digests, {}) == []
    here = {"machine": {"cpu": "one"}, "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}}
    there = {"machine": {"cpu": "another"}, "versions": {"torch": "2.11.0", "deepspeed": "0.19.8"}}
    assert golden.other_conditions(here, there) == ["processor: another, now one", "torch: 2.11.0, now 2.13.0"]


def test_gpu_rows_on_the_cpu(tmp_path: Path) -> None:
    """Run from another folder and without PYTHONPATH."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--try_on_cpu", "--only", "1", "3"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    memory_row, update_row = json.loads((tmp_path / "out/gpu.json").read_text())["rows"]
    assert (memory_row["outcome"], update_row["outcome"]) == ("measured", "measured"), (memory_row, update_row)
    (part,) = memory_row["parts"]
    assert part["peak"] == sum(part["at_peak"].values()) <= 1.05 * part["planned_peak"]
    assert [part["kind"] for part in update_row["parts"]] == list(measurements.UpdateKernels().kinds)
    text = (tmp_path / "out/gpu.md").read_text()
    assert text.count("\n| 1 | tiny, 1 x 16: immediate |") == 1
    assert text.count("\n| 3 | update of ") == 4
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".md", ".png"}


def test_gpu_rows_of_the_same_commit_and_versions_are_kept_beside_new_ones(tmp_path: Path) -> None:
    environment = {"commit": "abc", "versions": {"torch": "2"}}
    rows = [{"place": "1"}, {"place": "2"}]
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": environment | {"command": "one"}, "rows": rows}))
    repeated = environment | {"command": "another"}
    assert gpu.earlier_rows(tmp_path, repeated, {"2", "3"}) == [{"place": "2"}]
    assert repeated["command"] == "one; another"
    assert gpu.earlier_rows(tmp_path, environment | {"commit": "def"}, {"2", "3"}) == []
    assert gpu.earlier_rows(tmp_path / "none", environment, {"2"}) == []


def test_terminated_gpu_rows_leave_their_results(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--try_on_cpu", "--only", "1", f"--out={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not (tmp_path / "gpu.json").exists():
            time.sleep(0.05)
        run.terminate()
    assert run.returncode == 130
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["outcome"] == "interrupted"
    assert "| 1 | the paper's Table 1 |" in (tmp_path / "gpu.md").read_text()


def row_running(place: str, body: str, limit: float = 200.0) -> BenchmarkRow:
    """Return a row whose process runs ``body``."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, pathlib, subprocess, time\n"
        "from benchmarks.lib.row_process import RowOutput\n"
        "output = RowOutput(pathlib.Path(sys.argv[1])); output.wait_to_begin()\n"
    )
    return BenchmarkRow(place, place, 0.0, limit, [sys.executable, "-c", script + body])


def has_exited(process: int) -> bool:
    """Return whether a process has ended, even if its parent has not collected the exit status yet."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def outcomes_of(rows: list[BenchmarkRow], folder: Path, seconds: float = 300.0) -> list[dict[str, Any]]:
    results = Results(rows, lambda: None)
    run_rows(rows, results, folder, time.monotonic() + seconds)
    return results.rows


def test_a_failing_row_does_not_end_the_others(tmp_path: Path) -> None:
    hangs = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "output.write({'name': 'part', 'process': child.pid})\n"
        "time.sleep(1000)"
    )
    rows = [
        row_running("fails", "output.write({'name': 'part', 'peak': 1}); raise ValueError('on purpose')"),
        row_running("dies", "os.abort()"),
        row_running("hangs", hangs, limit=3.0),
        row_running(
            "is out of memory", "output.write({'outcome': 'does not fit', 'error': 'CUDA out of memory'}); sys.exit(1)"
        ),
        row_running("works", "[output.write({'name': 'part', key: 1}) for key in 'ab']"),
    ]
    fails, dies, hung, out_of_memory, works = outcomes_of(rows, tmp_path)
    assert (fails["outcome"], fails["error"]) == ("failed", "ValueError: on purpose")
    assert fails["parts"] == [{"name": "part", "peak": 1}]
    assert dies["outcome"] == "failed"
    assert hung["outcome"] == "stopped after 3 s"
    assert has_exited(hung["parts"][0]["process"]), "the whole group is killed"
    assert (out_of_memory["outcome"], works["outcome"]) == ("does not fit", "measured")
    assert works["parts"] == [{"name": "part", "a": 1, "b": 1}]
    text = gpu_report.describe([fails, hung, works])
    assert "| **failed** |" in text
    assert "`ValueError: on purpose`" in text
    assert "| **stopped after 3 s** |" in text


def test_a_row_is_skipped_if_too_little_time_is_left(tmp_path: Path) -> None:
    rows = [replace(row_running("long", ""), needs=1000.0), row_running("short", "")]
    long, short = outcomes_of(rows, tmp_path)
    assert long["outcome"].startswith("skipped: it needs 1000 s")
    assert short["outcome"] == "measured"


def test_an_interruption_keeps_the_results_and_ends_all_processes(tmp_path: Path) -> None:
    rows = [row_running("first", "output.write({'name': 'part', 'process': os.getpid()}); time.sleep(1000)")]

    def changed() -> None:
        if results.rows[0]["parts"]:
            results.changed = lambda: None
            raise KeyboardInterrupt

    results = Results(rows, changed)
    with pytest.raises(KeyboardInterrupt):
        run_rows(rows, results, tmp_path, time.monotonic() + 300)
    (row,) = results.rows
    assert row["outcome"] == "interrupted"
    assert has_exited(row["parts"][0]["process"])


def test_a_kernel_that_fell_back_is_reported() -> None:
    @functools.cache
    def kernel_for(device: torch.device) -> ModuleType | None:
        logging.getLogger(__name__).warning("several passes over memory, for Triton fails: no compiler\nfor ptx")
        return None

    device = torch.device("cpu")
    logging.disable(logging.ERROR)  # as in the processes of a benchmark
    try:
        assert kernels.kernel_state(kernel_for, device) == "no compiler"
        assert kernels.kernel_state(functools.cache(lambda device: sys), device) == kernels.IN_USE
    finally:
        logging.disable(logging.NOTSET)
    part = {"name": "7b", "remarks": kernels.fallbacks({kernels.UPDATE: "no compiler", kernels.INT8: kernels.IN_USE})}
    assert gpu_report.cells(part)[-1] == "**update kernel fell back: no compiler**"


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for ten minutes where there is a GPU")
def test_gpu_rows_are_skipped_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert "no CUDA GPU" in capsys.readouterr().out


@needs_bench
def test_rows_without_figures_are_reported_and_drawn() -> None:
    row = {"method": "immediate", "ranks": 8, "simulated": True, "workload": methods.workload_as_dict(Workload("65b"))}
    known = {"peak": 20 * 2**30, "resident": 2**30, "at_peak": None, "most_gradients": None}
    rows = [
        row | {"outcome": memory.DOES_NOT_FIT},
        row | {"outcome": "rank 0:\nTraceback\nValueError: no such thing"},
        row | {"outcome": "measured", **known},
    ]
    for chosen in (rows, rows[:2]):
        results = {"device": "cuda", "rows": chosen, "skipped": {"plain": "it runs in one process only"}}
        text = memory.describe(results)
        assert "**does not fit** | " in text
        assert "`ValueError: no such thing`" in text
        assert ("**20.00**" in text) == (len(chosen) == 3)
        assert "rank 0 of 8: immediate" in text
        memory.draw(results)


def losses_of(name: str, clip: bool, accumulation: int = 1) -> list[float]:
    work = Workload("tiny", sequence=16, batch=2, accumulation=accumulation)
    method = methods.build(name + methods.CLIP * clip, work)
    return [float(method.step()) for _ in range(4)]


@pytest.mark.parametrize("clip", [False, True])
def test_all_methods_take_the_same_steps(ranks: GroupOf, clip: bool) -> None:
    """All methods are SGD on one rank, so no method is compared with one that does less work."""
    names = ["two_pass", "stash", "deepspeed-sgd", "lomo-optim", *([] if clip else ["immediate", "torchtune"])]
    installed = [name for name in names if methods.unavailability(name, 1) is None]
    (reference,) = ranks(1).run(losses_of, "stash", clip)
    assert reference[-1] < reference[0]
    for name in installed:
        assert ranks(1).run(losses_of, name, clip)[0] == pytest.approx(reference, rel=1e-6), name


def test_all_methods_accumulate_the_same_gradients(ranks: GroupOf) -> None:
    reference = ranks(1).run(losses_of, "stash", True, 3)[0]
    assert reference[-1] < reference[0]
    for name in ("stash+layered", "two_pass+layered", "deepspeed-sgd"):
        assert ranks(1).run(losses_of, name, True, 3)[0] == pytest.approx(reference, rel=1e-6), name


@pytest.mark.parametrize("name", ["immediate", "two_pass+clip", "plain"])
def test_methods_that_cannot_accumulate_give_a_reason(name: str) -> None:
    assert methods.unavailability(name, 1) is None
    assert "it " in (methods.unavailability(name, 1, accumulation=2) or "")


def test_memory_by_kind() -> None:
    """Compare with known figures, minus the tensors that other tests have left alive."""
    nothing = methods.Method(torch.nn.Module(), [], lambda micro_batches: torch.zeros(()))
    with TensorTracker(nothing, torch.device("cpu")) as leftover:
        pass
    weights, rows = 4 * 300 * 300, 4 * 20 * 300
    model = torch.nn.Sequential(torch.nn.Linear(300, 300, bias=False), torch.nn.Linear(300, 300, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    micro_batches = [{"x": torch.ones(20, 300)}]

    def step(micro_batches: list[methods.Batch]) -> torch.Tensor:
        loss = model(micro_batches[0]["x"]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    method = methods.Method(
        model, micro_batches, step, lambda: [v for state in optimizer.state.values() for v in state.values()]
    )
    method.step()
    with TensorTracker(method, torch.device("cpu")) as tensors:
        method.step()
    assert tensors.at_peak[PARAMETERS] == tensors.at_peak[OPTIMIZER] == tensors.at_peak[GRADIENTS] == 2 * weights
    assert tensors.most_gradients == 2 * weights
    assert rows <= tensors.at_peak[ACTIVATIONS] - leftover.total <= 3 * rows
    assert tensors.peak == sum(tensors.at_peak.values())
    assert tensors.total <= tensors.peak - 2 * weights


def raise_on_rank(state: dict[str, Any], rank: int) -> int:
    if rank == torch.distributed.get_rank():
        raise ValueError("here")
    torch.distributed.barrier()
    return rank


def allocate(state: dict[str, Any], size: int) -> None:
    torch.empty(size)


def test_a_failing_rank_ends_the_others() -> None:
    with Workers(2, "cpu") as workers, pytest.raises(WorkerError, match="ValueError: here"):
        workers.call(raise_on_rank, 1)
    assert not workers.processes


def test_out_of_memory_is_not_reported_as_a_failure() -> None:
    with Workers(1, "cpu") as workers, pytest.raises(DoesNotFit):
        workers.call(allocate, 2**60)


def test_ratios_are_taken_within_rounds() -> None:
    def row(label: str, seconds: list[float], leads: bool) -> dict[str, Any]:
        return {
            "label": label, "method": label, "leads": leads, "outcome": "measured", "seconds": seconds, "peak": 8
        }  # fmt: skip

    rows = [row("stash+clip", [1.0, 6.0, 3.0], True), row("two_pass+clip", [2.0, 12.0, 5.0], False)]
    (ratio,) = ratios([*rows, row("plain", [1.0, 1.0, 1.0], False)], {("stash+clip", "two_pass+clip"): 0.5})
    assert (ratio["lowest"], ratio["median"], ratio["highest"]) == (0.5, 0.5, 0.6)
    assert ratio["met"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imediate", "a method is one of"),
        ("immediate+clip", "updates weights before"),
        ("plain+clip", "no gradients"),
        ("plain+int8", "does not support .int8"),
        ("deepspeed-sgd+layered", "does not support .layered"),
        ("stash+int9", "a method is one of"),
    ],
)
def test_invalid_methods_raise_an_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.unavailability(name, 1)


def test_the_micro_batches_of_a_row_follow_its_ranks() -> None:
    assert throughput.row_of("40m:2") == ("40m", 2, 1)
    assert throughput.row_of("40m:2x8") == ("40m", 2, 8)
    for text in ("40m", "40m:0", "40m:2x0", "40m:2x"):
        with pytest.raises(ArgumentTypeError, match="a row is MODEL:RANKS or MODEL:RANKSxACCUMULATION"):
            throughput.row_of(text)


def test_flops_per_token() -> None:
    """Count six operations for each weight except the embedding, plus attention: about 40 billion for 7B."""
    assert flops_per_token(Workload("7b", sequence=1)) == pytest.approx(6 * 6.607e9, rel=1e-3)
    attention = flops_per_token(Workload("7b", sequence=2048)) - flops_per_token(Workload("7b", sequence=0))
    assert attention == 12 * 32 * 4096 * 2048
    assert math.isclose(flops_per_token(Workload("1b", sequence=0)), 6 * (1.0344e9), rel_tol=1e-3)


@needs_bench
def test_quality(tmp_path: Path, demo: Path) -> None:
    inputs = [f"--model_name_or_path={demo / 'model'}", f"--train_file={demo / 'train.txt'}"]
    inputs += [f"--validation_file={demo / 'validation.txt'}", "--optimizers=adalomo=0.01"]
    sizes = ["--ranks=1", "--rows=2", "--max_seq_length=32", "--max_steps=2", f"--output_dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "benchmarks/quality.py"), *inputs, *sizes]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HUNG)
    assert run.returncode == 0, run.stderr
    (row,) = written(tmp_path, "quality")["runs"]
    assert (row["optimizer"], row["learning_rate"]) == ("adalomo", 0.01)
    assert row["loss"] < row["loss_before"]
    assert f"adalomo: **{row['loss']:.3f}** with learning rate 0.01" in (tmp_path / "quality.md").read_text()


@needs_bench
def test_sums(tmp_path: Path, demo: Path) -> None:
    inputs = [f"--model_name_or_path={demo / 'model'}", f"--train_file={demo / 'train.txt'}"]
    inputs += [f"--validation_file={demo / 'validation.txt'}", "--accumulation=3", "--seeds=1"]
    sizes = ["--max_seq_length=16", "--max_steps=3", f"--output_dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "benchmarks/sums.py"), *inputs, *sizes]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HUNG)
    assert run.returncode == 0, run.stderr
    results = written(tmp_path, "sums")
    losses = {run["sums"]: run["loss"] for run in results["runs"]}
    assert losses.keys() == {"bf16", "fp32"}
    assert losses["bf16"] != losses["fp32"], "the data type of the sums is ignored"
    assert all(run["loss"] < run["loss_before"] for run in results["runs"])
    assert sums.differences(results["runs"], 3) == {1: losses["bf16"] - losses["fp32"]}


def test_the_best_learning_rate_has_the_lowest_mean_over_seeds() -> None:
    losses = {("lomo", 0.3): (2.7, 2.9), ("lomo", 1.0): (2.6, 3.2), ("adamw", 1e-3): (2.65, 2.65)}
    runs = [
        {"optimizer": name, "learning_rate": rate, "seed": seed, "loss": loss}
        for (name, rate), of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    best = quality.best_runs(runs)
    assert {name: of_name[0]["learning_rate"] for name, of_name in best.items()} == {"lomo": 0.3, "adamw": 1e-3}
    assert quality.mean_loss(best["lomo"]) == pytest.approx(2.8)
