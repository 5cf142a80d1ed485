"""Fused attention on devices without data: its operations and its memory, but no values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Told of each kernel: its name, its floating-point operations, and the tensors that it reads and writes
OnKernel = Callable[[str, int, list[Tensor]], None]


def fused_attention(on_kernel: OnKernel) -> Callable[..., Tensor]:
    """Return a stand-in for ``torch.nn.functional.scaled_dot_product_attention``."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        flops = (
            2 * query.numel() * key.shape[-2] + 2 * query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]
        )
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # the kernels add a mask to the scores
            attn_mask = query.new_empty(attn_mask.shape)
        output: Tensor = _Attention.apply(query, key, value, attn_mask, flops // 2 if is_causal else flops, on_kernel)
        return output

    return attend


class _Attention(torch.autograd.Function):
    """Memory of a fused attention kernel: its output and one number per query, but never queries x keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, flops: int, on_kernel: OnKernel
    ) -> Tensor:
        batch, heads, rows, _ = query.shape
        output = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)  # the kernels' memory layout
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, log_sums)
        ctx.kernel = on_kernel, flops
        on_kernel("attention", flops, [query, key, value, output])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, _, output, _ = ctx.saved_tensors
        on_kernel, flops = ctx.kernel
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        on_kernel("attention backward", 5 * flops // 2, [query, key, value, output, gradient, *results])
        return *results, None, None, None
