"""New embedding rows for tokens that a model's embeddings have no rows for, created while the model is loaded."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lomo_ds.errors import ModelError
from lomo_ds.models.meta_model import saved_buffers
from lomo_ds.models.random_weights import random_piece
from lomo_ds.models.sources import Concatenated, Source, Stored

NewRows = Literal["mean", "normal"]  # initialization of new rows
DEFAULT_STD = 0.02  # transformers' default for configurations without initializer_range
PIECE_BYTES = 2**24  # bytes of rows in memory at once while their mean is computed


def set_vocab_size(config: PretrainedConfig, rows: int) -> None:
    """Set the number of embedding rows in ``config``."""
    config.get_text_config(decoder=True).vocab_size = rows


def config_before_resize(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """Return a copy of ``config`` with ``rows`` embedding rows and no padding token, which may be a new token."""
    before = copy.deepcopy(config)
    before.pad_token_id = None
    set_vocab_size(before, rows)
    return before


def extend_embeddings(
    model: PreTrainedModel, sources: dict[str, Source], new_rows: NewRows, seed: int
) -> dict[str, Source]:
    """Return the source of each parameter and saved buffer of ``model``, with new rows appended to the embeddings.

    Args:
        model: the resized model, on the meta device.
        sources: the sources of the model before resizing, keyed by name.
        seed: the seed for rows drawn from a normal distribution.

    Raises:
        ModelError: tensors other than the embeddings depend on the vocabulary size.
    """
    tensors = dict(model.named_parameters()) | saved_buffers(model)
    embeddings = {id(parameter) for parameter in _embeddings(model)}
    std = getattr(model.config, "initializer_range", DEFAULT_STD)
    extended = {}
    for name, tensor in tensors.items():
        source = sources.get(name)
        if source is None or (source.shape != tensor.shape and id(tensor) not in embeddings):
            raise ModelError(
                f"the embeddings of {type(model).__name__} cannot be resized: {name} depends on the number of tokens "
                "as well; train without --resize_embeddings"
            )
        added = tensor.shape[0] - source.shape[0] if tensor.dim() else 0
        extended[name] = _append_rows(source, name, added, new_rows, std, seed) if added else source
    return extended


def _embeddings(model: PreTrainedModel) -> Iterable[Tensor]:
    """Yield the parameters that have a row for each token: the input embedding, the output embedding and its bias."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield from module.parameters()


def _append_rows(source: Source, name: str, added: int, new_rows: NewRows, std: float, seed: int) -> Source:
    shape = torch.Size([added, *source.shape[1:]])
    if new_rows == "mean":
        rows: Source = MeanRows(shape, source.dtype, source)
    else:
        rows = Stored(shape, source.dtype, name, partial(_draw, name, shape, std, seed))
    return Concatenated(torch.Size([source.shape[0] + added, *shape[1:]]), source.dtype, (source, rows), 0)


def _draw(name: str, shape: torch.Size, std: float, seed: int, start: int, out: Tensor) -> None:
    out.copy_(random_piece(name, shape, start, start + out.numel(), std, seed))


@dataclass(frozen=True)
class MeanRows(Source):
    """Rows that are all equal to the mean of ``stored_rows``, which a rank with new rows reads once, in pieces."""

    stored_rows: Source

    def read(self, box: tuple[tuple[int, int], ...]) -> Tensor:
        """Repeat the mean."""
        (first, last), *rest = box
        mean = self._mean[tuple(slice(*bounds) for bounds in rest)]
        return mean.expand(last - first, *mean.shape)

    @cached_property
    def _mean(self) -> Tensor:
        rows, *sizes = self.stored_rows.shape
        step = max(1, PIECE_BYTES // (math.prod(sizes) * self.dtype.itemsize))
        total = torch.zeros(sizes, dtype=torch.float64)
        for first in range(0, rows, step):
            box = ((first, min(first + step, rows)), *((0, size) for size in sizes))
            total += self.stored_rows.read(box).sum(0, dtype=torch.float64)
        return (total / rows).to(self.dtype)
