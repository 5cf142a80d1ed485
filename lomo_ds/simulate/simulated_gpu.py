"""The simulated GPU as torch and DeepSpeed see it: a module like ``torch.cuda``, and an accelerator.

Its tensors are fake tensors of the meta device: they have shapes, and autograd runs on them, but they have no data.
"""

from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from lomo_ds.simulate.streams import SimulatedEvent, SimulatedStream, Streams

DEVICE = "meta"


class DeviceModule:
    """The module that ``torch.get_device_module`` returns for the simulated GPU."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def Stream(self, device: Any = None, priority: int = 0) -> SimulatedStream:
        """Return a new stream."""
        return SimulatedStream(self.streams, f"stream {len(self.streams.all)}")

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> SimulatedEvent:
        """Return a new event."""
        return SimulatedEvent(self.streams)

    def stream(self, stream: SimulatedStream | None) -> Any:
        """Return a context in which ``stream`` is the current one."""
        return self.streams.use(stream)

    def current_stream(self, device: Any = None) -> SimulatedStream:
        """Return the current stream."""
        return self.streams.current

    def synchronize(self, device: Any = None) -> None:
        """Let the host wait for the GPU."""
        self.streams.synchronize()

    def is_available(self) -> bool:
        """Return False to ``torch.utils.checkpoint``, which would save random states, of which there are none."""
        return False

    def current_device(self) -> int:
        """Return the number of the only device."""
        return 0


class SimulatedAccelerator(CPU_Accelerator):
    """DeepSpeed's interface to the simulated GPU."""

    def __init__(self, streams: Streams, free_bytes: int) -> None:
        super().__init__()
        self._name = DEVICE
        self._communication_backend_name = "fake"
        self.streams = streams
        self.module = DeviceModule(streams)
        self.free_bytes = free_bytes

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return DEVICE

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return DEVICE

    def set_device(self, device_index: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def available_memory(self, device_index: int | None = None) -> int:
        return self.free_bytes

    def synchronize(self, device_index: int | None = None) -> None:
        self.streams.synchronize()

    @property
    def Stream(self) -> Any:
        return self.module.Stream

    @property
    def Event(self) -> Any:
        return self.module.Event

    def stream(self, stream: SimulatedStream) -> Any:
        return self.streams.use(stream)

    def current_stream(self, device_index: int | None = None) -> SimulatedStream:
        return self.streams.current

    def default_stream(self, device_index: int | None = None) -> SimulatedStream:
        return self.streams.compute

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def is_fp16_supported(self) -> bool:
        return True

    def pin_memory(self, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()


def install_device(free_bytes: int) -> Streams:
    """Make the simulated GPU a device of torch and the accelerator of DeepSpeed, for the rest of the process.

    Args:
        free_bytes: memory of the GPU.
    """
    streams = Streams()
    accelerator = SimulatedAccelerator(streams, free_bytes)
    torch._register_device_module(DEVICE, accelerator.module)
    set_accelerator(accelerator)
    vars_of_tensor: Any = Tensor
    vars_of_tensor.record_stream = lambda tensor, stream: None
    return streams
