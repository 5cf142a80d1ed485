"""The precision that "auto" stands for is the one the hardware computes fast, and emulation is warned of."""

import logging
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_ds.config.arguments import parse_arguments
from lomo_ds.config.ds_config import fill_precision
from lomo_ds.numerics.precision import FastPrecision, common_precision, fast_precision
from tests.launching import ROOT, demo_arguments, run_main
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
BF16, FP16, FP32 = FastPrecision("bf16", "b"), FastPrecision("fp16", "c"), FastPrecision("fp32", "a")


@pytest.mark.parametrize(
    ("onednn", "avx512_bf16", "amx", "expected"),
    [
        (True, True, False, "bf16"),
        (True, False, True, "bf16"),
        (True, False, False, "fp32"),  # AVX-512 without bf16 instructions, which oneDNN calls supported
        (False, True, True, "fp32"),  # ONEDNN_MAX_CPU_ISA=AVX2 on a processor that has more
        (False, False, False, "fp32"),
    ],
)
def test_a_processor_computes_bf16_where_it_has_the_instructions(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512_bf16: bool, amx: bool, expected: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_precision("cpu").precision == expected


def test_a_processor_that_is_held_to_avx2_computes_fp32() -> None:
    code = "from lomo_ds.numerics.precision import fast_precision; print(fast_precision('cpu').precision)"
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "fp32"


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_computes_half_precision(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert fast_precision("cuda").precision == expected


def test_all_ranks_take_what_suits_the_slowest() -> None:
    assert common_precision([BF16, BF16]) is BF16
    assert common_precision([BF16, FP32, FP16]) is FP32


AUTO: dict[str, Any] = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}


@pytest.mark.parametrize(
    ("ds_config", "argv", "fast", "bf16", "fp16", "decided"),
    [
        (AUTO, [], "bf16", True, False, True),
        (AUTO, [], "fp16", False, True, True),
        (AUTO, [], "fp32", False, False, True),
        ({"bf16": {"enabled": "auto"}}, [], "fp16", False, None, True),
        (AUTO, ["--fp16"], "bf16", "auto", "auto", False),
        (AUTO, ["--bf16", "false"], "bf16", "auto", "auto", False),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, [], "bf16", "auto", True, False),
        ({}, [], "bf16", None, None, False),
    ],
)
def test_auto_takes_what_is_fast_unless_something_else_was_asked_for(
    ds_config: dict[str, Any], argv: list[str], fast: Any, bf16: Any, fp16: Any, decided: bool
) -> None:
    required = ["--model_name_or_path", "m", "--train_file", "t.txt", "--output_dir", "o"]
    config, by_hardware = fill_precision(ds_config, parse_arguments([*required, *argv])[1], fast)
    assert [config.get(name, {}).get("enabled") for name in ("bf16", "fp16")] == [bf16, fp16]
    assert by_hardware == decided


def emulating(arguments: list[str]) -> tuple[int, list[str]]:
    """A run of launch/train.py on a processor without bf16 instructions: exit status and this rank's log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lomo_ds").addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
            return run_main(arguments)[0], lines
    finally:
        logging.getLogger("lomo_ds").removeHandler(handler)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("zero3_auto.json", "precision auto: fp32, for this processor has no bf16 instructions"),
        ("zero3_bf16.json", "bf16 was requested, but this processor has no bf16 instructions .*zero3_auto.json"),
    ],
)
def test_a_run_says_once_which_precision_it_takes_or_should(
    ranks: GroupOf, demo: Path, tmp_path: Path, config: str, line: str
) -> None:
    arguments = demo_arguments(demo, tmp_path, deepspeed=ROOT / "ds_configs" / config, max_steps=1)
    results = ranks(2).run(emulating, arguments)
    assert [status for status, _ in results] == [0, 0]
    assert [sum(bool(re.search(line, logged)) for logged in log) for _, log in results] == [1, 0]
