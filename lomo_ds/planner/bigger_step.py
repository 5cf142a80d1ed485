"""Finds the number of micro-batches with which arithmetic, rather than a link, bounds the speed of a run.

Layered accumulation moves the parameters once in a step of any size, so a bigger step moves less for each token.
"""

from dataclasses import dataclass

from lomo_ds.errors import ConfigError
from lomo_ds.planner.plan import Plan, PlannedModel, plan_run, rounded
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.step_time import COMPUTE

MAX_MICRO_BATCHES = 2**12


@dataclass(frozen=True)
class BiggerStep:
    """A plan with more micro-batches in a step, which is faster.

    Attributes:
        slow: the plan that waits for a link.
        plan: the faster one.
    """

    slow: Plan
    plan: Plan

    @property
    def changes(self) -> tuple[str, ...]:
        """The arguments that make the difference."""
        settings = self.plan.settings
        changes = [f"--gradient_accumulation_steps {settings.accumulation_steps}"]
        if settings.activation_offload and not self.slow.settings.activation_offload:
            changes += [] if self.slow.settings.gradient_checkpointing else ["--gradient_checkpointing"]
            changes.append("--activation_offload")
        return tuple(changes)

    @property
    def factor(self) -> float:
        """Tokens per second as a multiple of those of ``slow``."""
        return self.plan.tokens_per_second / self.slow.tokens_per_second

    def __str__(self) -> str:
        """Describe the step and its speed in one clause."""
        *first, last = self.changes
        changes = f"{', '.join(first)} and {last} make" if first else f"{last} makes"
        time = self.slow.time
        bound = "partly bound" if time.bottleneck == COMPUTE else "bound"
        return f"{bound} by {time.slowest_link_name}: {changes} it {rounded(self.factor)} times as fast: {self.plan}"


def find_bigger_step(plan: Plan, model: PlannedModel) -> BiggerStep | None:
    """Return the smallest step, in powers of two, that is bound by arithmetic and fits; else the fastest that fits.

    Returns:
        None if ``plan`` does not fit, waits for no link, or is not faster with any step.
    """
    if not plan.fits or not plan.time.waits_for_links or model.reason_not_layered is not None:
        return None
    fastest = plan
    steps = 1 << plan.settings.accumulation_steps.bit_length()
    while steps <= MAX_MICRO_BATCHES:
        tried = _fitting(plan.settings.but(accumulation_steps=steps), plan, model)
        if tried is None:
            break
        if tried.tokens_per_second > fastest.tokens_per_second:
            fastest = tried
        if not tried.time.waits_for_links:
            break
        steps *= 2
    return None if fastest is plan else BiggerStep(plan, fastest)


def _fitting(settings: Settings, plan: Plan, model: PlannedModel) -> Plan | None:
    """Return the plan of layered accumulation that fits, with activations in host memory if it needs that."""
    for variant in (settings, settings.but(gradient_checkpointing=True, activation_offload=True)):
        try:
            tried = plan_run(model, variant, plan.machine)
        except ConfigError:
            continue
        if tried.fits and tried.is_joined:
            return tried
    return None
