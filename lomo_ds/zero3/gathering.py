"""How modules come by their whole parameters: DeepSpeed gathers them around each use, or they are at hand all the time.

A gathered copy made before its shard was updated is
stale, so ``refresh`` ends every step.
"""

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils import set_z3_leaf_module
from torch.nn import Module, ModuleDict, ModuleList, Parameter

from lomo_ds.errors import ConfigError
from lomo_ds.zero3.linear import install_memory_efficient_linear
from lomo_ds.zero3.persistent import PersistentCopies
from lomo_ds.zero3.shard import full_shape
from lomo_ds.zero3.split import restore_full_params
from lomo_ds.zero3.transport import reset_unregistered_gathers

# What gathered layers may take of the free memory; the rest is for activations, gradients and a stash.
LAYERS_SHARE = 0.25
# Elements that may be requested beyond the prefetch bucket before the device has reached earlier ones; see
# ``LookaheadLimit``. For small matrices this hides the host's launch time; a large matrix keeps the device busy for
# much longer than a launch takes, so it needs no lookahead. 64 MiB in half precision.
AHEAD_NUMEL = 2**25
# of DeepSpeed's coordinator, which has no setting for it: parameters on their way, of whatever size
MAX_FETCH_EVENTS = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"


class Gathering(Protocol):
    """Gives the modules of a model their whole parameters while it runs.

    Attributes:
        granularity: what they are gathered for at once, ``module`` or ``layer``; ``auto`` where they are not.
        resident: whether they are at hand all the time.
    """

    granularity: str
    resident: bool

    def begin_backward(self) -> None:
        """A backward pass begins."""

    def release(self) -> None:
        """A backward pass has ended: free the gathered copies that it has left behind."""

    def refresh(self) -> None:
        """The shards have changed: no copy made before may be used again."""

    def drop(self) -> None:
        """An exception has cut a step short: free every gathered copy, on this rank alone, without a collective."""

    def destroy(self) -> None:
        """Take every hook off the model."""


class ResidentGathering:
    """One rank without offload: shards are whole parameters, which stay where the modules find them.

    Only ``deepspeed.zero.GatheredParameters`` takes them away, when it is left; the next forward, backward or
    ``state_dict`` of the model puts them back.
    """

    granularity = "auto"  # none in force
    resident = True

    def __init__(self, model: Module) -> None:
        self.parameters = list(model.parameters())
        self.handles = [
            model.register_forward_pre_hook(lambda module, arguments: restore_full_params(self.parameters)),
            model.register_state_dict_pre_hook(lambda module, prefix, keep: restore_full_params(self.parameters)),
        ]
        restore_full_params(self.parameters)

    def begin_backward(self) -> None:
        """Put back what was taken away since forward."""
        restore_full_params(self.parameters)

    def release(self) -> None:
        """Nothing: a parameter is no copy of its shard."""

    def refresh(self) -> None:
        """Nothing: a parameter is no copy of its shard."""

    def drop(self) -> None:
        """Nothing: a parameter is no copy of its shard."""

    def destroy(self) -> None:
        """See ``Gathering.destroy``."""
        for handle in self.handles:
            handle.remove()


class OnDemandGathering:
    """DeepSpeed's own hooks gather parameters before a module, or a whole layer, runs, and free them after it.

    Args:
        offload: settings of ``DeepSpeedZeRoOffload``.
        granularity: ``module`` or ``layer``.
        undo: takes back what was done to the parameters for it: they bound how far ahead they are asked for.
        wired: whether they come over a ``WireFormat``.
    """

    resident = False

    def __init__(self, model: Module, granularity: str, undo: Callable[[], None], wired: bool, **offload: Any) -> None:
        self.undo = [undo, install_memory_efficient_linear(model)]
        self.granularity = granularity
        self.leaves = layers(model) if granularity == "layer" else []
        for layer in self.leaves:
            set_z3_leaf_module(layer, True)
        self.offload = DeepSpeedZeRoOffload(model, **offload)
        # the host would wait, inside of each layer, until no more than two parameters are on their way
        setattr(self.offload.get_param_coordinator(), MAX_FETCH_EVENTS, sys.maxsize)
        self.persistent = self.offload.persistent_parameters
        self.copies = PersistentCopies(self.persistent) if self.persistent and not wired else None

    def begin_backward(self) -> None:
        """Nothing: DeepSpeed gathers for each module."""

    def release(self) -> None:
        """An embedding stays gathered after backward, as its input needs no gradient; see ``Gathering.release``."""
        self.offload.release_backward_leftovers()

    def refresh(self) -> None:
        """Drop every gathered copy and gather the persistent parameters anew, in one collective.

        DeepSpeed gathers on a stream that waits for no other, so the updates must have reached the shards by now.
        """
        get_accelerator().synchronize()
        self.offload.partition_all_parameters()
        if self.copies is not None:
            self.copies.gather()
        elif self.persistent:
            self.persistent[0].all_gather_coalesced(self.persistent).wait()

    def drop(self) -> None:
        """See ``Gathering.drop``; persistent parameters are gathered again by the modules that use them next.

        Gathers under way are waited for: every rank that has not failed before takes part in them.
        """
        get_accelerator().synchronize()
        reset_unregistered_gathers(self.offload.module)
        coordinator = self.offload.get_param_coordinator()
        if coordinator.is_record_trace():  # half a trace is none
            coordinator._invalidate_trace()
        self.offload.partition_all_parameters()
        self.offload.release_backward_leftovers()

    def destroy(self) -> None:
        """See ``Gathering.destroy``."""
        self.offload.destroy()
        for undo in self.undo:
            undo()
        for layer in self.leaves:
            set_z3_leaf_module(layer, False)


def layer_of(name: str) -> str | None:
    """The outermost numbered module on a parameter's path (``model.layers.7``); None outside the layers."""
    match = re.match(r"(?:.+?\.)?\d+(?=\.)", name)
    return match.group() if match else None


def layers(model: Module) -> list[Module]:
    """The decoder layers of ``model``; none where they are containers, which are never called."""
    names = dict.fromkeys(layer_of(name) for name, _ in model.named_parameters())
    found = [model.get_submodule(name) for name in names if name is not None]
    return [] if any(isinstance(layer, ModuleList | ModuleDict) for layer in found) else found


def largest_gather_numel(model: Module, granularity: str) -> int:
    """Elements of the whole parameters that are gathered for at once: of the largest layer, or of any module."""
    of_layers = [_numel(layer.parameters()) for layer in layers(model)] if granularity == "layer" else []
    return max([*of_layers, *(_numel(module.parameters(recurse=False)) for module in model.modules())])


def offload_prefetch_limits(prefetch_numel: int, live_numel: int, largest: int) -> tuple[int, int]:
    """DeepSpeed's ``prefetch_bucket_size`` and ``max_live_parameters``, widened where parameters lie in host memory.

    The link is to have work all the time: what is used next is on its way while this is computed with.

    Args:
        largest: see ``largest_gather_numel``.
    """
    prefetch_numel = max(prefetch_numel, largest)
    return prefetch_numel, max(live_numel, largest + prefetch_numel)


def default_overlap_comm(offload: str) -> bool:
    """DeepSpeed's ``overlap_comm`` where nobody asked for it: whether parameters are fetched in a stream of their own.

    From other ranks they need none: NCCL has its own, so that what is prefetched arrives beside the computation anyway,
    and memory that is released in the computing stream serves the next gather at once. In a stream of their own it does
    so only when the device has computed with it, while the host asks for more. Copies from host memory need one.

    Args:
        offload: the device of ``offload_param``, or none.
    """
    return offload != "none"


def choose_granularity(asked: str, model: Module, free_device_bytes: int) -> str:
    """``module`` or ``layer``; ``auto`` is ``layer`` wherever two gathered layers fit.

    Layers take one collective for all their parameters, where modules take one for each.

    Args:
        free_device_bytes: the smallest over all ranks.

    Raises:
        ConfigError: ``layer`` was asked for, and the model has none.
    """
    if asked == "module":
        return asked
    sizes = [_numel(layer.parameters()) * next(layer.parameters()).element_size() for layer in layers(model)]
    if asked == "layer":
        if not sizes:
            raise ConfigError(
                "gather_granularity layer needs a model with numbered layers that are called (model.layers.0, ...), "
                "and this one has none; use module"
            )
        return asked
    # one layer in use, the next on its way; each is received in one buffer and cut from it
    return "layer" if sizes and 2 * 2 * max(sizes) <= LAYERS_SHARE * free_device_bytes else "module"


def _numel(parameters: Iterable[Parameter]) -> int:
    return sum(full_shape(parameter).numel() for parameter in parameters)
