"""Gathering of ZeRO-3 parameters around module use, or permanently resident parameters.

A gathered copy is stale once its shard has been updated, so ``refresh`` ends every step.
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

# Share of free memory for gathered layers; the rest is for activations, gradients and a stash.
LAYERS_SHARE = 0.5
# The same where layered accumulation needs whole layers: one in use, the next in flight, and the sums of the gradients
# of one, which are twice as large in fp32.
LAYERED_SHARE = 0.75
# Elements that may be requested beyond the prefetch bucket before the device has reached earlier ones; see
# ``LookaheadLimit``. For small matrices this hides the host's launch time; a large matrix keeps the device busy for
# much longer than a launch takes, so it needs no lookahead. 64 MiB in half precision.
AHEAD_NUMEL = 2**25
# private limit of DeepSpeed's coordinator on the number of parameters in flight; no setting exposes it
MAX_FETCH_EVENTS = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"


class Gathering(Protocol):
    """Makes the full parameters available to the modules of a model while it runs.

    Attributes:
        granularity: unit of a gather, ``module`` or ``layer``; ``auto`` if nothing is gathered.
        resident: whether the full parameters are always available.
    """

    granularity: str
    resident: bool

    def begin_backward(self) -> None:
        """Prepare for a backward pass."""

    def release(self) -> None:
        """Free the gathered copies that remain after a backward pass."""

    def refresh(self) -> None:
        """Invalidate all gathered copies, since the shards have changed."""

    def drop(self) -> None:
        """Free every gathered copy after an exception; acts on this rank alone, without a collective."""

    def destroy(self) -> None:
        """Remove every hook from the model."""


class ResidentGathering:
    """Gathering of a single rank without offload: its shards are the full parameters, so nothing is gathered.

    Only ``deepspeed.zero.GatheredParameters`` partitions them, on exit; the next forward, backward or ``state_dict`` of
    the model restores them.
    """

    granularity = "auto"  # not used
    resident = True

    def __init__(self, model: Module) -> None:
        self.parameters = list(model.parameters())
        self.handles = [
            model.register_forward_pre_hook(lambda module, arguments: restore_full_params(self.parameters)),
            model.register_state_dict_pre_hook(lambda module, prefix, keep: restore_full_params(self.parameters)),
        ]
        restore_full_params(self.parameters)

    def begin_backward(self) -> None:
        """Restore parameters that were partitioned since forward."""
        restore_full_params(self.parameters)

    def release(self) -> None:
        """Do nothing: a parameter is its shard, not a copy."""

    def refresh(self) -> None:
        """Do nothing: a parameter is its shard, not a copy."""

    def drop(self) -> None:
        """Do nothing: a parameter is its shard, not a copy."""

    def destroy(self) -> None:
        """Implement ``Gathering.destroy``."""
        for handle in self.handles:
            handle.remove()


class OnDemandGathering:
    """Gathering by DeepSpeed's hooks, before a module or a layer runs, until it has run.

    Args:
        granularity: ``module`` or ``layer``.
        undo: restores the gather methods of the parameters, which this project has replaced.
        stored_as_used: whether shards are on the device in the dtype of the parameters.
        offload: settings of ``DeepSpeedZeRoOffload``.
    """

    resident = False

    def __init__(
        self, model: Module, granularity: str, undo: Callable[[], None], stored_as_used: bool, **offload: Any
    ) -> None:
        self.undo = [undo, install_memory_efficient_linear(model)]
        self.granularity = granularity
        self.leaves = _gathered_whole(model) if granularity == "layer" else []
        for layer in self.leaves:
            set_z3_leaf_module(layer, True)
        self.offload = DeepSpeedZeRoOffload(model, **offload)
        # otherwise the host would wait, within each layer, until at most two parameters are in flight
        setattr(self.offload.get_param_coordinator(), MAX_FETCH_EVENTS, sys.maxsize)
        self.persistent = self.offload.persistent_parameters
        self.copies = PersistentCopies(self.persistent) if self.persistent and stored_as_used else None

    def begin_backward(self) -> None:
        """Do nothing: DeepSpeed gathers for each module."""

    def release(self) -> None:
        """Implement ``Gathering.release``: an embedding stays gathered, since its input needs no gradient."""
        self.offload.release_backward_leftovers()

    def refresh(self) -> None:
        """Free every gathered copy and gather the persistent parameters again, in one collective.

        DeepSpeed gathers on a stream that waits for no other, so the updates must have finished first.
        """
        get_accelerator().synchronize()
        self.offload.partition_all_parameters()
        if self.copies is not None:
            self.copies.gather()
        elif self.persistent:
            self.persistent[0].all_gather_coalesced(self.persistent).wait()

    def drop(self) -> None:
        """Implement ``Gathering.drop``; modules gather persistent parameters again when they next use them.

        Pending gathers are awaited, since all ranks that have not failed earlier take part in them.
        """
        get_accelerator().synchronize()
        reset_unregistered_gathers(self.offload.module)
        coordinator = self.offload.get_param_coordinator()
        if coordinator.is_record_trace():  # a partial trace is invalid
            coordinator._invalidate_trace()
        self.offload.partition_all_parameters()
        self.offload.release_backward_leftovers()

    def destroy(self) -> None:
        """Implement ``Gathering.destroy``."""
        self.offload.destroy()
        for undo in self.undo:
            undo()
        for layer in self.leaves:
            set_z3_leaf_module(layer, False)


def layer_of(name: str) -> str | None:
    """Return the outermost numbered module in a parameter's name (``model.layers.7``); None outside the layers."""
    match = re.match(r"(?:.+?\.)?\d+(?=\.)", name)
    return match.group() if match else None


def layers(model: Module) -> list[Module]:
    """Return the decoder layers of ``model``; empty if they are containers, which are never called."""
    names = dict.fromkeys(layer_of(name) for name, _ in model.named_parameters())
    modules = [model.get_submodule(name) for name in names if name is not None]
    return [] if any(isinstance(module, ModuleList | ModuleDict) for module in modules) else modules


def _gathered_whole(model: Module) -> list[Module]:
    """Return the layers, and the modules without submodules outside of them.

    The latter are gathered whole anyway. But before DeepSpeed frees a module that is not among its leaf modules, it
    does not count the parameters of those that are, and would keep an embedding through all layers.
    """
    decoder = layers(model)
    inside = {module for layer in decoder for module in layer.modules()}
    others = (module for module in model.modules() if module not in inside and not list(module.children()))
    return [*decoder, *(module for module in others if list(module.parameters()))]


def largest_gather_numel(model: Module, granularity: str) -> int:
    """Return the elements of the largest gather: of the largest layer, or of the largest module."""
    of_layers = [_numel(layer.parameters()) for layer in layers(model)] if granularity == "layer" else []
    return max([*of_layers, *(_numel(module.parameters(recurse=False)) for module in model.modules())])


def prefetches_next_gather(offload: str, granularity: str) -> bool:
    """Return whether the next gather of any size is in flight while the current parameters are in use.

    Otherwise DeepSpeed's limits hold, which keep a part of a layer in flight: memory is short.

    Args:
        offload: the device of ``offload_param``, or ``none``.
    """
    return offload == "cpu" or (offload in ("none", "nvme") and granularity == "layer")


def prefetch_limits(prefetch_numel: int, live_numel: int, largest: int) -> tuple[int, int]:
    """Return ``prefetch_bucket_size`` and ``max_live_parameters``, enlarged to prefetch the largest gather whole.

    The links stay busy if the next parameters are in flight while the current ones are in use.

    Args:
        largest: see ``largest_gather_numel``.
    """
    prefetch_numel = max(prefetch_numel, largest)
    return prefetch_numel, max(live_numel, largest + prefetch_numel)


def default_overlap_comm(offload: str) -> bool:
    """Return the default of DeepSpeed's ``overlap_comm``: whether parameters are gathered in a separate stream.

    Gathers from other ranks need none: NCCL has its own stream, so prefetching overlaps with computation anyway, and
    memory released in the compute stream is available to the next gather at once. With a separate stream it is
    available only after the device has used it, while the host requests more. Copies from host memory do need one.

    Args:
        offload: the device of ``offload_param``, or ``none``.
    """
    return offload != "none"


def choose_granularity(requested: str, model: Module, free_device_bytes: int, layered: bool = False) -> str:
    """Return ``module`` or ``layer``; ``auto`` becomes ``layer`` if two gathered layers fit in memory.

    A layer takes one collective for all of its parameters; with ``module``, each module takes one.

    Args:
        layered: whether micro-batches are to be accumulated inside the layers, for which one layer must fit.
        free_device_bytes: minimum over all ranks.

    Raises:
        ConfigError: ``layer`` was requested, and the model has no layers.
    """
    if requested == "module":
        return requested
    sizes = [_numel(layer.parameters()) * next(layer.parameters()).element_size() for layer in layers(model)]
    if requested == "layer":
        if not sizes:
            raise ConfigError(
                "gather_granularity layer needs a model with numbered layers that are called (model.layers.0, ...), "
                "but this one has none; use module"
            )
        return requested
    # one layer in use and the next in flight, each received where it is used
    fits = bool(sizes) and 2 * max(sizes) <= LAYERS_SHARE * free_device_bytes
    fits_layered = layered and 3 * max(sizes, default=0) <= LAYERED_SHARE * free_device_bytes
    return "layer" if fits or fits_layered else "module"


def _numel(parameters: Iterable[Parameter]) -> int:
    return sum(full_shape(parameter).numel() for parameter in parameters)
