"""How many items the mean in a micro-batch's loss is taken over, which decides what it weighs in a step.

Integer labels other than -100 count; without labels, or with real-valued ones, every row counts the same. Whether a
model predicts the first label of a row is known of transformers' models. Of another it is not, so items are counted
in both ways, and both must come to the same weights.
"""

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lomo_ds.data.packing import IGNORE_INDEX
from lomo_ds.errors import ConfigError

WAY_OUT = "give num_items to train_batch, how many items each loss is a mean over"


class Count(NamedTuple):
    """Items of one micro-batch, counted in the two ways that its model may; the same twice where that is known.

    Attributes:
        items: every label, or every row.
        otherwise: without the first label of each row, or by what else of the batch may be its rows.
    """

    items: int
    otherwise: int


class Seen(NamedTuple):
    """The labels that reached a transformers model within another, and whether it shifts them."""

    labels: Tensor
    shifts: bool


class LabelObserver:
    """Knows how a model counts its labels, or sees it when it passes them on to a transformers model within it.

    Attributes:
        shifts: whether it shifts them; None where that must be seen.
        seen: in the last forward.
    """

    def __init__(self, model: Module) -> None:
        self.shifts = shifts_labels(model)
        self.seen: Seen | None = None
        inner = [] if self.shifts is not None else [module for module in model.modules() if module is not model]
        self.handles = [
            module.register_forward_pre_hook(self._see, with_kwargs=True)
            for module in inner
            if shifts_labels(module) is not None
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def _see(self, module: Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        given = dict(zip(inspect.signature(module.forward).parameters, arguments, strict=False)) | inputs
        for name in ("shift_labels", "labels"):
            labels = given.get(name)
            if self.seen is None and isinstance(labels, Tensor):
                self.seen = Seen(labels, name == "labels" and bool(shifts_labels(module)))


def shifts_labels(model: Module) -> bool | None:
    """Whether the model's loss compares each position with the label of the next; None where that is not known.

    transformers' models compute their loss by ``self.loss_function``, or by one of two idioms in their forward.
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
    # lomo_ds computes a causal model's loss by tiles; models with remote code follow the name of their class
    of_convention = package in ("lomo_ds", "transformers_modules") and model.loss_type == "ForCausalLM"
    return True if of_convention else None


def count_items(batch: Mapping[str, Any], shifts: bool | None) -> Count:
    """Count what the mean in the loss of a micro-batch is taken over.

    Args:
        shifts: whether the model shifts ``labels``, if that is known.

    Raises:
        ConfigError: there is nothing to count.
    """
    name = "shift_labels" if batch.get("shift_labels") is not None else "labels"
    labels = batch.get(name)
    if labels is None:
        return _count_rows(batch)
    if not isinstance(labels, Tensor):
        raise ConfigError(f"{name} must be a tensor to be counted, got a {type(labels).__name__}; {WAY_OUT}")
    if labels.numel() == 0:
        raise ConfigError(f"{name} has no element, got shape {list(labels.shape)}; give each micro-batch a row")
    if labels.is_floating_point():
        return Count(labels.shape[0] if labels.dim() else 1, labels.numel())
    if name == "shift_labels":
        return count_labels(labels, shifts=False)
    return count_labels(labels, shifts)


def count_labels(labels: Tensor, shifts: bool | None) -> Count:
    """Count the integer ``labels``; no model is known to shift a single label for each row."""
    items = 0 if shifts else int((labels != IGNORE_INDEX).sum())
    otherwise = items
    if shifts or (shifts is None and labels.dim() > 1):
        otherwise = int((labels[..., 1:] != IGNORE_INDEX).sum())
    return Count(otherwise if shifts else items, otherwise)


def parse_num_items(num_items: int | Sequence[int], micro_batches: int) -> list[Count]:
    """What a caller says that each micro-batch's loss is a mean over.

    Raises:
        ConfigError: it is not one whole number for each.
    """
    given = list(num_items) if isinstance(num_items, list | tuple) else [num_items]
    try:
        counts = [operator.index(count) for count in given]  # type: ignore[arg-type]
    except TypeError:
        counts = [-1]
    if len(counts) != micro_batches or min(counts) < 0 or any(isinstance(count, bool) for count in given):
        raise ConfigError(
            f"num_items must be a whole number of items, or a list of one for each of the {micro_batches} "
            f"micro-batches, got {num_items!r}"
        )
    return [Count(count, count) for count in counts]


def count_sums(counts: Iterable[Count]) -> list[float]:
    """What ranks add up to know the items of a step, and whether both ways of counting give the same weights."""
    pairs = list(counts)
    items, otherwise = (sum(count[way] for count in pairs) for way in (0, 1))
    products = [sum(count[one] * count[other] for count in pairs) for one, other in ((0, 0), (1, 1), (0, 1))]
    return [float(value) for value in (items, otherwise, *products)]


def total_items(sums: Sequence[float]) -> int:
    """The items of a whole step, from ``count_sums`` of all ranks together.

    Raises:
        ConfigError: the two ways of counting weigh some micro-batch differently.
    """
    items, otherwise, square, other_square, product = map(int, sums)
    # two vectors are proportional if and only if Cauchy and Schwarz's inequality is an equation
    if bool(items) != bool(otherwise) or product**2 != square * other_square:
        raise ConfigError(
            "it is not known how many items each loss is a mean over, and it matters, as micro-batches differ: with "
            "labels, whether the model predicts the first of a row; without, what in the batch its rows are; " + WAY_OUT
        )
    return items


def _count_rows(batch: Mapping[str, Any]) -> Count:
    rows = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if not rows:
        raise ConfigError(f"a batch without labels must hold a tensor whose rows can be counted; {WAY_OUT}")
    if not rows[0]:
        raise ConfigError("a batch has no row; give each micro-batch one")
    if len(set(rows)) == 1:
        return Count(rows[0], rows[0])
    return Count(rows[0], sum(number * length for number, length in enumerate(rows, start=1)))
