"""Which of bf16, fp16 and fp32 a device computes fast, by the instructions it has."""

import platform
from typing import Literal, NamedTuple

import torch

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class FastPrecision(NamedTuple):
    """The precision that a device trains fastest in, and why."""

    precision: Precision
    reason: str


def is_fast(precision: Precision, device_type: str) -> bool:
    """Whether a device has instructions for ``precision``; without them a CPU is several times slower than in fp32.

    Args:
        device_type: ``cuda`` or ``cpu``, of this process.
    """
    if precision == "fp32":
        return True
    if device_type != "cpu":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "fp16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN, which also obeys ONEDNN_MAX_CPU_ISA, calls bf16 supported on AVX-512 without bf16 instructions too
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        platform.machine().lower() not in ("x86_64", "amd64")
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )


def fast_precision(device_type: str) -> FastPrecision:
    """The precision for ``"auto"``: half precision where ``is_fast``; on a CPU fp32 otherwise.

    Args:
        device_type: see ``is_fast``.
    """
    device = "this processor" if device_type == "cpu" else "this GPU"
    if is_fast("bf16", device_type):
        return FastPrecision("bf16", f"{device} has bf16 instructions")
    if device_type == "cpu":  # fp16 would be as fast where it has instructions, but its range wants a loss scale
        return FastPrecision("fp32", f"{device} has no bf16 instructions and would emulate them, several times slower")
    return FastPrecision("fp16", f"{device} has fp16 instructions, but none for bf16")


def common_precision(choices: list[FastPrecision]) -> FastPrecision:
    """The choice that suits all ranks: the first of those that are furthest from bf16."""
    return max(choices, key=lambda choice: ("bf16", "fp16", "fp32").index(choice.precision))
