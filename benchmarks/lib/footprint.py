"""How much memory a step takes, and what lies in it.

``Tensors`` follows every tensor's storage from the operation that makes it to its end, on any device. It slows a step
down, so no step is both timed and followed. The kinds:

- parameters: this rank's shards, and whole parameters as long as they are gathered
- gradients: every gradient from autograd, whole, reduced or stashed, and buffers that are kept for them
- optimizer state: what the optimizer holds from step to step, weights of higher precision included
- activations: all the rest: what forward leaves for backward, and what operations need in passing
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
CLOSE = 1.002  # what lies in memory is looked at anew where a peak is higher by so much

Key = int  # of a storage, while it lives


class Tensors(TorchDispatchMode):
    """Follows the tensors of one device through the steps of ``method`` that are taken while it is entered.

    Attributes:
        total: bytes alive now.
        peak: the most bytes that were alive at once.
        most_gradients: the most bytes of gradients that were alive at once.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        super().__init__()
        self.method = method
        self.device = device.type
        self.total = self.peak = self.most_gradients = 0
        self._gradient_bytes = 0
        self._born = 0
        self._alive: dict[Key, tuple[int, int]] = {}  # number of the storage, which is never used again, and bytes
        self._watched: dict[Key, weakref.ref[Any]] = {}
        self._kind: dict[int, str] = {}  # of the storages whose kind is known, by number
        self._looked_at = 0.0
        self._at_peak: dict[int, int] = {}  # bytes by number, as of the last look
        self._handles: list[Any] = []

    def __enter__(self) -> "Tensors":
        gc.collect()
        for found in gc.get_objects():
            if issubclass(type(found), Tensor):
                self._add(found)
        for parameter in self.method.model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._see_gradient))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._watched.clear()

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
        """Bytes of each kind at the peak, activations being what is left of it."""
        found = Counter(dict.fromkeys(KINDS, 0))
        for number, size in self._at_peak.items():
            found[self._kind.get(number, ACTIVATIONS)] += size
        found[ACTIVATIONS] += self.peak - sum(found.values())
        return dict(found)

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or not storage.nbytes():
            return
        number, size = self._born, storage.nbytes()
        self._born += 1
        self._alive[key] = number, size
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            if self.total > self._looked_at * CLOSE:
                self._look()

    def _forget(self, key: Key) -> None:
        del self._watched[key]
        number, size = self._alive.pop(key)
        self.total -= size
        if self._kind.get(number) == GRADIENTS:
            self._gradient_bytes -= size

    def _look(self) -> None:
        """Find out what lies in memory now; what a storage is may also become known later."""
        self._looked_at = self.total
        for tensor in self.method.parameters():
            self._mark(tensor, PARAMETERS)
        for tensor in self.method.gradients():
            self._mark(tensor, GRADIENTS)
        for parameter in self.method.model.parameters():
            self._mark(parameter.grad, GRADIENTS)
        for tensor in self.method.optimizer_state():
            self._mark(tensor, OPTIMIZER)
        self._at_peak = dict(self._alive.values())

    def _see_gradient(self, gradient: Tensor) -> None:
        self._mark(gradient, GRADIENTS)

    def _mark(self, tensor: Any, kind: str) -> None:
        """Say what a tensor is, unless that is known."""
        if not isinstance(tensor, Tensor):
            return
        number, size = self._alive.get(tensor.untyped_storage()._cdata, (-1, 0))
        if number < 0 or number in self._kind:
            return
        self._kind[number] = kind
        if kind == GRADIENTS:
            self._gradient_bytes += size
            self.most_gradients = max(self.most_gradients, self._gradient_bytes)


def resident_bytes() -> dict[str, int]:
    """Bytes of this process in host memory: ``now``, and the ``peak`` since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = int(fields["VmHWM"].split()[0]) if "VmHWM" in fields else ever  # not every container's kernel has it
    return {"now": psutil.Process().memory_info().rss, "peak": 1024 * peak}


def forget_peak() -> None:
    """Begin the peaks anew, of the host and of the device."""
    with contextlib.suppress(OSError):  # not every container has it
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def limit_allocator(gib: float) -> None:
    """Let torch's allocator have no more of this process's GPU than ``gib`` GiB."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def measure(method: Method, steps: int = 3) -> dict[str, Any]:
    """Take ``steps`` and one more, which is followed, and say what memory they take on this rank.

    DeepSpeed traces what a model does in the first three, and fetches ahead only then; the peak is that of all of them.

    Returns:
        What ``take_steps`` and ``follow_step`` return.
    """
    found = take_steps(method, steps)
    return found | follow_step(method, found)


def take_steps(method: Method, steps: int = 3) -> dict[str, Any]:
    """Take ``steps``, and say what memory and time they take on this rank.

    Returns:
        ``peak``: of the allocator, None on the CPU; ``reserved``: what the allocator has taken from the GPU, likewise;
        ``resident``: peak of the host memory of this process; bytes. ``losses``: of each step; ``seconds``: of the
        last one.
    """
    forget_peak()
    losses = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(method.step()))  # which waits for the device
        seconds = time.perf_counter() - start
    found: dict[str, Any] = {"losses": losses, "resident": resident_bytes()["peak"], "seconds": seconds}
    if method.device.type != "cuda":
        return found | {"peak": None, "reserved": None}
    return found | {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def follow_step(method: Method, found: dict[str, Any]) -> dict[str, Any]:
    """Take a step in which every tensor is followed, after those of ``take_steps`` that gave ``found``.

    Returns:
        ``peak``: that of ``found``, and on the CPU that of the tensors; ``at_peak``: ``peak`` by kind;
        ``most_gradients``: the most gradients alive at once; bytes. ``losses``: with this step's. Where a step on a GPU
        cannot be followed, ``at_peak`` and ``most_gradients`` are None, and ``not_followed`` says why.
    """
    on_gpu = method.device.type == "cuda"
    tensors = Tensors(method, method.device)
    try:
        with tensors:
            loss = float(method.step())
    except Exception as error:
        if not on_gpu:
            raise
        return {"at_peak": None, "most_gradients": None, "not_followed": repr(error)}
    at_peak, peak = tensors.at_peak, found["peak"] if on_gpu else tensors.peak
    at_peak[ACTIVATIONS] += peak - tensors.peak  # what the allocator rounds up, and what kernels take in passing
    losses = [*found["losses"], loss]
    return {"peak": peak, "at_peak": at_peak, "most_gradients": tensors.most_gradients, "losses": losses}
