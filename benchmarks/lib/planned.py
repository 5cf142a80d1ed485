"""Predictions of ``lomo_ds.planner`` for a method on a workload, to compare with measurements."""

import functools
from dataclasses import replace
from typing import Any

from benchmarks.lib import methods
from benchmarks.lib.workload import Workload
from lomo_ds.config.lomo_config import lomo_parameters
from lomo_ds.planner import Machine, Plan, PlannedModel, Settings, plan_run
from lomo_ds.planner.suggest import ZERO_FIELDS

OPTIMIZERS: dict[str, str] = {"deepspeed-sgd": "sgd", "deepspeed-adamw": "adamw"}
AMPLE_BYTES = 2**44  # memory of a machine on which everything fits


def ample_machine(device: str, **fields: Any) -> Machine:
    """Return a machine of ``cpu`` or ``cuda`` ranks with ample memory; ``fields`` override those of ``Machine``."""
    ample: dict[str, Any] = {"gpu_memory": AMPLE_BYTES, "host_memory": AMPLE_BYTES}
    return Machine(**{**ample, **fields}, device="cpu" if device == "cpu" else "gpu")


@functools.cache
def _planned_model(name: str) -> PlannedModel:
    """Return a model whose plans share its step traces, because a trace takes seconds."""
    return PlannedModel(Workload(name).config(), name)


def plan_method(method: str, work: Workload, ranks: int, machine: Machine) -> Plan | None:
    """Plan a row of ``memory.py``; None for methods other than those of lomo_ds and DeepSpeed."""
    base, work = methods.base_method(method), methods.apply_suffixes(method, work)
    if base not in (*methods.LOMO_DS, *methods.DEEPSPEED_ZERO3):
        return None
    model = _planned_model(work.model)
    is_lomo_ds = base in methods.LOMO_DS
    zero = {name: work.zero[field] for name, field in ZERO_FIELDS.items() if field in work.zero}
    if not is_lomo_ds:  # see methods._deepspeed
        largest = max(parameter.numel() for parameter in model.meta_model.parameters())
        zero["reduce_bucket_size"] = min(500_000_000, largest)
    optimizer, schedule = methods.LOMO_DS.get(base) or (OPTIMIZERS[base], "auto")
    lomo = {name: work.lomo[name] for name in lomo_parameters(Settings) if name in work.lomo}
    settings = Settings(
        gpus=ranks,
        sequence=work.sequence,
        batch=work.batch,
        accumulation_steps=work.accumulation,
        documents=work.documents > 1,
        precision=work.precision,  # type: ignore[arg-type]
        optimizer=optimizer.lower(),  # type: ignore[arg-type]
        fused=False,
        gradient_clipping=methods.MAX_NORM if methods.clips(method) else 0.0,
        gradient_checkpointing=work.checkpointing,
        tiled_logits=work.tiled_logits and is_lomo_ds,
        communication_data_type=work.communication_data_type,  # type: ignore[arg-type]
        offload_param=work.zero.get("offload_param", {}).get("device", "none"),
        **{"update_schedule": schedule, "stash_device": "gpu", **lomo},
        **zero,
    )
    return plan_run(model, settings, machine)


def planned_peak(method: str, work: Workload, ranks: int, device: str) -> int | None:
    """Return the predicted peak bytes of tensors; None for methods that cannot be planned."""
    plan = plan_method(method, work, ranks, ample_machine(device))
    return None if plan is None else tensor_bytes(plan)


def tensor_bytes(plan: Plan) -> int:
    """Return the GPU's peak bytes without the CUDA context."""
    return plan.gpu_bytes - plan.machine.context


def with_granularity_of_card(method: str, work: Workload, ranks: int, card_bytes: int) -> Workload:
    """Return the workload with the gather granularity that a GPU of ``card_bytes`` would get.

    The granularity of lomo_ds's methods depends on free memory; DeepSpeed's prefetching does not.
    """
    plan = plan_method(method, work, ranks, ample_machine("cuda", gpu_memory=card_bytes))
    assert plan is not None
    return replace(work, lomo={**work.lomo, "gather_granularity": plan.granularity})
