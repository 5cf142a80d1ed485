"""Whatever a library user's model returns: the step is plain PyTorch's on the mean over all items, or it is refused."""

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

# how a forward returns its loss, and how a reader who knows it takes it out again
RETURN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda loss, logits: loss,
    "one element": lambda loss, logits: loss.reshape(1),
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
    "object": lambda loss, logits: CausalLMOutput(loss=loss, logits=logits),
    "tuple": lambda loss, logits: (loss, logits),
    "loss last": lambda loss, logits: (logits, loss.detach() * 2, loss),
}
PICK: dict[str, Callable[[Any], Tensor]] = {
    "tensor": lambda output: output,
    "one element": lambda output: output[0],
    "dict": lambda output: output["loss"],
    "object": lambda output: output.loss,
    "tuple": lambda output: output[0],
    "loss last": lambda output: output[2],
}
WAYS = ["passes", "passes by position", "masks", "shifts", "as they are"]


class Wrapper(Module):
    """A module of a user's own around a causal model of transformers, which computes its loss in one of several ways.

    Args:
        way: passes labels on, perhaps by position; shifts them by itself; does not; or makes them of a mask.
        output: a key of ``RETURN``.
    """

    def __init__(self, way: str, output: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = LlamaForCausalLM(tiny_model().config)
        self.way, self.output = way, output

    def forward(self, input_ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Any:
        if self.way == "masks":
            labels = labels.masked_fill(labels == 7, -100)
        if self.way in ("passes", "masks"):
            found = self.inner(input_ids=input_ids, labels=labels)
            return RETURN[self.output](found.loss, found.logits)
        if self.way == "passes by position":
            found = self.inner(input_ids, None, None, None, None, labels)
            return RETURN[self.output](found.loss, found.logits)
        logits = self.inner(input_ids=input_ids).logits
        if self.way == "shifts":
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        return RETURN[self.output](loss, logits)

    def items(self, labels: Tensor) -> int:
        """What its loss is a mean over."""
        counts = labels != -100
        if self.way == "masks":
            counts &= labels != 7
        return int((counts if self.way == "as they are" else counts[:, 1:]).sum())


ROWS, LENGTH = 2, 8
ONLY_FIRST = ROWS * LENGTH + 1  # of each row counts


def batch_of(seed: int, ignored: int) -> dict[str, Tensor]:
    """A batch of which the first ``ignored`` labels do not count, or all but those that no causal model predicts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    if ignored == ONLY_FIRST:
        labels[:, 1:] = -100
    labels.flatten()[: ignored % ONLY_FIRST] = -100
    return {"input_ids": ids, "labels": labels}


def step_plainly(model: Wrapper, batches: list[dict[str, Tensor]]) -> float:
    """One step of SGD on the mean over the items of all batches; none, and nan, where there are no items."""
    items = [model.items(batch["labels"]) for batch in batches]
    if not sum(items):
        return math.nan
    weighted = [
        PICK[model.output](model(**batch)) * (count / sum(items))
        for batch, count in zip(batches, items, strict=True)
        if count
    ]
    total = torch.stack(weighted).sum()
    total.backward()
    torch.optim.SGD(model.parameters(), lr=0.3).step()
    return float(total.detach())


def compare(way: str, output: str, schedule: str, ignored: list[list[int]], says: bool) -> str | float:
    """A step of this rank's micro-batches against plain PyTorch: the largest difference of a weight, or the refusal.

    Args:
        ignored: of each rank, of each micro-batch: how many labels do not count.
        says: whether ``num_items`` is given.
    """
    model = Wrapper(way, output)
    batches = [
        [batch_of(10 * rank + number, count) for number, count in enumerate(counts)]
        for rank, counts in enumerate(ignored)
    ]
    reference = copy.deepcopy(model)
    engine = make_engine(model, schedule, threshold=0)
    mine = batches[dist.get_rank()]
    given = [model.items(batch["labels"]) for batch in mine] if says else None
    try:
        loss = float(engine.train_batch(mine, num_items=given))
    except LomoError as refusal:
        return str(refusal)
    assert loss == pytest.approx(
        step_plainly(reference, [batch for of_rank in batches for batch in of_rank]), abs=1e-5, nan_ok=True
    )
    return largest_difference(weights_of(engine), reference)


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, str, str, list[list[int]], bool]:
    """Arguments of ``compare``, for two ranks."""
    schedule = draw(st.sampled_from(["immediate", "two_pass", "stash"]))
    micro_batches = draw(st.integers(1, 3)) if schedule == "stash" else 1
    of_rank = st.lists(st.integers(0, ONLY_FIRST), min_size=micro_batches, max_size=micro_batches)
    return (
        draw(st.sampled_from(WAYS)),
        draw(st.sampled_from(list(RETURN))),
        schedule,
        draw(st.lists(of_rank, min_size=2, max_size=2)),
        draw(st.booleans()),
    )


def check_step(two_ranks: Ranks, arguments: tuple[Any, ...]) -> bool:
    """Whether both ranks take the exact step; both may refuse it only where nobody can know the items."""
    way, _, _, ignored, says = arguments
    outcomes = two_ranks.run(compare, *arguments)
    if all(isinstance(outcome, float) for outcome in outcomes):
        assert max(outcomes) < 1e-6
        return True
    assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
    assert not says
    is_known = way.startswith("passes") or (way == "masks" and len(ignored[0]) == 1)
    assert not is_known or any(ONLY_FIRST in counts for counts in ignored)
    return False


@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps())
def test_a_step_is_exact_or_refused_on_all_ranks(ranks: GroupOf, arguments: tuple[Any, ...]) -> None:
    check_step(ranks(2), arguments)


@pytest.mark.parametrize("says", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize("way", WAYS)
def test_ragged_labels_in_a_module_of_ones_own(ranks: GroupOf, way: str, says: bool) -> None:
    check_step(ranks(2), (way, "dict", "immediate", [[0], [5]], says))


@pytest.mark.parametrize("way", WAYS)
def test_even_labels_need_no_number(ranks: GroupOf, way: str) -> None:
    assert max(ranks(2).run(compare, way, "tuple", "immediate", [[0], [0]], False)) < 1e-6


@pytest.mark.parametrize("way", ["passes", "passes by position"])
def test_labels_passed_on_are_known_of_every_micro_batch(ranks: GroupOf, way: str) -> None:
    assert max(ranks(2).run(compare, way, "tensor", "stash", [[0, 3], [1, 5]], False)) < 1e-6


# a fault on one rank


class MayReturnNoLoss(Module):
    """As a model does whose batch holds no labels."""

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


def refused_by_idiom(fault: str) -> str:
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
        ("detached", "depends on no parameter"),
        ("none", "returned no loss"),
    ],
)
def test_backward_refuses_what_is_no_loss(ranks: GroupOf, fault: str, reason: str) -> None:
    assert reason in ranks(1).run(refused_by_idiom, fault)[0]
