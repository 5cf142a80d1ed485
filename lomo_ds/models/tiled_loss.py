"""A fused linear layer and cross-entropy, computed in tiles so that the full logits never exist.

Forward saves the logsumexp of each token. Backward recomputes every tile of logits and turns it into the logits'
gradient in place. Thus a backward pass produces one finished gradient of the weight, already multiplied by the
gradient of the loss. This needs four matrix products instead of the usual three.

A tile is a block of the vocabulary times a run of tokens. All runs of one block are processed before the next block,
so the weight's gradient is accumulated in fp32 for one block at a time, regardless of the number of runs. The gradient
of the hidden states is accumulated over the blocks in its own dtype, which is why there are few blocks.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lomo_ds.data.formats import IGNORE_INDEX

TILE_BYTES = 2**26  # 64 MiB of fp32 logits: large enough for matrix products at full speed
MAX_BLOCKS = 4  # blocks of the vocabulary; the fp32 sum of one takes half the bytes of the weight's bf16 gradient


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """Return the cross-entropy of the logits ``hidden @ weight.T + bias`` with ``labels``, summed over the tokens.

    Logits are rounded to the weight's dtype, and softmax is computed in fp32, as in transformers.

    Args:
        hidden: (tokens, hidden size), the weight's dtype.
        weight: (vocabulary, hidden size).
        bias: (vocabulary,) or None.
        labels: (tokens,), int64; those equal to ``ignore_index`` are ignored.
        tile_bytes: the largest size of one fp32 tile of logits (but a tile has at least one token per block).

    Returns:
        0-dim, fp32.
    """
    total: Tensor = _TiledCrossEntropy.apply(hidden, weight, bias, labels, ignore_index, tile_bytes)
    return total


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        tile_bytes: int,
    ) -> Tensor:
        counted = labels != ignore_index
        torch._assert_async(  # checks without a device synchronization
            (~counted | (labels >= 0) & (labels < len(weight))).all(), "a label is outside the vocabulary"
        )
        blocks, runs = _tile_slices(len(hidden), len(weight), tile_bytes)
        log_sums = torch.full_like(labels, -math.inf, dtype=torch.float32)
        label_logits = torch.zeros_like(log_sums)
        for block in blocks:
            for run in runs:
                tile = _logits(hidden[run], weight[block], None if bias is None else bias[block])
                within, column = _label_columns(labels[run], block)
                label_logits[run] += torch.where(within, tile.gather(1, column).squeeze(1), 0.0)
                log_sums[run] = torch.logaddexp(log_sums[run], _logsumexp_(tile))
                del tile  # free it before the next tile is allocated
        # save the weight itself, because a view would keep ZeRO-3's gathered copy alive
        ctx.save_for_backward(hidden, weight, bias, labels, counted, log_sums)
        ctx.tile_bytes = tile_bytes
        return torch.where(counted, log_sums - label_logits, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, counted, log_sums = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if of_hidden else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        factors = torch.where(counted, grad, 0.0)
        blocks, runs = _tile_slices(len(hidden), len(weight), ctx.tile_bytes)
        for block in blocks:
            rows = weight[block]
            sums = None if grad_weight is None else _WeightSum(grad_weight[block], len(runs))
            for run in runs:
                tile = _logits(hidden[run], rows, None if bias is None else bias[block])
                tile = _to_gradient_(tile, log_sums[run], *_label_columns(labels[run], block), factors[run]).to(
                    weight.dtype
                )
                if grad_hidden is not None:
                    grad_hidden[run].addmm_(tile, rows)
                if sums is not None:
                    sums.add(tile, hidden[run])
                if grad_bias is not None:
                    grad_bias[block] += tile.sum(0, dtype=torch.float32)
                del tile
            if sums is not None:
                sums.finish()
            del sums  # free its fp32 sum before the next block's is allocated
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), None, None, None


class _WeightSum:
    """Accumulator of one block of the weight's gradient in fp32; it allocates memory only if the gradient is not fp32.

    Args:
        gradient: (rows of the block, hidden size), filled when ``finish`` is called.
        products: the number of calls to ``add``.
    """

    def __init__(self, gradient: Tensor, products: int) -> None:
        self.gradient = gradient
        self.single = products == 1
        in_place = self.single or gradient.dtype == torch.float32
        self.total = gradient if in_place else torch.empty_like(gradient, dtype=torch.float32)
        if not self.single:
            self.total.zero_()

    def add(self, tile: Tensor, hidden: Tensor) -> None:
        """Add ``tile.T @ hidden``: (tokens, rows of the block) and (tokens, hidden size)."""
        if self.single:
            torch.mm(tile.T, hidden, out=self.total)
        else:
            self.total += tile.T @ hidden

    def finish(self) -> None:
        """Round the sum to the gradient's dtype."""
        if self.total is not self.gradient:
            self.gradient.copy_(self.total)


def _tile_slices(tokens: int, vocabulary: int, tile_bytes: int) -> tuple[list[slice], list[slice]]:
    """Return blocks of the vocabulary and runs of tokens such that a tile of fp32 logits fits in ``tile_bytes``."""
    numel = tile_bytes // torch.float32.itemsize
    width = math.ceil(vocabulary / min(MAX_BLOCKS, math.ceil(tokens * vocabulary / numel) or 1))
    length = max(1, numel // width)
    return _slices(vocabulary, width), _slices(tokens, length)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a tile of logits as a new fp32 tensor."""
    return (hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)).float()


def _label_columns(labels: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return whether each label is in a block of the vocabulary, and its column there (or 0), as (tokens, 1)."""
    columns = labels - block.start
    within = (columns >= 0) & (labels < block.stop)
    return within, torch.where(within, columns, 0)[:, None]


def _logsumexp_(tile: Tensor) -> Tensor:
    """Return the logsumexp of each row; overwrites ``tile``, while torch.logsumexp would allocate as much memory."""
    largest = tile.amax(1)
    return tile.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)


def _to_gradient_(tile: Tensor, log_sums: Tensor, within: Tensor, column: Tensor, factors: Tensor) -> Tensor:
    """Turn a tile of logits in place into the gradient of ``factors`` times their cross-entropies, in fp32.

    The gradient is rounded only after it is multiplied by the loss scale; before, it would be too small for fp16.
    """
    tile.sub_(log_sums[:, None]).exp_()
    tile.scatter_add_(1, column, -within.float()[:, None])
    return tile.mul_(factors[:, None])
