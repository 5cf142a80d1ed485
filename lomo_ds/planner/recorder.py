"""Follows a model's storages on the meta device through a step, and notes when modules begin and end."""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from lomo_ds.planner.moments import Alive, Event, Moment, Rehearsal
from lomo_ds.zero3.gathering import layer_of

CHECKPOINT = "inputs of the decoder layers"


class Recorder(TorchDispatchMode):
    """Follows storages while it is entered, and notes events among them."""

    def __init__(self, found: Rehearsal, vocabulary: int) -> None:
        super().__init__()
        self.found = found
        self.vocabulary = vocabulary
        self.flops = 0
        self.level = self.peak = self.logits = self.logits_at_peak = 0
        # by storage its bytes, and whether it is as wide as the vocabulary; none of a parameter
        self.alive: dict[int, tuple[int, bool, weakref.ref[Any] | None]] = {}
        self.names: dict[int, str] = {}  # of those in ``alive``, where they were made
        self.alive_at_peak: Alive | None = None  # None: what is alive now
        self.running: list[str] = []  # modules, each inside the one before

    def know(self, tensor: Tensor) -> None:
        """Leave out a tensor that is not an activation."""
        self.alive[tensor.untyped_storage()._cdata] = (0, False, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # transformers asks whether rows are one text each, and nothing is masked
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._add(tensor, func)
        self.flops += _flops(func, args)
        return result

    def know_checkpoint(self, tensor: Tensor) -> None:
        """Give the input of a decoder layer its name."""
        self.names[tensor.untyped_storage()._cdata] = CHECKPOINT

    def note(self, event: Event, index: int = -1) -> None:
        """Something happens now."""
        now = self._alive_now()
        at_peak = self.alive_at_peak or now
        self.found.moments.append(
            Moment(event, index, self.peak, self.level, self.logits_at_peak, self.logits, self.flops, at_peak, now)
        )
        self.peak, self.logits_at_peak, self.alive_at_peak = self.level, self.logits, None
        if index >= 0 and event is not Event.GRADIENT:
            self._enter_or_leave(event, self.found.module_names[index])

    def _enter_or_leave(self, event: Event, name: str) -> None:
        """Follow which modules are running; one that was recomputed may have been left without a sign."""
        while self.running and name != self.running[-1] and not _is_inside(name, self.running[-1]):
            self.running.pop()
        if event in (Event.FETCH_FORWARD, Event.FETCH_BACKWARD):
            self.running.append(name)
        elif self.running and self.running[-1] == name:
            self.running.pop()

    def _alive_now(self) -> Alive:
        sizes: Counter[str] = Counter()
        for key, (size, _, _) in self.alive.items():
            if size:
                sizes[self.names[key]] += size
        return Alive(sizes)

    def _name(self, tensor: Tensor, func: Any) -> str:
        """Where a tensor was made, alike for layers alike: the module, the operation, and the tensor's form."""
        module = self.running[-1] if self.running else ""
        layer = layer_of(module + ".")
        place = module if layer is None else "layer" + module[len(layer) :]
        operation = str(getattr(func, "overloadpacket", func)).rpartition(".")[2].strip("_")
        form = " x ".join(map(str, tensor.shape))
        return f"{place or 'model'}: {operation}, {str(tensor.dtype).removeprefix('torch.')} {form}"

    def _add(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()
        self.alive[key] = (size, wide, weakref.ref(storage, functools.partial(self._forget, key)))
        self.names[key] = self._name(tensor, func)
        self.level += size
        self.logits += size * wide
        if self.level >= self.peak:
            self.peak, self.logits_at_peak, self.alive_at_peak = self.level, self.logits, None

    def _forget(self, key: int, _: Any) -> None:
        if self.alive_at_peak is None:  # a peak ends here
            self.alive_at_peak = self._alive_now()
        size, wide, _reference = self.alive.pop(key)
        self.level -= size
        self.logits -= size * wide


def _is_inside(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


def _flops(func: Any, args: Any) -> int:
    """Of a matrix product; 0 of all else."""
    packet = getattr(func, "overloadpacket", None)
    if packet is torch.ops.aten.mm:
        return 2 * args[0].numel() * args[1].shape[1]
    if packet is torch.ops.aten.bmm:
        return 2 * args[0].numel() * args[1].shape[2]
    if packet is torch.ops.aten.addmm:
        return 2 * args[1].numel() * args[2].shape[1]
    return 0


def watch(model: PreTrainedModel, recorder: Recorder) -> None:
    """Note each module's beginnings and ends as DeepSpeed's hooks see them, and each gradient."""
    for index, module in enumerate(model.modules()):
        _hook(module, index, recorder)
    for index, parameter in enumerate(model.parameters()):
        recorder.know(parameter)
        parameter.register_post_accumulate_grad_hook(functools.partial(_drop, recorder, index))
    for buffer in model.buffers():
        recorder.know(buffer)


def _drop(recorder: Recorder, index: int, parameter: Tensor) -> None:
    parameter.grad = None
    recorder.note(Event.GRADIENT, index)


def _hook(module: Module, index: int, recorder: Recorder) -> None:
    waiting = [0]  # inputs of the last forward whose gradient is still to come

    def begin(module: Module, arguments: Any, keywords: dict[str, Any]) -> Any:
        if index in recorder.found.layers and index not in recorder.found.checkpoints:
            inputs = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
            recorder.found.checkpoints[index] = sum(tensor.nbytes for tensor in inputs)
            for tensor in inputs:
                recorder.know_checkpoint(tensor)
        recorder.note(Event.FETCH_FORWARD, index)
        waiting[0] = 0
        return tree_map_only(Tensor, lambda tensor: _Leave.apply(tensor, recorder, index, waiting), arguments), keywords

    def end(module: Module, arguments: Any, output: Any) -> Any:
        recorder.note(Event.FREE_FORWARD, index)
        return tree_map_only(Tensor, lambda tensor: _Enter.apply(tensor, recorder, index), output)

    module.register_forward_pre_hook(begin, with_kwargs=True)
    module.register_forward_hook(end)


class _Enter(torch.autograd.Function):
    """Behind a module: its backward begins when this one's comes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, recorder: Recorder, index: int) -> Tensor:
        ctx.place = recorder, index
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        recorder, index = ctx.place
        recorder.note(Event.FETCH_BACKWARD, index)
        return gradient, None, None


class _Leave(torch.autograd.Function):
    """Before a module: its backward has ended when every input's gradient has come by."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, recorder: Recorder, index: int, waiting: list[int]) -> Tensor:
        ctx.place = recorder, index, waiting
        waiting[0] += input.requires_grad
        return input.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        recorder, index, waiting = ctx.place
        waiting[0] -= 1
        if not waiting[0]:
            recorder.note(Event.FREE_BACKWARD, index)
        return gradient, None, None, None


class _Attention(torch.autograd.Function):
    """What a fused attention kernel leaves: its output and a number for each query, never queries x keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cost: int, recorder: Any
    ) -> Any:
        batch, heads, rows, _ = query.shape
        output = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)  # as kernels lay it out
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, log_sums)
        ctx.costs = recorder, cost
        recorder.flops += cost
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        recorder, cost = ctx.costs
        recorder.flops += 5 * cost // 2
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None


def _attention(recorder: Recorder) -> Any:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        cost = (
            2 * query.numel() * key.shape[-2] + 2 * query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]
        )
        return _Attention.apply(query, key, value, attn_mask, cost // 2 if is_causal else cost, recorder)

    return attend


@contextlib.contextmanager
def stand_ins(linear: Any, recorder: Recorder) -> Iterator[None]:
    """DeepSpeed's linear layer, where it gathers; and a fused attention, which the meta device has none of."""
    functional: Any = torch.nn.functional
    before = functional.linear, functional.scaled_dot_product_attention
    functional.linear, functional.scaled_dot_product_attention = linear, _attention(recorder)
    try:
        yield
    finally:
        functional.linear, functional.scaled_dot_product_attention = before
