"""What ``lomo_ds.planner`` predicts for a method on a workload, to be held against what is measured."""

import functools
from dataclasses import replace
from typing import Any

from benchmarks.lib import methods
from benchmarks.lib.workload import Workload
from lomo_ds.planner import Machine, Plan, PlannedModel, Settings, plan_run
from lomo_ds.planner.suggest import ZERO

OPTIMIZERS: dict[str, Any] = {"deepspeed-sgd": "sgd", "deepspeed-adamw": "adamw"}
PLENTY = 2**44  # bytes: whether it fits is found out by measuring


def machine_of(device: str, **known: Any) -> Machine:
    """Ranks on ``cpu`` or ``cuda`` with memory for everything; ``known`` are fields of ``Machine``."""
    plenty: dict[str, Any] = {"gpu_memory": PLENTY, "host_memory": PLENTY}
    return Machine(**{**plenty, **known}, device="cpu" if device == "cpu" else "gpu")


@functools.cache
def _planned_model(name: str) -> PlannedModel:
    """Plans of one model share its rehearsals, which take seconds."""
    return PlannedModel(Workload(name).config(), name)


def plan_of(method: str, work: Workload, ranks: int, machine: Machine) -> Plan | None:
    """The plan of a row of ``memory.py``; None of other methods than ours and DeepSpeed's."""
    base, work = methods.base_of(method), methods.settled(method, work)
    if base not in (*methods.OURS, *methods.DEEPSPEED):
        return None
    model = _planned_model(work.model)
    ours = base in methods.OURS
    zero = {name: work.zero[theirs] for name, theirs in ZERO.items() if theirs in work.zero}
    if not ours:  # see methods._deepspeed
        largest = max(parameter.numel() for parameter in model.meta_model.parameters())
        zero["reduce_bucket_size"] = min(500_000_000, largest)
    lomo = {name: work.lomo[name] for name in ("stash_device", "gather_granularity", "weights") if name in work.lomo}
    settings = Settings(
        gpus=ranks,
        sequence=work.sequence,
        batch=work.batch,
        precision=work.precision,  # type: ignore[arg-type]
        optimizer=OPTIMIZERS.get(base, "lomo"),
        fused=False,
        update_schedule=base if ours else "auto",  # type: ignore[arg-type]
        gradient_clipping=methods.MAX_NORM if methods.clips(method) else 0.0,
        gradient_checkpointing=work.checkpointing,
        tiled_logits=work.tiled_logits and ours,
        offload_param=work.zero.get("offload_param", {}).get("device", "none"),
        **{"stash_device": "gpu", **lomo},
        **zero,
    )
    return plan_run(model, settings, machine)


def planned_peak(method: str, work: Workload, ranks: int, device: str) -> int | None:
    """Bytes of tensors at the peak; None where nothing can be planned."""
    found = plan_of(method, work, ranks, machine_of(device))
    return None if found is None else bytes_of_tensors(found)


def bytes_of_tensors(found: Plan) -> int:
    """What a GPU holds at the peak, without what CUDA itself takes."""
    return found.gpu_bytes - found.machine.context


def pinned_to_card(method: str, work: Workload, ranks: int, card_bytes: int) -> Workload:
    """The workload with what depends on free memory set as on a card of ``card_bytes``, whatever this one has.

    Of a method with an update schedule of its own that is how much is gathered at once; how far ahead DeepSpeed gathers
    depends on no memory.
    """
    found = plan_of(method, work, ranks, machine_of("cuda", gpu_memory=card_bytes))
    assert found is not None
    return replace(work, lomo={**work.lomo, "gather_granularity": found.granularity})
