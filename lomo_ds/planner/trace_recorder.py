"""Records a ``StepTrace`` while a model runs on the meta device: its storages, its modules and its gradients."""

import contextlib
import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from lomo_ds.planner.trace_events import EventKind, LiveActivations, StepTrace, TraceEvent
from lomo_ds.simulate.costs import kernel_of, touched_bytes
from lomo_ds.simulate.fused_attention import fused_attention
from lomo_ds.simulate.program import Work
from lomo_ds.update.hooks import sum_dtype
from lomo_ds.zero3.gathering import layer_of

CHECKPOINT = "inputs of the decoder layers"  # name of activation checkpoints
SUMS = "gradients of a layer, added up"  # name of gradients that layered accumulation adds up


class TraceRecorder(TorchDispatchMode):
    """Follows every storage that is created while the mode is active, and records events.

    Args:
        trace: where events are recorded.
        vocabulary: size of the last dimension of logits.
        masked: whether the model is to find several documents in a row, and to make a mask.
        keepers: indices of the modules that can keep their input only.
        reduced_dtype: the dtype that gradients are converted to for their reduction; None for none.
    """

    def __init__(
        self,
        trace: StepTrace,
        vocabulary: int,
        masked: bool = False,
        keepers: Collection[int] = (),
        reduced_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.trace = trace
        self.vocabulary = vocabulary
        self.masked = masked
        self.keepers = keepers
        self.reduced_dtype = reduced_dtype
        self.counted = 1  # number of times that kernels count now
        self.kernels: Counter[Work] = Counter()  # how often each has run since the last event
        self.sums: dict[int, Tensor] | None = None  # by parameter: gradients that are being added up, see ``summed``
        self.summands = 1
        self.missing: defaultdict[int, int] = defaultdict(int)  # gradients that ``sums`` wait for, by parameter
        self.level = self.peak = self.logits = self.logits_at_peak = 0
        # by storage: its bytes (0 for parameters and buffers), and whether its last dimension is the vocabulary
        self.live: dict[int, tuple[int, bool, weakref.ref[Any] | None]] = {}
        self.names: dict[int, str] = {}  # by storage in ``live``: where it was created
        self.live_at_peak: LiveActivations | None = None  # None: the peak is now
        self.running: list[str] = []  # names of modules, each nested in the one before

    def exclude(self, tensor: Tensor) -> None:
        """Do not count a tensor, because it is not an activation."""
        self.live[tensor.untyped_storage()._cdata] = (0, False, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return not self.masked  # transformers tests whether the mask is trivial
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._add(tensor, func)
        work = kernel_of(func, args, kwargs or {}, result, "meta")
        if work is not None:
            self.count(work)
        return result

    def count(self, work: Work) -> None:
        """Count a kernel that runs now."""
        self.kernels[work] += self.counted

    def name(self, tensor: Tensor, name: str) -> None:
        """Name a tensor after what it is, rather than after the operation that made it."""
        self.names[tensor.untyped_storage()._cdata] = name

    @contextlib.contextmanager
    def summed(self, count: int, traced: int) -> Iterator[None]:
        """Add up gradients like ``BackwardHooks.summed``.

        Args:
            traced: how many of the ``count`` micro-batches run.
        """
        self.sums, self.summands = {}, count
        self.missing = defaultdict(lambda: traced)
        yield
        sums, self.sums, self.counted = self.sums, None, 1
        for index in list(sums):
            del sums[index]
            self.record(EventKind.GRADIENT, index)

    def receive_gradient(self, index: int, parameter: Tensor) -> None:
        """Take the gradient of a parameter from autograd."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self.sums is None:
            del gradient
            self.record(EventKind.GRADIENT, index)
            return
        if index in self.sums:
            self.sums[index] += gradient
        else:
            self.sums[index] = gradient.to(sum_dtype(gradient.dtype, self.summands, self.reduced_dtype))
            self.name(self.sums[index], SUMS)
        del gradient
        self.missing[index] -= 1
        if not self.missing[index]:
            del self.sums[index]
            self.record(EventKind.GRADIENT, index)

    def record(self, kind: EventKind, index: int = -1) -> None:
        """Append an event that happens now."""
        live = self._live_now()
        at_peak = self.live_at_peak or live
        self.trace.events.append(
            TraceEvent(
                kind, index, self.peak, self.level, self.logits_at_peak, self.logits, self.kernels, at_peak, live
            )
        )
        self.peak, self.logits_at_peak, self.live_at_peak = self.level, self.logits, None
        self.kernels = Counter()
        if index >= 0 and kind is not EventKind.GRADIENT:
            self._enter_or_leave(kind, self.trace.module_names[index])

    def _enter_or_leave(self, kind: EventKind, name: str) -> None:
        """Update the running modules. A module that was recomputed may have ended without an event."""
        while self.running and name != self.running[-1] and not _is_inside(name, self.running[-1]):
            self.running.pop()
        if kind in (EventKind.FETCH_FORWARD, EventKind.FETCH_BACKWARD):
            self.running.append(name)
        elif self.running and self.running[-1] == name:
            self.running.pop()

    def _live_now(self) -> LiveActivations:
        sizes: Counter[str] = Counter()
        for key, (size, _, _) in self.live.items():
            if size:
                sizes[self.names[key]] += size
        return LiveActivations(sizes)

    def _name(self, tensor: Tensor, func: Any) -> str:
        """Return the module, the operation and the shape that made a tensor; the same for every decoder layer."""
        module = self.running[-1] if self.running else ""
        layer = layer_of(module + ".")
        location = module if layer is None else "layer" + module[len(layer) :]
        operation = str(getattr(func, "overloadpacket", func)).rpartition(".")[2].strip("_")
        shape = " x ".join(map(str, tensor.shape))
        return f"{location or 'model'}: {operation}, {str(tensor.dtype).removeprefix('torch.')} {shape}"

    def _add(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = storage.nbytes()
        wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()
        self.live[key] = (size, wide, weakref.ref(storage, functools.partial(self._forget, key)))
        self.names[key] = self._name(tensor, func)
        self.level += size
        self.logits += size * wide
        if self.level >= self.peak:
            self.peak, self.logits_at_peak, self.live_at_peak = self.level, self.logits, None

    def _forget(self, key: int, _: Any) -> None:
        if self.live_at_peak is None:  # this deletion ends the peak
            self.live_at_peak = self._live_now()
        size, wide, _reference = self.live.pop(key)
        self.level -= size
        self.logits -= size * wide


def _is_inside(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


def record_modules(model: PreTrainedModel, recorder: TraceRecorder) -> None:
    """Record the start and end of each module, as DeepSpeed's hooks see them, and each gradient."""
    for index, module in enumerate(model.modules()):
        _hook(module, index, recorder)
    for index, parameter in enumerate(model.parameters()):
        recorder.exclude(parameter)
        parameter.register_post_accumulate_grad_hook(functools.partial(recorder.receive_gradient, index))
    for buffer in model.buffers():
        recorder.exclude(buffer)


def _hook(module: Module, index: int, recorder: TraceRecorder) -> None:
    pending = [0]  # inputs of the last forward whose gradients have not been computed yet

    def begin(module: Module, arguments: Any, keywords: dict[str, Any]) -> Any:
        if index in recorder.keepers and index not in recorder.trace.checkpoints:
            inputs = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
            recorder.trace.checkpoints[index] = sum(tensor.nbytes for tensor in inputs)
            for tensor in inputs:
                recorder.name(tensor, CHECKPOINT)
        recorder.record(EventKind.FETCH_FORWARD, index)
        pending[0] = 0
        return tree_map_only(Tensor, lambda tensor: _Leave.apply(tensor, recorder, index, pending), arguments), keywords

    def end(module: Module, arguments: Any, output: Any) -> Any:
        recorder.record(EventKind.FREE_FORWARD, index)
        if index in recorder.keepers:
            recorder.counted = 1
        return tree_map_only(Tensor, lambda tensor: _Enter.apply(tensor, recorder, index), output)

    module.register_forward_pre_hook(begin, with_kwargs=True)
    module.register_forward_hook(end)


class _Enter(torch.autograd.Function):
    """Identity on a module's output; its backward marks the start of the module's backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, recorder: TraceRecorder, index: int) -> Tensor:
        ctx.saved = recorder, index
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        recorder, index = ctx.saved
        recorder.record(EventKind.FETCH_BACKWARD, index)
        return gradient, None, None


class _Leave(torch.autograd.Function):
    """Identity on a module's input; the module's backward ends when every input has its gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, recorder: TraceRecorder, index: int, pending: list[int]) -> Tensor:
        ctx.saved = recorder, index, pending
        pending[0] += input.requires_grad
        return input.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        recorder, index, pending = ctx.saved
        pending[0] -= 1
        if not pending[0]:
            recorder.record(EventKind.FREE_BACKWARD, index)
        return gradient, None, None, None


@contextlib.contextmanager
def replaced_functions(linear: Any, recorder: TraceRecorder) -> Iterator[None]:
    """Replace torch's linear function by ``linear``, and its attention by a fused one that the meta device lacks."""
    functional: Any = torch.nn.functional
    attention = fused_attention(
        lambda name, flops, tensors: recorder.count(Work(flops=flops, memory=sum(map(touched_bytes, tensors))))
    )
    originals = functional.linear, functional.scaled_dot_product_attention
    functional.linear, functional.scaled_dot_product_attention = linear, attention
    try:
        yield
    finally:
        functional.linear, functional.scaled_dot_product_attention = originals
