"""Choice of precision: which of bf16, fp16 and fp32 a device has fast instructions for."""

import platform
from typing import Literal, NamedTuple

import torch

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class FastPrecision(NamedTuple):
    """Fastest training precision of a device, and the reason."""

    precision: Precision
    reason: str


def is_fast(precision: Precision, device_type: str) -> bool:
    """Return whether a device has instructions for ``precision``; a CPU without them is several times slower than fp32.

    Args:
        device_type: ``cuda`` or ``cpu``.
    """
    if precision == "fp32":
        return True
    if device_type != "cpu":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "fp16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN, which also obeys ONEDNN_MAX_CPU_ISA, reports bf16 as supported even on AVX-512 without bf16 instructions
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        platform.machine().lower() not in ("x86_64", "amd64")
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )


def fast_precision(device_type: str) -> FastPrecision:
    """Return the precision for ``"auto"``: half precision if ``is_fast``, otherwise fp32 on a CPU.

    Args:
        device_type: see ``is_fast``.
    """
    device = "this processor" if device_type == "cpu" else "this GPU"
    if is_fast("bf16", device_type):
        return FastPrecision("bf16", f"{device} has bf16 instructions")
    if device_type == "cpu":  # fp16 would need a loss scale, even on a CPU that has fp16 instructions
        return FastPrecision("fp32", f"{device} has no bf16 instructions and would emulate them, several times slower")
    return FastPrecision("fp16", f"{device} has fp16 instructions, but none for bf16")


def common_precision(choices: list[FastPrecision]) -> FastPrecision:
    """Return the choice that works on all ranks: the first of those that are furthest from bf16."""
    return max(choices, key=lambda choice: ("bf16", "fp16", "fp32").index(choice.precision))
