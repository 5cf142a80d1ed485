"""Values of small tensors, which decide what the engine does next; those of large tensors do not exist."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

MAX_NUMEL = 2**17  # of integers, such as positions and labels
MAX_FLOATS = 2**10
aten = torch.ops.aten
# Their results have no values of their own; whatever was in memory could be infinite
UNINITIALIZED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


def values_of(tensor: Tensor) -> Tensor | None:
    """Return the values of a small tensor, on the CPU: ones where it has been computed from a large one."""
    if not _is_small(tensor):
        return None
    if not isinstance(tensor, FakeTensor):
        return tensor
    values: Tensor | None = getattr(tensor, "small_values", None)
    if values is None:
        constant = getattr(tensor, "constant", None)
        values = torch.ones(tensor.shape, dtype=tensor.dtype) if constant is None else constant.detach().clone()
        tensor.small_values = values  # type: ignore[attr-defined]
    return values


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= (MAX_FLOATS if tensor.is_floating_point() else MAX_NUMEL)


def compute_values(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    """Compute the values of the small results of an operation, if all its inputs are small."""
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func._overloadpacket in UNINITIALIZED or not any(map(_is_small, results)) or not all(map(_is_small, inputs)):
        return
    with _disable_current_modes(), torch.no_grad():
        args, kwargs = tree_map_only(Tensor, values_of, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            computed = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            return
    for tensor, values in zip(results, tree_leaves(computed), strict=True):
        tensor.small_values = values  # type: ignore[attr-defined]


def read_value(tensor: Tensor) -> Any:
    """Return the value of a tensor with one element."""
    with _disable_current_modes():
        values = values_of(tensor)
        assert values is not None
        return values.item()


class TensorsFromHost(TorchFunctionMode):
    """Lets ``torch.tensor`` create tensors of a device on the host first, where they have values."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu").type != self.device:
            return func(*args, **kwargs)
        del kwargs["device"]
        return func(*args, **kwargs).to(self.device)
