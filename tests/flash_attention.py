"""A replacement of the package flash-attn in plain PyTorch, with which transformers' flash path runs on the CPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Compute attention of (rows, length, heads, size) tensors as flash-attn defines it."""
    assert dropout_p == 0
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = (distance < 0) & causal
    if window_size[0] >= 0:
        hidden |= distance > window_size[0]
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).contiguous()


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Compute attention within each of the sequences that (tokens, heads, size) tensors hold one after the other."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    lengths = cu_seqlens_q.diff().tolist()
    sequences = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    settings: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    return torch.cat([flash_attn_func(*(x[None] for x in parts), **settings)[0] for parts in sequences])


@contextmanager
def replaced_flash_attention() -> Iterator[None]:
    """Let transformers import the functions of this file in the place of flash-attn."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=None
    )
    vars(padding).update(pad_input=None, unpad_input=None)
    utils = modeling_flash_attention_utils
    with (
        mock.patch.dict(sys.modules, {"flash_attn": package, "flash_attn.bert_padding": padding}),
        mock.patch.object(utils, "is_flash_attn_2_available", return_value=True),
        mock.patch.object(utils, "_loaded_implementation", None),
        mock.patch.object(PreTrainedModel, "_flash_attn_import_error"),
    ):
        yield
