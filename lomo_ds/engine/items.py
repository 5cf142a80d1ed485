"""Item counts: the number of items each micro-batch loss is averaged over, which determines its weight in a step.

The items are the integer labels other than -100. Without labels, or with floating-point labels, they are the rows.
For transformers models it is known whether the loss shifts labels, that is, ignores the first label of each row. For
other models it is unknown, so items are counted both ways, and both counts must give the same weights.
"""

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.errors import ConfigError

NUM_ITEMS_HINT = "give num_items to train_batch, the number of items each loss is averaged over"


class Count(NamedTuple):
    """Items of one micro-batch, counted in the two possible ways; equal if it is known how the model counts.

    Attributes:
        items: all labels, or the rows of the batch's first tensor.
        alternative: all labels but the first of each row, or a number that depends on the rows of all tensors.
    """

    items: int
    alternative: int


class ObservedLabels(NamedTuple):
    """Labels that an inner transformers model has received, and whether it shifts them."""

    labels: Tensor
    shifts: bool


class LabelObserver:
    """Determines whether a model shifts its labels, or observes the labels that it passes to an inner model.

    Attributes:
        shifts: whether the model shifts labels; None if that is unknown and must be observed.
        observed: the labels that the last forward passed to an inner transformers model.
    """

    def __init__(self, model: Module) -> None:
        self.shifts = shifts_labels(model)
        self.observed: ObservedLabels | None = None
        inner_modules = [] if self.shifts is not None else [module for module in model.modules() if module is not model]
        self.handles = [
            module.register_forward_pre_hook(self._observe, with_kwargs=True)
            for module in inner_modules
            if shifts_labels(module) is not None
        ]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()

    def _observe(self, module: Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        named = dict(zip(inspect.signature(module.forward).parameters, arguments, strict=False)) | inputs
        for name in ("shift_labels", "labels"):
            labels = named.get(name)
            if self.observed is None and isinstance(labels, Tensor):
                self.observed = ObservedLabels(labels, name == "labels" and bool(shifts_labels(module)))


def shifts_labels(model: Module) -> bool | None:
    """Return whether the model's loss compares each position with the next label; None if that is unknown.

    transformers models compute their loss with ``self.loss_function``, or with one of two idioms in their forward.
    """
    forward: Any = inspect.unwrap(model.forward)
    if not isinstance(model, PreTrainedModel) or not hasattr(forward, "__code__"):
        return None
    names = {*forward.__code__.co_names, *forward.__code__.co_varnames}
    if "loss_function" in names:
        shifts_itself = any(name.startswith("shift_") for name in names)
        return None if shifts_itself else model.loss_function is ForCausalLMLoss
    package = forward.__module__.partition(".")[0]
    if package == "transformers":
        if "CrossEntropyLoss" not in names:
            return None
        return bool(names & {"shift_logits", "shift_labels"})
    # lomo_ds replaces the forward for tiled losses; for models with remote code the class name determines loss_type
    is_causal_lm = package in ("lomo_ds", "transformers_modules") and model.loss_type == "ForCausalLM"
    return True if is_causal_lm else None


def count_items(batch: Mapping[str, Any], shifts: bool | None) -> Count:
    """Count the items that the loss of a micro-batch is averaged over.

    Args:
        shifts: whether the model shifts ``labels``; None if unknown.

    Raises:
        ConfigError: the batch holds nothing to count.
    """
    name = "shift_labels" if batch.get("shift_labels") is not None else "labels"
    labels = batch.get(name)
    if labels is None:
        return _count_rows(batch)
    if not isinstance(labels, Tensor):
        raise ConfigError(f"{name} must be a tensor to be counted, got a {type(labels).__name__}; {NUM_ITEMS_HINT}")
    if labels.numel() == 0:
        raise ConfigError(f"{name} must not be empty, got shape {list(labels.shape)}; give each micro-batch a row")
    if labels.is_floating_point():
        return Count(labels.shape[0] if labels.dim() else 1, labels.numel())
    if name == "shift_labels":
        return count_labels(labels, shifts=False)
    return count_labels(labels, shifts)


def count_labels(labels: Tensor, shifts: bool | None) -> Count:
    """Count integer ``labels``; one label per row is counted as unshifted unless ``shifts`` is true."""
    items = 0 if shifts else int((labels != IGNORE_INDEX).sum())
    alternative = items
    if shifts or (shifts is None and labels.dim() > 1):
        alternative = int((labels[..., 1:] != IGNORE_INDEX).sum())
    return Count(alternative if shifts else items, alternative)


def parse_num_items(num_items: int | Sequence[int], micro_batches: int) -> list[Count]:
    """Convert the caller's ``num_items`` to one count per micro-batch.

    Raises:
        ConfigError: ``num_items`` is not one non-negative integer per micro-batch.
    """
    values = list(num_items) if isinstance(num_items, list | tuple) else [num_items]
    try:
        counts = [operator.index(value) for value in values]  # type: ignore[arg-type]
    except TypeError:
        counts = [-1]
    if len(counts) != micro_batches or min(counts) < 0 or any(isinstance(value, bool) for value in values):
        raise ConfigError(
            f"num_items must be a non-negative integer, or a list of one for each of the {micro_batches} "
            f"micro-batches, got {num_items!r}"
        )
    return [Count(count, count) for count in counts]


def count_sums(counts: Iterable[Count]) -> list[float]:
    """Return the sums to all-reduce before ``total_items``: both item counts, their squares and their product."""
    pairs = list(counts)
    items, alternative = (sum(count[field] for count in pairs) for field in (0, 1))
    products = [sum(count[i] * count[j] for count in pairs) for i, j in ((0, 0), (1, 1), (0, 1))]
    return [float(value) for value in (items, alternative, *products)]


def total_items(sums: Sequence[float]) -> int:
    """Return the number of items of a step, given the all-reduced ``count_sums``.

    Raises:
        ConfigError: the two ways of counting give different weights.
    """
    items, alternative, square, alternative_square, product = map(int, sums)
    # two vectors are proportional if and only if the Cauchy-Schwarz inequality is an equality
    if bool(items) != bool(alternative) or product**2 != square * alternative_square:
        raise ConfigError(
            "the number of items each loss is averaged over is unknown, and the micro-batches differ: with labels, "
            "the model may or may not predict the first label of a row; without labels, the tensors of the batch "
            f"differ in length; {NUM_ITEMS_HINT}"
        )
    return items


def _count_rows(batch: Mapping[str, Any]) -> Count:
    rows = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if not rows:
        raise ConfigError(f"a batch without labels must hold a tensor whose rows can be counted; {NUM_ITEMS_HINT}")
    if not rows[0]:
        raise ConfigError("a micro-batch must have at least one row, got none; leave empty micro-batches out")
    if len(set(rows)) == 1:
        return Count(rows[0], rows[0])
    return Count(rows[0], sum(number * length for number, length in enumerate(rows, start=1)))
