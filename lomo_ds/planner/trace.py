"""Traces one training step on the meta device, where operations have shapes but no data and no memory.

The model runs forward and backward once while every storage, except those of parameters, is followed from its creation
to its end. The resulting ``StepTrace`` does not depend on ranks: it says how many bytes of activations are alive
between two events. An event is: a module needs its parameters, a module has finished with them, or the gradient of a
parameter has been computed.

If a model has many identical decoder layers, only a few of them are run; see ``extrapolate_layers``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import ModuleList
from transformers import PretrainedConfig, PreTrainedModel

from lomo_ds import zero3
from lomo_ds.errors import ModelError, one_line
from lomo_ds.models import can_tile_logits, meta_model, tile_logits
from lomo_ds.models.layered import layered_modules
from lomo_ds.numerics.precision import DTYPES
from lomo_ds.planner.extrapolate_layers import TRACED_LAYERS, extrapolate_layers
from lomo_ds.planner.layered_trace import joined_micro_batches
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.trace_events import EventKind, StepTrace
from lomo_ds.planner.trace_recorder import TraceRecorder, record_modules, replaced_functions
from lomo_ds.zero3.gathering import layers


def trace_step(
    config: PretrainedConfig, settings: Settings, trust_remote_code: bool = False, every_layer: bool = False
) -> StepTrace:
    """Trace a forward and backward pass of ``settings``, whose ``accumulation`` is not auto.

    Args:
        every_layer: run every layer, even if they are identical.

    Raises:
        ModelError: the model cannot run without data, or its logits cannot be tiled.
    """
    model = _build_model(config, settings, trust_remote_code)
    full = _trace_without_events(model)
    if not every_layer:
        _remove_repeated_layers(model)
    trace = _run(model, config.get_text_config().vocab_size, settings)
    if len(trace.layers) == len(full.layers):
        return trace
    return extrapolate_layers(trace, full) or trace_step(config, settings, trust_remote_code, every_layer=True)


def _build_model(config: PretrainedConfig, settings: Settings, trust_remote_code: bool) -> PreTrainedModel:
    model = meta_model(config, settings.dtype, trust_remote_code).to("meta").train()
    tiled = settings.tiled_logits
    if tiled is None:
        tiled = not settings.is_baseline and can_tile_logits(model)
    if tiled or settings.joined > 1:
        tile_logits(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _remove_repeated_layers(model: PreTrainedModel) -> None:
    """Leave ``TRACED_LAYERS`` decoder layers if all layers have parameters of the same shapes."""
    shapes = [[parameter.shape for parameter in layer.parameters()] for layer in layers(model)]
    if len(shapes) <= TRACED_LAYERS or any(shape != shapes[0] for shape in shapes):
        return
    stacks = [module for module in model.modules() if isinstance(module, ModuleList) and len(module) == len(shapes)]
    if len(stacks) == 1:
        del stacks[0][TRACED_LAYERS:]


def _trace_without_events(model: PreTrainedModel) -> StepTrace:
    """Return a trace that holds the model's structure and no events."""
    parameters = dict(model.named_parameters())
    indices = {id(parameter): index for index, parameter in enumerate(parameters.values())}
    trace = StepTrace(list(parameters), [parameter.shape for parameter in parameters.values()])
    trace.buffers = sum(buffer.nbytes for buffer in model.buffers())
    trace.tiled = "forward" in vars(model)
    layer_ids = {id(layer) for layer in layers(model)}
    layer_of_name: dict[str, int] = {}  # index of the decoder layer, by the names of it and of its submodules
    for index, (name, module) in enumerate(model.named_modules()):
        trace.module_names.append(name)
        trace.modules.append([indices[id(parameter)] for parameter in module.parameters(recurse=False)])
        layer = layer_of_name.get(name.rpartition(".")[0])
        if id(module) in layer_ids:
            trace.layers.add(index)
            layer_of_name[name] = index
        elif layer is not None:
            trace.layer_of_module[index] = layer_of_name[name] = layer
    return trace


def _run(model: PreTrainedModel, vocabulary: int, settings: Settings) -> StepTrace:
    trace = _trace_without_events(model)
    kept = {id(module) for module in layered_modules(model)} if settings.joined > 1 else set()
    keepers = trace.layers | {index for index, module in enumerate(model.modules()) if id(module) in kept}
    reduced = DTYPES[settings.communication_data_type] if settings.communication_data_type else None
    recorder = TraceRecorder(trace, vocabulary, settings.masked, keepers, reduced)
    record_modules(model, recorder)
    try:
        with joined_micro_batches(model, settings, recorder), replaced_functions(_linear(settings), recorder), recorder:
            _step(model, settings, recorder)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be planned for, because it does not run without data: {one_line(error)}; "
            "train a few steps and look at the peak instead"
        ) from error
    return trace


def _linear(settings: Settings) -> Callable[..., Tensor]:
    """Return the function that linear layers call."""
    if settings.resident:
        return torch.nn.functional.linear
    return zero3.linear if not settings.is_baseline else zero3.deepspeed_linear


def _step(model: PreTrainedModel, settings: Settings, recorder: TraceRecorder) -> None:
    ids = torch.zeros(settings.batch * settings.joined, settings.sequence, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "labels": torch.zeros_like(ids)}
    if settings.masked:
        inputs["position_ids"] = torch.zeros_like(ids)
    loss = model(**inputs, use_cache=False).loss
    recorder.record(EventKind.LOSS)
    (loss * 1.0).backward()
    recorder.record(EventKind.END)
