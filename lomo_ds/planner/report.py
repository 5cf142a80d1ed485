"""Formats a plan as text for a terminal and as a dictionary for JSON."""

import dataclasses
from typing import Any

from lomo_ds.planner.advice import Advice
from lomo_ds.planner.bigger_step import BiggerStep
from lomo_ds.planner.plan import GIB, Plan, gib, rounded
from lomo_ds.planner.suggest import command_line

MIN_SHOWN_BYTES = 2**20  # smaller tensors share one row of the table
FILE = "FILE is the DeepSpeed config that --suggest FILE writes"


def format_plan(plan: Plan, advice: Advice | None, bigger: BiggerStep | None = None) -> str:
    """Format a plan for a terminal, with the advice on it, and the bigger step of the one that fits."""
    settings, machine, time = plan.settings, plan.machine, plan.time
    lines = [
        f"{plan.model}: {plan.numel / 1e9:.2f}B parameters in {settings.precision}"
        f"{', stored in int8' if settings.int8_weights else ''}, on {gpus_in_words(settings.gpus)} of "
        f"{gib(machine.gpu_memory)} GiB; a step is {settings.tokens} tokens",
        f"optimizer: {settings.optimizer}",
        f"schedule: {plan.choice}",
        *_accumulation(plan),
        f"gathered at once: {'nothing' if settings.resident else 'a ' + plan.granularity}; "
        f"logits {'in tiles' if plan.tiled else 'not tiled'}; "
        f"activations {'recomputed' if plan.recomputes else 'kept'}",
        "",
        f"GiB on each GPU at the peak ({plan.memory.when})",
        *_sizes(plan.memory.at_peak),
        *_sizes({"total": plan.gpu_bytes, "available": machine.gpu_memory}),
    ]
    if plan.host_bytes:
        lines += [
            "",
            "GiB of pinned memory on each host",
            *_sizes(plan.pinned_host_bytes),
            *_sizes({"total": plan.host_bytes, "available": plan.usable_host_bytes}),
        ]
    lines += [
        "",
        f"seconds of a step, at {100 * machine.utilisation:.0f} % of {machine.flops / 1e12:.0f} TFLOP/s and "
        f"{machine.pcie / 1e9:.0f} GB/s",
        *_rows({kind: f"{value:.3g}" for kind, value in time.by_kind.items() if value}),
        *_rows({"a step": f"{time.total:.3g}"}),
        "",
        f"bound by {time.bottleneck_name}; about {rounded(plan.tokens_per_second)} tokens/s in total",
        f"plan: {plan}",
    ]
    if advice is None and not plan.fits:
        lines.append("no change that the planner knows makes it fit")
        return "\n".join(lines)
    lines += [f"{words}" for words in (advice, bigger) if words is not None]
    return "\n".join([*lines, command_line(suggested_plan(plan, advice, bigger)), FILE])


def suggested_plan(plan: Plan, advice: Advice | None, bigger: BiggerStep | None) -> Plan:
    """Return the plan that a report ends with: the fastest of those that fit."""
    return next((better.plan for better in (bigger, advice) if better is not None), plan)


def format_peak(plan: Plan) -> str:
    """Format a table of the tensors that make up the GPU's peak, the largest first."""
    rows = sorted(((size, kind, name) for (kind, name), size in plan.memory.sizes.items() if size), reverse=True)
    lines = [
        f"  {size / GIB:>7.3f}  {kind:<20}  {name}".rstrip() for size, kind, name in rows if size >= MIN_SHOWN_BYTES
    ]
    rest = sum(size for size, _, _ in rows if size < MIN_SHOWN_BYTES)
    return "\n".join(
        [
            f"GiB on each GPU at the peak ({plan.memory.when}): {plan.gpu_bytes / GIB:.3f}",
            *lines,
            f"  {rest / GIB:>7.3f}  smaller tensors",
        ]
    )


def plan_as_dict(plan: Plan, advice: Advice | None, bigger: BiggerStep | None = None) -> dict[str, Any]:
    """Return a plan as a dictionary for JSON; the advice and the bigger step contain plans of their own."""
    return {
        "model": plan.model,
        "parameters": plan.numel,
        "settings": dataclasses.asdict(plan.settings),
        "machine": dataclasses.asdict(plan.machine),
        "schedule": dataclasses.asdict(plan.choice),
        "accumulation": dataclasses.asdict(plan.accumulation),
        "gather_granularity": plan.granularity,
        "tiled_logits": plan.tiled,
        "gpu_bytes": {"total": plan.gpu_bytes, "by_kind": plan.memory.at_peak, "when": plan.memory.when},
        "pinned_host_bytes": {"total": plan.host_bytes, "by_kind": plan.pinned_host_bytes},
        "nvme_bytes": plan.memory.nvme,
        "seconds": {"step": plan.time.total, "by_kind": plan.time.by_kind},
        "link_bytes": plan.time.link_bytes,
        "bound_by": plan.time.bottleneck,
        "tokens_per_second": plan.tokens_per_second,
        "fits": plan.fits,
        "verdict": str(plan),
        "advice": _better_as_dict(advice),
        "bigger_step": _better_as_dict(bigger),
    }


def _better_as_dict(better: Advice | BiggerStep | None) -> dict[str, Any] | None:
    return None if better is None else {"changes": list(better.changes), "plan": plan_as_dict(better.plan, None)}


def _accumulation(plan: Plan) -> list[str]:
    steps, choice = plan.settings.accumulation_steps, plan.accumulation
    return [f"accumulation: {choice.name}, {steps} micro-batches ({choice.reason})"] if steps > 1 else []


def _sizes(sizes: dict[str, int]) -> list[str]:
    return _rows({kind: f"{size / 2**30:.2f}" for kind, size in sizes.items() if size})


def _rows(values: dict[str, str]) -> list[str]:
    return [f"  {name:<20}{value:>10}" for name, value in values.items()]


def gpus_in_words(count: int) -> str:
    """Return a number of GPUs with its noun."""
    return "1 GPU" if count == 1 else f"{count} GPUs"
