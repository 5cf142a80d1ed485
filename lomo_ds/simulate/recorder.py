"""Records what every tensor operation asks of the machine."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_ds.simulate.costs import COPIES, copy_work, kernel_of
from lomo_ds.simulate.program import Work
from lomo_ds.simulate.simulated_gpu import DEVICE
from lomo_ds.simulate.small_values import compute_values, read_value
from lomo_ds.simulate.streams import Streams

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Adds an operation to the current stream for each kernel, and for each copy between host and GPU.

    The host waits for copies that are not ``non_blocking`` or whose host memory is not pinned, and for values.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams
        self.pinned: set[int] = set()  # storages in pinned memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func._overloadpacket
        if packet is torch.ops.prim.device:
            return func(*args)
        if packet is aten._local_scalar_dense:
            self._wait_for_value(args[0])
            return read_value(args[0])
        if packet is aten.is_pinned:
            return args[0].untyped_storage()._cdata in self.pinned
        is_pinned = kwargs.pop("pin_memory", None) or packet is aten._pin_memory
        result = torch.empty_like(args[0]) if packet is aten._pin_memory else func(*args, **kwargs)
        if is_pinned:
            self.pinned.add(result.untyped_storage()._cdata)
        compute_values(func, args, kwargs, result)
        if packet in COPIES:
            source = args[1] if packet is aten.copy_ else args[0]
            self._copy(source, result, bool(kwargs.get("non_blocking") or args[2:3] == (True,)))
        else:
            work = kernel_of(func, args, kwargs, result, DEVICE)
            if work is not None:
                self.streams.current.add(packet.__name__, work)
        return result

    def _copy(self, source: Tensor, result: Tensor, non_blocking: bool) -> None:
        stream = self.streams.current
        to_gpu, from_gpu = result.device.type == DEVICE, source.device.type == DEVICE
        if to_gpu and from_gpu:
            stream.add("copy", copy_work(source, result))
        elif to_gpu or from_gpu:
            if to_gpu:
                host_tensor = source
                stream.add("copy up", Work(up=source.nbytes))
            else:
                host_tensor = result
                stream.add("copy down", Work(down=result.nbytes))
            if not (non_blocking and host_tensor.untyped_storage()._cdata in self.pinned):
                stream.synchronize()

    def _wait_for_value(self, tensor: Tensor) -> None:
        if tensor.device.type == DEVICE:
            self.streams.current.add("read", Work(down=tensor.nbytes))
            self.streams.current.synchronize()
