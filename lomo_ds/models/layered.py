"""Layered accumulation: all micro-batches of a step run through one layer before the next layer begins.

In backward likewise, so that a layer's parameters are gathered once for all micro-batches, and its gradient is complete
when backward leaves it (arXiv 2106.02679, 2211.05953). The rows of all micro-batches pass through the model as one
batch. Each layer runs one micro-batch after the other. It keeps its inputs only, and recomputes the rest in backward.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lomo_ds.errors import ModelError
from lomo_ds.models.activation_offload import ActivationOffload
from lomo_ds.models.attention import document_boundaries
from lomo_ds.models.replaced_forward import replaced_forward
from lomo_ds.models.tiled_logits import is_tiled, reason_not_tileable, tiled_logits
from lomo_ds.zero3.gathering import layer_of, layers

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")  # whose masks can be divided by rows
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class MicroBatch:
    """The place of a micro-batch in the batch of all rows of a step, which is padded to the longest row.

    Attributes:
        start, stop: its rows.
        length: tokens of each of its rows.
    """

    start: int
    stop: int
    length: int

    def of(self, values: Tensor) -> Tensor:
        """Return a view of its part of ``values``: (rows of the step or 1, length of the step, ...)."""
        return self._rows_of(values)[:, : self.length]

    def of_argument(self, value: Any, rows: int) -> Any:
        """Return its part of an argument of a layer: a mask, position_ids, or the cosines and sines of positions.

        Args:
            rows: rows of the step.

        Raises:
            ModelError: the argument is of an unknown kind.
        """
        if isinstance(value, tuple):
            return tuple(self.of_argument(item, rows) for item in value)
        if isinstance(value, list | dict) or (isinstance(value, Tensor) and not _is_divisible(value, rows)):
            raise ModelError(
                f"layered accumulation cannot divide an argument of a layer, a {type(value).__name__}, into the rows "
                "of micro-batches; use accumulation stash"
            )
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 4:  # a mask of (rows or 1, heads or 1, queries, keys); kernels need aligned rows
            return self._rows_of(value)[..., : self.length, : self.length].contiguous()
        return self.of(value)

    def _rows_of(self, values: Tensor) -> Tensor:
        return values if values.shape[0] == 1 else values[self.start : self.stop]


def _is_divisible(value: Tensor, rows: int) -> bool:
    return value.dim() in (2, 3, 4) and value.shape[0] in (1, rows) and not value.requires_grad


def reason_not_layered(model: Module) -> str | None:
    """Return the reason why the layers of ``model`` cannot run micro-batches one after the other; None if they can."""
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a model of transformers"
    reason = None if is_tiled(model) else reason_not_tileable(model)
    if reason is not None:
        return f"{type(model).__name__} does not compute its loss like LlamaForCausalLM: it is a model {reason}"
    if model.config._attn_implementation not in ATTENTION:
        return f"the masks of attention {model.config._attn_implementation} cannot be divided by rows"
    if rope_type := LENGTH_DEPENDENT_ROPE & _rope_types(model.config):
        return f"rotary embeddings of type {min(rope_type)} depend on the longest row of the batch"
    decoder = layers(model)
    for layer in decoder:
        first = next(iter(inspect.signature(layer.forward).parameters), None)
        if not isinstance(layer, GradientCheckpointingLayer) or first != "hidden_states":
            return f"its layer {type(layer).__name__} is no GradientCheckpointingLayer that takes hidden_states first"
    if not decoder:
        return "it has no numbered layers"
    return "its layers share parameters" if _layers_share_parameters(model) else None


def _rope_types(config: PretrainedConfig) -> set[str]:
    """Return the types of rotary embeddings; some configurations have one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sections = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {section["rope_type"] for section in sections if "rope_type" in section}


def _layers_share_parameters(model: PreTrainedModel) -> bool:
    """Return whether a parameter is in several layers, or in a layer and outside: its gradient comes in parts."""
    owners = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter].add(layer_of(name))
    return any(len(of_parameter) > 1 for of_parameter in owners.values())


@contextmanager
def layered(
    model: PreTrainedModel,
    micro_batches: Sequence[MicroBatch],
    summed: Callable[[int], AbstractContextManager[None]],
) -> Iterator[None]:
    """Let a batch of all rows of a step pass through ``model`` by layered accumulation, forward and backward.

    The loss is computed in tiles, see ``tile_logits``.

    Args:
        micro_batches: where the rows of the step belong.
        summed: returns a context for the given number of micro-batches, in which backward runs through one layer for
            each of them; at its end the sum of each parameter's gradients is complete.
    """
    with ExitStack() as stack:
        stack.enter_context(tiled_logits(model))
        modules = layered_modules(model)
        step = _Step(micro_batches, summed, _activation_offload(modules))
        if step.offload is not None:
            tokens = max((place.stop - place.start) * place.length for place in micro_batches)
            input_bytes = tokens * model.config.hidden_size * model.dtype.itemsize
            step.offload.expect(len(modules) * len(micro_batches), input_bytes)
        for module in modules:
            stack.enter_context(_running_micro_batches(_LayeredModule(module, step)))
        yield


def layered_modules(model: PreTrainedModel) -> list[Module]:
    """Return the modules that run one micro-batch after the other, in their order.

    Beside the layers it is the norm after them, whose activations are several times as large as a layer's input.
    """
    norm = getattr(model.base_model, "norm", None)
    return [*layers(model), *([norm] if isinstance(norm, Module) else [])]


def _activation_offload(modules: list[Module]) -> ActivationOffload | None:
    """Return the offload that ``recompute_activations`` has installed, if any."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in modules)
    return next((function for function in functions if isinstance(function, ActivationOffload)), None)


class _Step:
    """Settings and caches that all modules of a step share.

    Args:
        micro_batches, summed: see ``layered``.
        offload: moves the inputs of modules to host memory until backward needs them.
    """

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        summed: Callable[[int], AbstractContextManager[None]],
        offload: ActivationOffload | None,
    ) -> None:
        self.micro_batches = micro_batches
        self.summed = summed
        self.offload = offload
        self.is_padded = len({micro_batch.length for micro_batch in micro_batches}) > 1
        self.boundaries: dict[MicroBatch, dict[str, Any]] = {}

    def empty_like(self, hidden_states: Tensor) -> Tensor:
        """Return a tensor for the results of all micro-batches; padding is 0, so that it never contributes."""
        return torch.zeros_like(hidden_states) if self.is_padded else torch.empty_like(hidden_states)

    def inputs_of(self, micro_batch: MicroBatch, inputs: dict[str, Any], rows: int) -> dict[str, Any]:
        """Return a micro-batch's part of the named arguments of a module, see ``MicroBatch.of_argument``."""
        own = {name: micro_batch.of_argument(value, rows) for name, value in inputs.items() if name not in _BOUNDARIES}
        if inputs.get("cu_seq_lens_q") is None:
            return own
        if micro_batch not in self.boundaries:  # once in a step, since it waits for the device
            positions = own["position_ids"].expand(micro_batch.stop - micro_batch.start, -1)
            self.boundaries[micro_batch] = document_boundaries(positions)
        return own | self.boundaries[micro_batch]


# arguments of flash attention, which hold for all rows of a step together
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class _LayeredModule:
    """The forward of a module that runs the micro-batches of a step one after the other.

    Args:
        module: a module whose first argument is (rows, length, hidden size), and which returns the same shape.
    """

    def __init__(self, module: Module, step: _Step) -> None:
        self.module = module
        self.forward = module.forward
        self.step = step

    def __call__(self, hidden_states: Tensor, *arguments: Any, **inputs: Any) -> Tensor:
        """Run the module on all rows of the step."""
        call = _Call(self, hidden_states.shape[0], arguments, inputs)
        is_trained = any(parameter.requires_grad for parameter in self.module.parameters())
        if not torch.is_grad_enabled() or not (hidden_states.requires_grad or is_trained):
            return call.forward(hidden_states, keep=lambda part: None)
        # without an input that requires a gradient, no backward would reach the parameters of the first layer
        is_anchored = hidden_states.requires_grad
        anchor = None if is_anchored else torch.zeros((), device=hidden_states.device, requires_grad=True)
        output: Tensor = _InMicroBatches.apply(hidden_states, anchor, call)
        return output


class _Call:
    """One call of a ``_LayeredModule`` for so many rows, with the arguments beside the hidden states."""

    def __init__(self, layer: _LayeredModule, rows: int, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        assert inputs.get("cache") is inputs.get("past_key_values") is None, "micro-batches share no cache"
        self.layer, self.step, self.rows = layer, layer.step, rows
        self.arguments, self.inputs = arguments, inputs

    def forward(self, hidden_states: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        """Run every micro-batch; ``keep`` is called with the input of each before it runs."""
        output = self.step.empty_like(hidden_states)
        for micro_batch in self.step.micro_batches:
            part = micro_batch.of(hidden_states)
            keep(part)
            micro_batch.of(output).copy_(self.run(part, micro_batch))
        return output

    def run(self, part: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Run one micro-batch."""
        arguments = [micro_batch.of_argument(value, self.rows) for value in self.arguments]
        inputs = self.step.inputs_of(micro_batch, self.inputs, self.rows)
        output = self.layer.forward(part, *arguments, **inputs)
        if not isinstance(output, Tensor) or (output.shape, output.dtype) != (part.shape, part.dtype):
            raise ModelError(
                f"layered accumulation needs layers that return hidden states like those they get, and "
                f"{type(self.layer.module).__name__} does not; use accumulation stash"
            )
        return output


class _InMicroBatches(torch.autograd.Function):
    """Runs a layer on each micro-batch, keeping only its input, and again in backward, in the opposite order."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, anchor: Tensor | None, call: _Call) -> Tensor:
        ctx.call, ctx.random_states, ctx.offloaded = call, [], []
        offload = call.step.offload

        def keep(part: Tensor) -> None:
            ctx.random_states.append(_RandomStates(part))
            if offload is not None:
                ctx.offloaded.append(offload.pack(part))

        if offload is None:
            ctx.save_for_backward(hidden_states)
        return call.forward(hidden_states, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        call: _Call = ctx.call
        step, needs_gradient = call.step, ctx.needs_input_grad[0]
        input_gradient = step.empty_like(gradient) if needs_gradient else None
        later = _RandomStates(gradient)
        with step.summed(len(step.micro_batches)):
            for micro_batch in reversed(step.micro_batches):
                part = _kept_input(ctx, micro_batch).detach().requires_grad_(needs_gradient)
                ctx.random_states.pop().restore()  # so that dropout draws the same masks
                with torch.enable_grad():
                    output = call.run(part, micro_batch)
                torch.autograd.backward(output, micro_batch.of(gradient))
                if input_gradient is not None:
                    assert part.grad is not None
                    micro_batch.of(input_gradient).copy_(part.grad)
        later.restore()
        return input_gradient, None, None


def _kept_input(ctx: Any, micro_batch: MicroBatch) -> Tensor:
    """Return the input of the newest micro-batch whose backward is still to run."""
    offload = ctx.call.step.offload
    if offload is None:
        return micro_batch.of(ctx.saved_tensors[0])
    return offload.unpack(ctx.offloaded.pop())


class _RandomStates:
    """The states of torch's generators on the host and on the device of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.host = torch.get_rng_state()
        self.devices, self.of_devices = get_device_states(tensor)
        self.device_type = tensor.device.type

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.host)
        set_device_states(self.devices, self.of_devices, device_type=self.device_type)


@contextmanager
def _running_micro_batches(layer: _LayeredModule) -> Iterator[None]:
    """Let a module run micro-batches, and leave activation checkpointing to ``_InMicroBatches``."""
    module: Any = layer.module
    recomputes = getattr(module, "gradient_checkpointing", False)
    with replaced_forward(module, layer):
        if recomputes:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            if recomputes:
                module.gradient_checkpointing = True
