"""Linear layers whose weights come and go: what they compute, and that nothing holds a weight which is gone."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch.nn import Linear, Sequential
from torch.utils.checkpoint import checkpoint

from lomo_ds import zero3


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_as_torch_does(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    actual = Linear(4, 3, bias=bias)
    expected, values = copy.deepcopy(actual), torch.randn(shape)
    inputs = [values.clone().requires_grad_() for _ in range(2)]
    undo = zero3.install_memory_efficient_linear(Sequential(actual))
    results = [layer(given) for layer, given in zip((actual, expected), inputs, strict=True)]
    torch.testing.assert_close(*results)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for one, other in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    undo()
    assert "forward" not in vars(actual)


def test_a_layer_that_is_computed_again_holds_no_weight_that_was_freed() -> None:
    torch.manual_seed(0)
    model = Sequential(Linear(4, 4, bias=False), Linear(4, 4, bias=False))
    values: dict[Any, Any] = {layer: layer.get_parameter("weight").detach().numpy().copy() for layer in model}
    gathered: dict[Any, weakref.ref[Any]] = {}
    alive_in_backward: list[bool] = []

    def gather(layer: Any, *_: Any) -> None:
        memory = values[layer].copy()
        gathered[layer] = weakref.ref(memory)
        layer.weight.data = torch.from_numpy(memory)

    def free(layer: Any, *_: Any) -> None:
        layer.weight.data = torch.empty(0)

    def gather_for_backward(layer: Any, *_: Any) -> None:
        alive_in_backward.extend(reference() is not None for reference in gathered.values())
        gather(layer)

    zero3.install_memory_efficient_linear(model)
    for layer in model:
        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(free)
        layer.register_full_backward_pre_hook(gather_for_backward)
    checkpoint(model, torch.randn(2, 4, requires_grad=True), use_reentrant=False).sum().backward()
    assert alive_in_backward == [False, False, False, True], "in the last backward the other's is just being used"
