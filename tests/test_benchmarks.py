"""The benchmarks, at a size that takes seconds: they run, write what they promise, and the promises hold."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

needs_bench = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("accelerate", "matplotlib")),
    reason="needs the packages of the extra bench",
)


@needs_bench
def test_loading(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/loading.py"), "--gigabytes=0.05", "--ranks=2", "--repetitions=1"]
    run = subprocess.run([*command, f"--output_dir={tmp_path}"], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "loading.json").read_text())
    assert {"commit", "versions", "machine", "command"} <= results["environment"].keys()
    rows = {(row["method"], row["rank"]): row for row in results["rows"]}
    assert rows.keys() == {(method, rank) for method in ("lomo_ds", "transformers") for rank in (0, 1)}
    assert results["same_shards"]
    assert results["bound_holds"]["lomo_ds"], run.stdout
    for rank in (0, 1):
        row = rows["lomo_ds", rank]
        assert 0 < row["peak_host_bytes"] <= row["bound_bytes"] < results["checkpoint"]["bytes"]
        assert row["seconds"] > 0
        if results["bytes_read_counted_by"]:  # a small shard has more whole pages and headers in proportion
            assert row["bytes_read"] <= 1.05 * row["shard_bytes"]
    assert "**holds** for lomo_ds" in (tmp_path / "loading.md").read_text()
    assert (tmp_path / "loading.png").read_bytes().startswith(b"\x89PNG")


@needs_bench
def test_update(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/update.py"), "--ways=eager", "--repetitions=3"]
    sizes = ["--elements", "10000", "50001"]
    run = subprocess.run([*command, *sizes, f"--output_dir={tmp_path}"], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "update.json").read_text())
    assert {"commit", "versions", "machine", "command"} <= results["environment"].keys()
    rows = {(row["kind"], row["elements"]): row for row in results["rows"]}
    kinds = ["fp32", "bf16 nearest", "bf16 stochastic", "fp16 stochastic"]
    assert rows.keys() == {(kind, elements) for kind in kinds for elements in (10_000, 50_001)}
    for (kind, elements), row in rows.items():
        assert row["bytes"] == elements * (12 if kind == "fp32" else 6)
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["share_quartiles"][0] <= row["share_of_copy"] <= row["share_quartiles"][1]
    assert "of a copy's bandwidth at 50,001 elements" in (tmp_path / "update.md").read_text()
    assert (tmp_path / "update.png").read_bytes().startswith(b"\x89PNG")


@needs_bench
def test_logits(tmp_path: Path) -> None:
    sizes = ["--vocabulary=1000", "--hidden_size=16", "--tile_mib=1", "--repetitions=1", "--tokens", "512", "2048"]
    command = [sys.executable, str(ROOT / "benchmarks/logits.py"), *sizes, f"--output_dir={tmp_path}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "logits.json").read_text())
    rows = {(row["method"], row["tokens"]): row for row in results["rows"]}
    assert rows.keys() == {(name, size) for name in ("whole logits", "lomo_ds", "DeepSpeed") for size in (512, 2048)}
    ours, whole = rows["lomo_ds", 2048], rows["whole logits", 2048]
    assert ours["peak_bytes"] < whole["peak_bytes"] / 4
    assert whole["peak_bytes"] > 2 * 4 * 2048 * 1000, "logits and their gradient in fp32"
    for name in ("error_of_hidden", "error_of_weight", "error_of_weight_at_half"):
        assert ours[name] < 1.5 * whole[name]
    assert (ours["hook_calls"], ours["hook_calls_in_forward"]) == (1, 0)
    assert rows["DeepSpeed", 2048]["error_of_weight_at_half"] > 0.9, "it need not be avoided any more"
    assert "of the memory and" in (tmp_path / "logits.md").read_text()
    assert (tmp_path / "logits.png").read_bytes().startswith(b"\x89PNG")
