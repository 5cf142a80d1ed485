"""What ``lomo_ds.planner`` predicts for a method on a workload, to be held against what is measured."""

from typing import Any

from benchmarks import methods
from benchmarks.workload import Workload
from lomo_ds.planner import Machine, Plan, PlannedModel, Settings, plan
from lomo_ds.planner.suggest import ZERO

OPTIMIZERS: dict[str, Any] = {"deepspeed-sgd": "sgd", "deepspeed-adamw": "adamw"}
PLENTY = 2**44  # bytes: whether it fits is found out by measuring


def plan_of(method: str, work: Workload, ranks: int, device: str) -> Plan | None:
    """The plan of a row of ``memory.py`` on ``cpu`` or ``cuda``; None of other methods than ours and DeepSpeed's."""
    base, work = methods.base_of(method), methods.settled(method, work)
    if base not in (*methods.OURS, *methods.DEEPSPEED):
        return None
    model = PlannedModel(work.config(), work.model)
    ours = base in methods.OURS
    zero = {name: work.zero[theirs] for name, theirs in ZERO.items() if theirs in work.zero}
    if not ours:  # see methods._deepspeed
        largest = max(parameter.numel() for parameter in model.empty.parameters())
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
    machine = Machine(PLENTY, PLENTY, device="cpu" if device == "cpu" else "gpu")
    return plan(model, settings, machine)


def planned_peak(method: str, work: Workload, ranks: int, device: str) -> int | None:
    """Bytes of tensors at the peak; None where nothing can be planned."""
    found = plan_of(method, work, ranks, device)
    return None if found is None else found.gpu_bytes - found.machine.context
