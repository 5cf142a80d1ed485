"""The methods that benchmarks compare: ways to take a training step, each built once and stepped many times.

The name of a method is one of ``METHODS`` and may have suffixes. ``+clip`` clips the global gradient norm to 1. Three
suffixes are for methods of lomo_ds only: ``+int8`` stores weights in int8, ``+qgather`` gathers them in int8, and
``+layered`` runs all micro-batches of a step inside each layer. Without it the stash adds up their gradients.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from benchmarks.lib.workload import Workload, tile_logits

CLIP, INT8, QUANTIZED_GATHER, LAYERED = "+clip", "+int8", "+qgather", "+layered"
LOMO_DS_SUFFIXES = (INT8, QUANTIZED_GATHER, LAYERED)
MAX_NORM = 1.0
LR = 1e-3

Batch = dict[str, Tensor]

# lomo_ds's own methods: the optimizer's type and the update schedule
LOMO_DS = {
    "immediate": ("LOMO", "immediate"),
    "two_pass": ("LOMO", "two_pass"),
    "stash": ("LOMO", "stash"),
    "adalomo": ("AdaLomo", "auto"),
}
DEEPSPEED_ZERO3 = ("deepspeed-sgd", "deepspeed-adamw")
SINGLE_PROCESS = ("plain", "lomo-optim", "torchtune")  # these support one process only
METHODS = (*LOMO_DS, *DEEPSPEED_ZERO3, *SINGLE_PROCESS)
DESCRIPTIONS = {
    "immediate": "lomo_ds, each shard updated as its gradient arrives",
    "two_pass": "lomo_ds, the paper's schedule: measure in a first pass, update in a second",
    "stash": "lomo_ds, gradient shards kept until the norm is known",
    "adalomo": "lomo_ds with AdaLomo, each shard updated once its sums over the ranks are there",
    "deepspeed-sgd": "DeepSpeed's ZeRO-3 with torch.optim.SGD",
    "deepspeed-adamw": "DeepSpeed's ZeRO-3 with torch.optim.AdamW",
    "plain": "plain PyTorch, forward and backward, every gradient dropped as it arrives and nothing updated",
    "lomo-optim": "the authors' own package, in one process",
    "torchtune": "torchtune's optimizer-in-backward with torch.optim.SGD, in one process",
}
CANNOT_CLIP = {
    "immediate": "updates weights before the norm is known",
    "plain": "has no gradients to clip",
    "torchtune": "refuses clipping with its optimizer in backward",
}
INSTALL = {
    "lomo-optim": ("lomo_optim", "pip install lomo-optim==0.1.1"),
    "torchtune": ("torchtune", "pip install --no-deps torchtune==0.6.1"),
}


class Method:
    """One way to take steps on one workload.

    Args:
        model: the model to train.
        micro_batches: the batches of every step, whose gradients are added up.
        step: takes one step and returns the loss, on the device, so that the host does not wait for it.
        optimizer_state: returns every tensor that the optimizer keeps between steps, master weights included.
        gradients: returns gradients and buffers for gradients, beside the parameters' ``.grad``.
    """

    def __init__(
        self,
        model: Module,
        micro_batches: list[Batch],
        step: Callable[[list[Batch]], Tensor],
        optimizer_state: Callable[[], Iterable[Any]] = tuple,
        gradients: Callable[[], Iterable[Any]] = tuple,
    ) -> None:
        self.model = model
        self.micro_batches = micro_batches
        self._step = step
        self.optimizer_state = optimizer_state
        self.gradients = gradients

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    def step(self) -> Tensor:
        """Take one step."""
        return self._step(self.micro_batches)

    def parameters(self) -> Iterable[Any]:
        """Yield the current data of every parameter, gathered or not, and this rank's shard of it."""
        for parameter in self.model.parameters():
            yield parameter.data
            yield getattr(parameter, "ds_tensor", None)


def base_method(name: str) -> str:
    """Return the name without suffixes: one of ``METHODS``, if the name is valid."""
    return name.partition("+")[0]


def clips(name: str) -> bool:
    """Return whether the method clips the gradient norm."""
    return CLIP in name


def uses_int8(name: str) -> bool:
    """Return whether weights are stored or gathered in int8."""
    return INT8 in name or QUANTIZED_GATHER in name


def apply_suffixes(name: str, work: Workload) -> Workload:
    """Return the workload with the settings that the suffixes of a method's name add."""
    if INT8 in name:
        work = dataclasses.replace(work, lomo={**work.lomo, "weights": "int8"})
    if QUANTIZED_GATHER in name:
        work = dataclasses.replace(work, zero={**work.zero, "zero_quantized_weights": True})
    if LAYERED in name or (work.accumulation > 1 and base_method(name) in LOMO_DS):
        accumulation = "layered" if LAYERED in name else "stash"
        work = dataclasses.replace(work, lomo={**work.lomo, "accumulation": accumulation})
    return work


def unavailability(name: str, ranks: int, accumulation: int = 1) -> str | None:
    """Return why the method cannot run on this number of ranks on this machine; None if it can.

    Args:
        accumulation: micro-batches of a step.

    Raises:
        ValueError: there is no such method, or it does not support its suffixes.
    """
    base, *added = name.split("+")
    suffixes = {f"+{word}" for word in added}
    if base not in METHODS or not suffixes <= {CLIP, *LOMO_DS_SUFFIXES}:
        raise ValueError(
            f"a method is one of {', '.join(METHODS)}, with the suffix {CLIP} to clip, and for lomo_ds's own with "
            f"{', '.join(LOMO_DS_SUFFIXES)}, got {name}"
        )
    if base not in LOMO_DS and (unsupported := suffixes - {CLIP}):
        raise ValueError(f"{base} does not support {' or '.join(sorted(unsupported))}, so there is no {name}")
    if clips(name) and base in CANNOT_CLIP:
        raise ValueError(f"{base} {CANNOT_CLIP[base]}, so there is no {name}")
    if base in SINGLE_PROCESS and ranks > 1:
        return "it runs in one process only"
    if base in SINGLE_PROCESS and accumulation > 1:
        return "it does not accumulate gradients"
    if base in LOMO_DS and base != "stash" and LAYERED not in suffixes and accumulation > 1:
        return f"it keeps no gradients to add up, so only {name}{LAYERED} accumulates"
    if base in INSTALL and importlib.util.find_spec(INSTALL[base][0]) is None:
        return f"it is not installed: {INSTALL[base][1]}"
    return None


def build(name: str, work: Workload) -> Method:
    """Build a method up to its first step. Every rank calls this."""
    base, max_norm = base_method(name), MAX_NORM if clips(name) else None
    if base in LOMO_DS:
        return _lomo_ds(base, apply_suffixes(name, work), max_norm)
    if base in DEEPSPEED_ZERO3:
        return _deepspeed(base, work, max_norm)
    return {"plain": _plain, "lomo-optim": _lomo_optim, "torchtune": _torchtune}[base](work, max_norm)


def _lomo_ds(name: str, work: Workload, max_norm: float | None) -> Method:
    import lomo_ds

    ds_config = work.ds_config(max_norm)
    kind, schedule = LOMO_DS[name]
    params = {"lr": LR, "update_schedule": schedule, **work.lomo}
    ds_config["optimizer"] = {"type": kind, "params": params}
    model = work.sharded_model(ds_config)
    if work.tiled_logits:
        tile_logits(model)
    engine = lomo_ds.initialize(model=model, config=ds_config)[0]

    def gradients() -> Iterable[Any]:
        schedule: Any = engine.schedule
        stash = getattr(schedule, "buffers", None) or getattr(schedule, "stashed", {})  # in host memory, on the device
        yield from stash.values()
        layer = engine.optimizer.hooks.layer
        yield from layer.sums.values() if layer is not None else ()

    def rule_state() -> Iterable[Any]:
        for state in engine.optimizer.schedule.updater.states.storage.values():
            yield from state.values()

    return Method(engine.module, work.micro_batches(engine.device), engine.train_batch, rule_state, gradients)


def _deepspeed(name: str, work: Workload, max_norm: float | None) -> Method:
    import deepspeed

    ds_config = work.ds_config(max_norm) | {"zero_allow_untested_optimizer": True}
    model = work.sharded_model(ds_config)
    # DeepSpeed allocates the bucket at start; its default may be larger than the largest gradient
    largest = max(parameter.ds_numel for parameter in model.parameters())
    zero = ds_config["zero_optimization"]
    zero["reduce_bucket_size"] = min(500_000_000, largest)
    kind = torch.optim.AdamW if name == "deepspeed-adamw" else torch.optim.SGD
    engine = deepspeed.initialize(model=model, optimizer=kind(model.parameters(), lr=LR), config=ds_config)[0]
    optimizer: Any = engine.optimizer

    def step(micro_batches: list[Batch]) -> Tensor:
        losses = [_backward_and_step(engine, batch) for batch in micro_batches]
        return torch.stack(losses).mean()

    def optimizer_state() -> Iterable[Any]:
        yield from optimizer.fp32_partitioned_groups_flat
        for state in optimizer.optimizer.state.values():
            yield from state.values()

    def gradients() -> Iterable[Any]:
        yield optimizer.grad_partitions_flat_buffer
        yield from (bucket.buffer for bucket in optimizer.ipg_buckets.values())
        yield from (group.grad for group in optimizer.fp32_partitioned_groups_flat)

    return Method(engine.module, work.micro_batches(engine.device), step, optimizer_state, gradients)


def _backward_and_step(engine: Any, batch: Batch) -> Tensor:
    """Run one micro-batch as DeepSpeed's users do, whose ``step`` updates weights after the last one only."""
    loss: Tensor = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def _plain(work: Workload, max_norm: float | None) -> Method:
    assert max_norm is None
    model = work.whole_model()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def step(micro_batches: list[Batch]) -> Tensor:
        (batch,) = micro_batches
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return Method(model, work.micro_batches(model.device), step)


def _drop_gradient(parameter: Parameter) -> None:
    parameter.grad = None


def _lomo_optim(work: Workload, max_norm: float | None) -> Method:
    from lomo_optim import Lomo

    model = work.whole_model()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=max_norm)

    def step(micro_batches: list[Batch]) -> Tensor:
        (batch,) = micro_batches
        loss = model(**batch).loss
        if max_norm is not None:  # the authors' trainer runs forward a second time too
            optimizer.grad_norm(loss)
            del loss  # their trainer keeps it, and with it a second set of activations
            loss = model(**batch).loss
        optimizer.fused_backward(loss, LR)
        return loss.detach()

    return Method(model, work.micro_batches(model.device), step)


def _torchtune(work: Workload, max_norm: float | None) -> Method:
    assert max_norm is None
    model = work.whole_model()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=LR) for parameter in model.parameters()}
    import_torchtune_memory().register_optim_in_bwd_hooks(model, optimizers)

    def step(micro_batches: list[Batch]) -> Tensor:
        (batch,) = micro_batches
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return Method(model, work.micro_batches(model.device), step)


def import_torchtune_memory() -> ModuleType:
    """Import ``torchtune.training.memory`` without torchtune itself, which needs twenty more packages."""
    if "torchtune" not in sys.modules:
        spec = importlib.util.find_spec("torchtune")
        assert spec is not None
        folders = list(spec.submodule_search_locations or ())
        for name, below in (("torchtune", ""), ("torchtune.training", "/training")):
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [folder + below for folder in folders]
    return importlib.import_module("torchtune.training.memory")


def workload_as_dict(work: Workload) -> dict[str, Any]:
    """Return a workload as results record it."""
    return dataclasses.asdict(work)
