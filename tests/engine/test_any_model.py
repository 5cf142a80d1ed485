"""Models of library users: for every kind of output, a step equals plain PyTorch's or is refused on all ranks."""

import copy
import math
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from lomo_ds.errors import ConfigError, LomoError
from tests.engine.test_baseline import make_baseline
from tests.engines import identical, largest_difference, make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import VOCABULARY, tiny_model

GroupOf = Callable[..., Ranks]

# the ways a forward may return its loss, and the inverse of each
RETURN_LOSS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda loss, logits: loss,
    "one element": lambda loss, logits: loss.reshape(1),
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
    "object": lambda loss, logits: CausalLMOutput(loss=loss, logits=logits),
    "tuple": lambda loss, logits: (loss, logits),
    "loss last": lambda loss, logits: (logits, loss.detach() * 2, loss),
}
EXTRACT_LOSS: dict[str, Callable[[Any], Tensor]] = {
    "tensor": lambda output: output,
    "one element": lambda output: output[0],
    "dict": lambda output: output["loss"],
    "object": lambda output: output.loss,
    "tuple": lambda output: output[0],
    "loss last": lambda output: output[2],
}
LABEL_USES = ["passes", "passes by position", "masks", "shifts", "as they are"]


class Wrapper(Module):
    """A user's module around a causal transformers model that computes its loss in one of several ways.

    Args:
        label_use: a value of ``LABEL_USES``: pass labels to the model by name or by position, mask or shift them, or
            use them unshifted.
        output: a key of ``RETURN_LOSS``.
    """

    def __init__(self, label_use: str, output: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = LlamaForCausalLM(tiny_model().config)
        self.label_use, self.output = label_use, output

    def forward(self, input_ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Any:
        if self.label_use == "masks":
            labels = labels.masked_fill(labels == 7, -100)
        if self.label_use in ("passes", "masks"):
            inner_output = self.inner(input_ids=input_ids, labels=labels)
            return RETURN_LOSS[self.output](inner_output.loss, inner_output.logits)
        if self.label_use == "passes by position":
            inner_output = self.inner(input_ids, None, None, None, None, labels)
            return RETURN_LOSS[self.output](inner_output.loss, inner_output.logits)
        logits = self.inner(input_ids=input_ids).logits
        if self.label_use == "shifts":
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        return RETURN_LOSS[self.output](loss, logits)

    def items(self, labels: Tensor) -> int:
        """Return the number of items that the loss is averaged over."""
        counts = labels != -100
        if self.label_use == "masks":
            counts &= labels != 7
        return int((counts if self.label_use == "as they are" else counts[:, 1:]).sum())


ROWS, LENGTH = 2, 8
ONLY_FIRST = ROWS * LENGTH + 1  # value of ``ignored``: only the first label of each row counts


def batch_of(seed: int, ignored: int) -> dict[str, Tensor]:
    """Return a batch whose first ``ignored`` labels are -100; with ``ONLY_FIRST``, all but the first of each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    if ignored == ONLY_FIRST:
        labels[:, 1:] = -100
    labels.flatten()[: ignored % ONLY_FIRST] = -100
    return {"input_ids": ids, "labels": labels}


def reference_step(model: Wrapper, batches: list[dict[str, Tensor]]) -> float:
    """Take an SGD step on the mean over the items of all batches; without items, take none and return nan."""
    items = [model.items(batch["labels"]) for batch in batches]
    if not sum(items):
        return math.nan
    weighted = [
        EXTRACT_LOSS[model.output](model(**batch)) * (count / sum(items))
        for batch, count in zip(batches, items, strict=True)
        if count
    ]
    total = torch.stack(weighted).sum()
    total.backward()
    torch.optim.SGD(model.parameters(), lr=0.3).step()
    return float(total.detach())


def compare(
    label_use: str, output: str, schedule: str, ignored: list[list[int]], passes_num_items: bool
) -> str | float:
    """Compare a step with plain PyTorch; return the largest weight difference, or the error message of a refusal.

    Args:
        ignored: the number of ignored labels of each micro-batch, for each rank.
        passes_num_items: whether to pass ``num_items``.
    """
    model = Wrapper(label_use, output)
    batches = [
        [batch_of(10 * rank + number, count) for number, count in enumerate(counts)]
        for rank, counts in enumerate(ignored)
    ]
    reference = copy.deepcopy(model)
    engine = make_engine(model, schedule, threshold=0)
    rank_batches = batches[dist.get_rank()]
    num_items = [model.items(batch["labels"]) for batch in rank_batches] if passes_num_items else None
    try:
        loss = float(engine.train_batch(rank_batches, num_items=num_items))
    except LomoError as refusal:
        return str(refusal)
    assert loss == pytest.approx(
        reference_step(reference, [batch for rank_list in batches for batch in rank_list]), abs=1e-5, nan_ok=True
    )
    return largest_difference(weights_of(engine), reference)


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, str, str, list[list[int]], bool]:
    """Draw arguments of ``compare`` for two ranks."""
    schedule = draw(st.sampled_from(["immediate", "two_pass", "stash"]))
    micro_batches = draw(st.integers(1, 3)) if schedule == "stash" else 1
    rank_ignored = st.lists(st.integers(0, ONLY_FIRST), min_size=micro_batches, max_size=micro_batches)
    return (
        draw(st.sampled_from(LABEL_USES)),
        draw(st.sampled_from(list(RETURN_LOSS))),
        schedule,
        draw(st.lists(rank_ignored, min_size=2, max_size=2)),
        draw(st.booleans()),
    )


def check_step(two_ranks: Ranks, arguments: tuple[Any, ...]) -> bool:
    """Return whether both ranks take the exact step; both may refuse it only if the items are unknowable."""
    label_use, _, _, ignored, passes_num_items = arguments
    outcomes = two_ranks.run(compare, *arguments)
    if all(isinstance(outcome, float) for outcome in outcomes):
        assert max(outcomes) < 1e-6
        return True
    assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
    assert not passes_num_items
    is_known = label_use.startswith("passes") or (label_use == "masks" and len(ignored[0]) == 1)
    assert not is_known or any(ONLY_FIRST in counts for counts in ignored)
    return False


@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps())
def test_a_step_is_exact_or_refused_on_all_ranks(ranks: GroupOf, arguments: tuple[Any, ...]) -> None:
    check_step(ranks(2), arguments)


@pytest.mark.parametrize("passes_num_items", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize("label_use", LABEL_USES)
def test_ragged_labels_in_a_custom_module(ranks: GroupOf, label_use: str, passes_num_items: bool) -> None:
    check_step(ranks(2), (label_use, "dict", "immediate", [[0], [5]], passes_num_items))


@pytest.mark.parametrize("label_use", LABEL_USES)
def test_equal_label_counts_need_no_num_items(ranks: GroupOf, label_use: str) -> None:
    assert max(ranks(2).run(compare, label_use, "tuple", "immediate", [[0], [0]], False)) < 1e-6


@pytest.mark.parametrize("label_use", ["passes", "passes by position"])
def test_labels_passed_to_an_inner_model_are_counted(ranks: GroupOf, label_use: str) -> None:
    assert max(ranks(2).run(compare, label_use, "tensor", "stash", [[0, 3], [1, 5]], False)) < 1e-6


# a missing loss on one rank


class MayReturnNoLoss(Module):
    """Returns no loss if ``silent``, like a model whose batch has no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x: Tensor, silent: bool) -> dict[str, Tensor]:
        loss = self.linear(x).mean()
        return {"other": loss} if silent else {"loss": loss}


def no_loss_on(rank: int, baseline: bool) -> str:
    engine: Any = make_baseline(MayReturnNoLoss(), "sgd") if baseline else make_engine(MayReturnNoLoss(), threshold=0)
    before = weights_of(engine)
    with pytest.raises(LomoError) as refusal:
        engine.train_batch({"x": torch.ones(2, 3), "silent": dist.get_rank() == rank})
    assert identical(before, weights_of(engine))
    engine.train_batch({"x": torch.ones(2, 3), "silent": False})
    assert not identical(before, weights_of(engine))
    return str(refusal.value)


@pytest.mark.parametrize("baseline", [False, True], ids=["lomo", "baseline"])
def test_no_loss_on_one_rank_ends_the_step_on_all(ranks: GroupOf, baseline: bool) -> None:
    here, there = ranks(2).run(no_loss_on, 0, baseline)
    assert "the model returned no loss; labels must be in the batch" in here
    assert "another rank" in there


def refused_by_backward(fault: str) -> str:
    engine = make_engine(MayReturnNoLoss())
    output = engine(x=torch.ones(2, 3), silent=False)
    loss = {
        "output": CausalLMOutput(loss=output["loss"]),
        "rows": output["loss"].expand(2),
        "detached": output["loss"].detach(),
        "none": None,
    }[fault]
    with pytest.raises(ConfigError) as refusal:
        engine.backward(loss)
    engine.backward(output["loss"].reshape(1))
    engine.step()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("output", "got a CausalLMOutput; pass its .loss"),
        ("rows", "shape [2]; reduce it to its mean"),
        ("detached", "depends on no trainable parameter"),
        ("none", "returned no loss"),
    ],
)
def test_backward_refuses_invalid_losses(ranks: GroupOf, fault: str, reason: str) -> None:
    assert reason in ranks(1).run(refused_by_backward, fault)[0]
