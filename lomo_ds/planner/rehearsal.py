"""One step of a model without memory: which tensors live when, counted instead of reckoned.

The model is built on the meta device, where operations have shapes and no data, and runs forward and backward once.
Every storage is followed from the operation that makes it to its end, parameters left out. What comes of it, a
``Rehearsal``, knows nothing of ranks: how many bytes activations take between two events, an event being that a module
wants its parameters, has done with them, or that a parameter's gradient is there.

Of many layers alike a few are run, see ``stretch``.
"""

from collections.abc import Callable

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import ModuleList
from transformers import PretrainedConfig, PreTrainedModel

from lomo_ds import zero3
from lomo_ds.errors import ModelError, one_line
from lomo_ds.models import can_tile_logits, meta_model, tile_logits
from lomo_ds.planner.moments import Event, Rehearsal
from lomo_ds.planner.recorder import Recorder, stand_ins, watch
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.stretch import FEWEST, stretch
from lomo_ds.zero3.gathering import layers


def rehearse(
    config: PretrainedConfig, settings: Settings, trust_remote_code: bool = False, every_layer: bool = False
) -> Rehearsal:
    """What a micro-batch of ``settings`` leaves in memory while it is computed.

    Args:
        every_layer: whether every layer is run, however many are alike.

    Raises:
        ModelError: the model cannot run without data, or its logits cannot be tiled.
    """
    model = _model(config, settings, trust_remote_code)
    whole = _structure(model)
    if not every_layer:
        _shorten(model)
    found = _run(model, config.get_text_config().vocab_size, settings)
    if len(found.layers) == len(whole.layers):
        return found
    return stretch(found, whole) or rehearse(config, settings, trust_remote_code, every_layer=True)


def _model(config: PretrainedConfig, settings: Settings, trust_remote_code: bool) -> PreTrainedModel:
    model = meta_model(config, settings.dtype, trust_remote_code).to("meta").train()
    tiled = settings.tiled_logits
    if tiled is None:
        tiled = settings.optimizer == "lomo" and can_tile_logits(model)
    if tiled:
        tile_logits(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _shorten(model: PreTrainedModel) -> None:
    """Leave so many decoder layers that the others can be told from them, if all are alike."""
    shapes = [[parameter.shape for parameter in layer.parameters()] for layer in layers(model)]
    if len(shapes) <= FEWEST or any(shape != shapes[0] for shape in shapes):
        return
    stacks = [module for module in model.modules() if isinstance(module, ModuleList) and len(module) == len(shapes)]
    if len(stacks) == 1:
        del stacks[0][FEWEST:]


def _structure(model: PreTrainedModel) -> Rehearsal:
    """What there is before anything runs."""
    named = dict(model.named_parameters())
    number = {id(parameter): index for index, parameter in enumerate(named.values())}
    found = Rehearsal(list(named), [parameter.numel() for parameter in named.values()])
    found.buffers = sum(buffer.nbytes for buffer in model.buffers())
    found.tiled = "forward" in vars(model)
    found_layers = {id(layer) for layer in layers(model)}
    innermost: dict[str, int] = {}  # the layer whose name a module's begins with
    for index, (name, module) in enumerate(model.named_modules()):
        found.module_names.append(name)
        found.modules.append([number[id(parameter)] for parameter in module.parameters(recurse=False)])
        parent = innermost.get(name.rpartition(".")[0])
        if id(module) in found_layers:
            found.layers.add(index)
            innermost[name] = index
        elif parent is not None:
            found.inside[index] = innermost[name] = parent
    return found


def _run(model: PreTrainedModel, vocabulary: int, settings: Settings) -> Rehearsal:
    found = _structure(model)
    recorder = Recorder(found, vocabulary)
    watch(model, recorder)
    try:
        with stand_ins(_linear(settings), recorder), recorder:
            _step(model, settings, recorder)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be planned for, because it does not run without data: {one_line(error)}; "
            "train a few steps and look at the peak instead"
        ) from error
    found.flops = recorder.flops
    return found


def _linear(settings: Settings) -> Callable[..., Tensor]:
    """The function that linear layers compute by."""
    if settings.resident:
        return torch.nn.functional.linear
    return zero3.linear if settings.optimizer == "lomo" else zero3_linear_wrap


def _step(model: PreTrainedModel, settings: Settings, recorder: Recorder) -> None:
    ids = torch.zeros(settings.batch, settings.sequence, dtype=torch.int64, device="meta")
    loss = model(input_ids=ids, labels=torch.zeros_like(ids), use_cache=False).loss
    recorder.found.forward_flops = recorder.flops
    recorder.note(Event.LOSS)
    (loss * 1.0).backward()
    recorder.note(Event.END)
