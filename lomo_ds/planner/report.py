"""A plan for people and for scripts."""

import dataclasses
from typing import Any

from lomo_ds.planner.advice import Advice
from lomo_ds.planner.plan import GIB, Plan, gib, rounded
from lomo_ds.planner.suggest import command_line

LEAST_SHOWN = 2**20  # bytes of a row of the table of moments
FILE = "FILE is the DeepSpeed config that --suggest FILE writes"


def as_text(found: Plan, advice: Advice | None) -> str:
    """For a terminal."""
    settings, machine, seconds = found.settings, found.machine, found.seconds
    lines = [
        f"{found.model}: {found.numel / 1e9:.2f}B parameters in {settings.precision}"
        f"{', kept in eight bits' if settings.int8_weights else ''}, on {_gpus(settings.gpus)} of "
        f"{gib(machine.gpu_memory)} GiB; a step is {settings.tokens} tokens",
        f"schedule: {found.choice}",
        f"gathered at once: {'nothing' if settings.resident else 'a ' + found.granularity}; "
        f"logits {'a tile at a time' if found.tiled else 'whole'}; "
        f"activations {'computed again' if settings.gradient_checkpointing else 'kept'}",
        "",
        f"GiB on each GPU at the peak ({found.memory.when})",
        *_sizes(found.memory.at_peak),
        *_sizes({"in all": found.gpu_bytes, "there is": machine.gpu_memory}),
    ]
    if found.host_bytes:
        lines += [
            "",
            "GiB pinned in the memory of each host",
            *_sizes(found.pinned_host_bytes),
            *_sizes({"in all": found.host_bytes, "may be": found.usable_host_bytes}),
        ]
    lines += [
        "",
        f"seconds of a step, if {100 * machine.utilisation:.0f} % of {machine.flops / 1e12:.0f} TFLOP/s and "
        f"{machine.pcie / 1e9:.0f} GB/s are had",
        *_rows({kind: f"{value:.3g}" for kind, value in seconds.by_kind.items() if value}),
        *_rows({"a step": f"{seconds.step:.3g}"}),
        "",
        f"bound by {seconds.bound_in_words}; about {rounded(found.tokens_per_second)} tokens/s in all",
        f"plan: {found}",
    ]
    if advice is not None:
        lines += [f"{advice}", command_line(advice.plan), FILE]
    elif not found.fits:
        lines.append("no change that the planner knows makes it fit")
    else:
        lines += [command_line(found), FILE]
    return "\n".join(lines)


def moments_as_text(found: Plan) -> str:
    """A table of the tensors that make up the peak on a GPU, the largest first."""
    rows = sorted(((size, kind, name) for (kind, name), size in found.memory.sizes.items() if size), reverse=True)
    lines = [f"  {size / GIB:>7.3f}  {kind:<20}  {name}".rstrip() for size, kind, name in rows if size >= LEAST_SHOWN]
    rest = sum(size for size, _, _ in rows if size < LEAST_SHOWN)
    return "\n".join(
        [
            f"GiB on each GPU at the peak ({found.memory.when}): {found.gpu_bytes / GIB:.3f}",
            *lines,
            f"  {rest / GIB:>7.3f}  all that is smaller",
        ]
    )


def as_json(found: Plan, advice: Advice | None) -> dict[str, Any]:
    """For scripts: bytes, seconds, and the advice as a plan of its own."""
    return {
        "model": found.model,
        "parameters": found.numel,
        "settings": dataclasses.asdict(found.settings),
        "machine": dataclasses.asdict(found.machine),
        "schedule": dataclasses.asdict(found.choice),
        "gather_granularity": found.granularity,
        "tiled_logits": found.tiled,
        "gpu_bytes": {"total": found.gpu_bytes, "by_kind": found.memory.at_peak, "when": found.memory.when},
        "pinned_host_bytes": {"total": found.host_bytes, "by_kind": found.pinned_host_bytes},
        "nvme_bytes": found.memory.nvme,
        "seconds": {"step": found.seconds.step, "by_kind": found.seconds.by_kind},
        "link_bytes": found.seconds.link_bytes,
        "bound_by": found.seconds.bound,
        "tokens_per_second": found.tokens_per_second,
        "fits": found.fits,
        "verdict": str(found),
        "advice": None if advice is None else {"changes": list(advice.changes), "plan": as_json(advice.plan, None)},
    }


def _sizes(found: dict[str, int]) -> list[str]:
    return _rows({kind: f"{size / 2**30:.2f}" for kind, size in found.items() if size})


def _rows(values: dict[str, str]) -> list[str]:
    return [f"  {name:<20}{value:>10}" for name, value in values.items()]


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
