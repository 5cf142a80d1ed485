"""Measures the memory of a step, and splits it into parameters, gradients, optimizer state and activations.

``TensorTracker`` tracks every tensor's storage from its creation to its end, on any device. Tracking slows a step down,
so a step is either timed or tracked. The kinds:

- parameters: this rank's shards, and full parameters while they are gathered
- gradients: every gradient of autograd, full, reduced or stashed, and buffers for gradients
- optimizer state: all tensors that the optimizer keeps between steps, master weights included
- activations: all other tensors: those that forward saves for backward, and temporaries of operations
"""

import contextlib
import gc
import resource
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.lib.methods import Method

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "parameters", "gradients", "optimizer state", "activations"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS)
RECLASSIFY_RATIO = 1.002  # tensors are classified again when the peak has grown by this factor

Key = int  # identifies a storage while it is alive


class TensorTracker(TorchDispatchMode):
    """Tracks the tensors of one device during the steps of ``method`` that run while the mode is active.

    Attributes:
        total: bytes alive now.
        peak: most bytes that were alive at once.
        most_gradients: most bytes of gradients that were alive at once.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        super().__init__()
        self.method = method
        self.device = device.type
        self.total = self.peak = self.most_gradients = 0
        self._gradient_bytes = 0
        self._created = 0
        self._live: dict[Key, tuple[int, int]] = {}  # unique number of the storage, and its bytes
        self._finalizers: dict[Key, weakref.ref[Any]] = {}
        self._kind: dict[int, str] = {}  # kind by number, if known
        self._classified_total = 0.0
        self._at_peak: dict[int, int] = {}  # bytes by number, when last classified
        self._handles: list[Any] = []

    def __enter__(self) -> "TensorTracker":
        gc.collect()
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                self._add(item)
        for parameter in self.method.model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._mark_gradient))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._finalizers.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((result, args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._add(tensor)
        if func.namespace == "c10d" and "reduce_scatter" in func._opname:
            for tensor in tensors:
                self._mark(tensor, GRADIENTS)
        if func.namespace == "c10d" and "allgather" in func._opname:
            for tensor in tensors:
                self._mark(tensor, PARAMETERS)
        return result

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes of each kind at the peak; bytes of unknown kind are activations."""
        sizes = Counter(dict.fromkeys(KINDS, 0))
        for number, size in self._at_peak.items():
            sizes[self._kind.get(number, ACTIVATIONS)] += size
        sizes[ACTIVATIONS] += self.peak - sum(sizes.values())
        return dict(sizes)

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        number, size = self._created, storage.nbytes()
        self._created += 1
        self._live[key] = number, size
        self._finalizers[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            if self.total > self._classified_total * RECLASSIFY_RATIO:
                self._classify()

    def _forget(self, key: Key) -> None:
        del self._finalizers[key]
        number, size = self._live.pop(key)
        self.total -= size
        if self._kind.get(number) == GRADIENTS:
            self._gradient_bytes -= size

    def _classify(self) -> None:
        """Record what is alive now and its kinds; the kind of a storage may also become known later."""
        self._classified_total = self.total
        for tensor in self.method.parameters():
            self._mark(tensor, PARAMETERS)
        for tensor in self.method.gradients():
            self._mark(tensor, GRADIENTS)
        for parameter in self.method.model.parameters():
            self._mark(parameter.grad, GRADIENTS)
        for tensor in self.method.optimizer_state():
            self._mark(tensor, OPTIMIZER)
        self._at_peak = dict(self._live.values())

    def _mark_gradient(self, gradient: Tensor) -> None:
        self._mark(gradient, GRADIENTS)

    def _mark(self, tensor: Any, kind: str) -> None:
        """Set the kind of a tensor, unless it is known."""
        if not isinstance(tensor, Tensor):
            return
        number, size = self._live.get(tensor.untyped_storage()._cdata, (-1, 0))
        if number < 0 or number in self._kind:
            return
        self._kind[number] = kind
        if kind == GRADIENTS:
            self._gradient_bytes += size
            self.most_gradients = max(self.most_gradients, self._gradient_bytes)


def resident_bytes() -> dict[str, int]:
    """Return the resident bytes of this process: ``now``, and the ``peak`` since ``reset_peak``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = int(fields["VmHWM"].split()[0]) if "VmHWM" in fields else ever  # missing in some containers
    return {"now": psutil.Process().memory_info().rss, "peak": 1024 * peak}


def reset_peak() -> None:
    """Reset the memory peaks of the host and of the device."""
    with contextlib.suppress(OSError):  # missing in some containers
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def limit_allocator(gib: float) -> None:
    """Limit torch's allocator to ``gib`` GiB of this process's GPU."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def measure(method: Method, steps: int = 3) -> dict[str, Any]:
    """Take ``steps`` steps and one that is tracked, and return their memory on this rank.

    DeepSpeed traces the model in the first three steps and prefetches from then on. The peak is that of all steps.

    Returns:
        The fields that ``take_steps`` and ``track_step`` return.
    """
    measured = take_steps(method, steps)
    return measured | track_step(method, measured)


def take_steps(method: Method, steps: int = 3) -> dict[str, Any]:
    """Take ``steps`` steps, and return their memory and time on this rank.

    Returns:
        ``peak``: peak bytes allocated on the GPU; ``reserved``: peak bytes that the allocator has reserved; both None
        on the CPU. ``resident``: peak resident bytes of this process. ``losses``: the loss of each step.
        ``seconds``: the time of the last step.
    """
    reset_peak()
    losses = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(method.step()))  # float() waits for the device
        seconds = time.perf_counter() - start
    measured: dict[str, Any] = {"losses": losses, "resident": resident_bytes()["peak"], "seconds": seconds}
    if method.device.type != "cuda":
        return measured | {"peak": None, "reserved": None}
    return measured | {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def track_step(method: Method, measured: dict[str, Any]) -> dict[str, Any]:
    """Take a step in which every tensor is tracked, after the steps that gave ``measured``.

    Returns:
        ``peak``: that of ``measured``, or on the CPU that of the tensors; ``at_peak``: ``peak`` by kind;
        ``most_gradients``: most bytes of gradients alive at once; ``losses``: those of ``measured`` and of this step.
        If a step on a GPU cannot be tracked, ``at_peak`` and ``most_gradients`` are None, and
        ``not_followed`` says why.
    """
    on_gpu = method.device.type == "cuda"
    tensors = TensorTracker(method, method.device)
    try:
        with tensors:
            loss = float(method.step())
    except Exception as error:
        if not on_gpu:
            raise
        return {"at_peak": None, "most_gradients": None, "not_followed": repr(error)}
    at_peak, peak = tensors.at_peak, measured["peak"] if on_gpu else tensors.peak
    at_peak[ACTIVATIONS] += peak - tensors.peak  # rounding of the allocator, and temporaries inside kernels
    losses = [*measured["losses"], loss]
    return {"peak": peak, "at_peak": at_peak, "most_gradients": tensors.most_gradients, "losses": losses}
