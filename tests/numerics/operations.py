"""A record of the PyTorch operations of a test, and of the memory that they allocate."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Records the names of operations, and the bytes of the largest storage that an operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    @property
    def host_reads(self) -> set[str]:
        """Names of the operations that make the host wait for a value."""
        return {name for name in self.names if "item" in name or "_local_scalar_dense" in name or "nonzero" in name}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *(kwargs or {}).values()])}
        result = function(*args, **(kwargs or {}))
        self.names.add(function.name())
        for tensor in _tensors([result]):
            if tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    nested = [_tensors(value) if isinstance(value, list | tuple) else [value] for value in values]
    return [value for inner in nested for value in inner if isinstance(value, Tensor)]
