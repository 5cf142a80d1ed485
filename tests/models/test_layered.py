"""Layered accumulation in one process: what it keeps, what it moves, and which models it is for."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lomo_ds.errors import ModelError
from lomo_ds.memory.host_memory import HostTransfer
from lomo_ds.models import activation_offload, can_tile_logits, recompute_activations, tile_logits
from lomo_ds.models.layered import MicroBatch, layered, reason_not_layered
from tests.layered_models import layered_model
from tests.models.test_families import FAMILIES, tiny_config
from tests.reference import VOCABULARY, tiny_model

ROWS, LENGTH, HIDDEN = 8, 12, 20
PLACES = [MicroBatch(row, row + 2, LENGTH) for row in range(0, ROWS, 2)]


def batch() -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any) -> dict[str, Tensor]:
    model(**batch(), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected)


class LiveHiddenStates(TorchDispatchMode):
    """Follows the storages that are made while it is active and hold at least one row's hidden states."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() >= LENGTH * HIDDEN:
                storage = leaf.untyped_storage()
                if storage._cdata not in self.weights:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def sizes(self) -> Counter[int]:
        """Return how many storages of each size are alive, in units of the hidden states of the whole step."""
        whole = 4 * ROWS * LENGTH * HIDDEN
        return Counter(nbytes // whole for storage, nbytes in self.made.values() if not storage.expired())


def sums_of_pytorch(count: int) -> contextlib.AbstractContextManager[None]:
    """Leave the gradients in ``.grad``, where each is added."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def summing(log: list[str]) -> Iterator[None]:
    log.append("layer")
    yield


def test_forward_keeps_one_input_of_each_layer() -> None:
    """The final norm and the head keep theirs too; the inputs of all micro-batches are one tensor."""
    model = layered_model(layers=5)
    with layered(model, PLACES, sums_of_pytorch), LiveHiddenStates(model) as live:
        loss = model(**batch(), use_cache=False).loss
        assert live.sizes() == {1: 5 + 1 + 1}
        loss.backward()
        del loss
        assert 1 not in live.sizes(), "gradients are smaller"


def test_offload_moves_the_input_of_each_layer_and_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[int, ...]] = []

    class Watched(HostTransfer):
        def offload(self, tensor: Tensor, host_tensor: Tensor) -> None:
            log.append(tuple(tensor.shape))
            super().offload(tensor, host_tensor)

    monkeypatch.setattr(activation_offload, "HostTransfer", Watched)
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    model = layered_model(layers=5)
    expected = gradients(copy.deepcopy(model))
    recompute_activations(model, offload=True)
    with layered(model, PLACES, sums_of_pytorch), LiveHiddenStates(model) as live:
        loss = model(**batch(), use_cache=False).loss
        assert log == [(2, LENGTH, HIDDEN)] * len(PLACES) * (5 + 1)
        model.model.layers[0]._gradient_checkpointing_func.transfer.flush()
        assert live.sizes()[1] == 1, "of the head; the others are in host memory, in one large tensor"
        assert sum(live.sizes().values()) == 2
        loss.backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert largest_error(actual, expected) < 1e-6


def test_gradients_are_summed_layer_by_layer() -> None:
    model, log = layered_model(layers=3), []
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: log.append(name.split(".")[2]))
    with layered(model, PLACES, lambda count: summing(log)):
        model(**batch(), use_cache=False).loss.backward()
    assert log == ["layer", *("layer", "2", "2", "2", "2"), *("layer", *"1111"), *("layer", *"0000")]


@pytest.mark.parametrize("tiled", [False, True])
def test_the_model_is_as_before_at_the_end(tiled: bool) -> None:
    model = layered_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if tiled:
        tile_logits(model)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), layered(model, PLACES, sums_of_pytorch):
        raise ZeroDivisionError
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exact_or_falls_back(name: str) -> None:
    model_type, changes = FAMILIES[name]
    assert isinstance(changes, dict)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, changes)).train()
    reason = reason_not_layered(model)
    print(f"{name}: {reason or 'layered'}")
    if not can_tile_logits(model):
        assert reason is not None
        return
    assert reason is None, "what can be tiled can be layered"
    expected = gradients(copy.deepcopy(model))
    with layered(model, PLACES, sums_of_pytorch):
        assert largest_error(gradients(model), expected) < 1e-6


def test_other_models_say_why() -> None:
    assert "is not a model of transformers" in str(reason_not_layered(torch.nn.Linear(2, 2)))
    assert "does not compute its loss like LlamaForCausalLM" in str(reason_not_layered(tiny_model()))
    for rope_type in ("dynamic", "longrope"):
        model = layered_model()
        model.config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0}
        assert f"of type {rope_type} depend on the longest row" in str(reason_not_layered(model))
    model = layered_model()
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention cannot be divided by rows" in str(reason_not_layered(model))


def test_a_forward_that_a_program_has_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def other_loss(self: LlamaForCausalLM, *arguments: Any, **inputs: Any) -> Any:
        output = forward(self, *arguments, **inputs)
        output.loss = 3 * output.loss
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", other_loss)
    model = layered_model()
    assert "whose forward was replaced" in str(reason_not_layered(model))
    assert not can_tile_logits(model)


def test_arguments_that_cannot_be_divided_are_refused() -> None:
    place = MicroBatch(0, 2, LENGTH)
    known = torch.ones(ROWS, LENGTH)
    for argument in (known[0], known[:3], known.clone().requires_grad_(), {"mask": known}, [known]):
        with pytest.raises(ModelError, match=r"cannot divide an argument of a layer.*use accumulation stash"):
            place.of_argument(argument, ROWS)
    assert place.of_argument((known, known[:1], "eager"), ROWS)[0].shape == (2, LENGTH)
