"""Says of the timeline of a plan how fast its step is, what is busy, and what waits for what."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lomo_ds.planner.plan import Plan
from lomo_ds.planner.report import gpus_in_words
from lomo_ds.simulate import Lane, StallSum, Timeline, find_stalls, longest_stalls, seconds_by_cause

BACKWARD_AND_FORWARD = 6  # floating-point operations of a parameter for each token, without recomputation
SHORTEST_WAIT = 0.001  # of a step; lanes that are waited for less are not listed


@dataclass(frozen=True)
class SimulatedPlan:
    """A plan, and the timeline of its step.

    Attributes:
        is_suggestion: whether it is not the plan that was asked for, but the one that is suggested in its place.
    """

    plan: Plan
    timeline: Timeline
    is_suggestion: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together."""
        return self.plan.settings.tokens / self.timeline.seconds

    @property
    def model_tflops(self) -> float:
        """TFLOP/s of each GPU that the model itself needs, without what is recomputed, and without attention."""
        operations = BACKWARD_AND_FORWARD * self.plan.numel * self.plan.settings.tokens
        return operations / self.plan.settings.gpus / self.timeline.seconds / 1e12

    @property
    def title(self) -> str:
        """The job and its speed in one line."""
        settings = self.plan.settings
        micro_batches = f", {settings.accumulation_steps} micro-batches" if settings.accumulation_steps > 1 else ""
        places = {"none": "", "cpu": ", parameters in host memory", "nvme": ", parameters on NVMe"}
        return (
            f"{self.plan.model} on {gpus_in_words(settings.gpus)}, {settings.batch} x {settings.sequence}"
            f"{micro_batches}{places[settings.offload_param]}: {self.timeline.seconds:.3g} s a step, "
            f"{self.tokens_per_second:.0f} tokens/s"
        )

    @property
    def waits(self) -> dict[Lane, dict[str, float]]:
        """Seconds in which compute and the busiest lane wait, by what they wait for."""
        lanes = dict.fromkeys((Lane.COMPUTE, self.timeline.busiest_lane))
        return {lane: seconds_by_cause(find_stalls(self.timeline, lane)) for lane in lanes}

    @property
    def longest_stalls(self) -> list[StallSum]:
        """The lines of code that cost the busiest lane most time."""
        return longest_stalls(self.timeline, self.timeline.busiest_lane)

    def __str__(self) -> str:
        """Format the timeline for a terminal."""
        timeline, plan = self.timeline, self.plan
        stalls = [f"longest stalls of {timeline.busiest_lane.value}", *(f"  {stall}" for stall in self.longest_stalls)]
        return "\n".join(
            [
                f"timeline of the {'suggested command' if self.is_suggestion else 'plan'}"
                f"{'' if plan.fits else ', which does not fit'}",
                f"  {self.title}",
                f"  {'':<20}{'busy s':>10}{'of the step':>13}",
                *(
                    f"  {lane.value:<20}{timeline.busy(lane):>10.4f}{100 * timeline.busy_share(lane):>11.1f} %"
                    for lane in timeline.used_lanes
                ),
                f"{timeline.seconds:.3g} s by timeline, {plan.time.total:.3g} s planned; {self.tokens_per_second:.0f} "
                f"tokens/s, {self.model_tflops:.3g} TFLOP/s of the model on each GPU",
                *(_format_waits(lane, waits, timeline.seconds) for lane, waits in self.waits.items()),
                *(stalls if self.longest_stalls else []),
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the timeline as a dictionary for JSON."""
        timeline = self.timeline
        return {
            "is_suggestion": self.is_suggestion,
            "settings": dataclasses.asdict(self.plan.settings),
            "fits": self.plan.fits,
            "seconds": timeline.seconds,
            "planned_seconds": self.plan.time.total,
            "tokens_per_second": self.tokens_per_second,
            "model_tflops_per_gpu": self.model_tflops,
            "lanes": {
                lane.value: {"busy_seconds": timeline.busy(lane), "busy_share": timeline.busy_share(lane)}
                for lane in timeline.used_lanes
            },
            "waits": {lane.value: waits for lane, waits in self.waits.items()},
            "busiest_lane": timeline.busiest_lane.value,
            "longest_stalls": [
                {"seconds": stall.seconds, "count": stall.count, "reason": stall.reason, "source": stall.source}
                for stall in self.longest_stalls
            ],
        }


def _format_waits(lane: Lane, waits: dict[str, float], step: float) -> str:
    worth_naming = {name: seconds for name, seconds in waits.items() if seconds >= SHORTEST_WAIT * step}
    return f"{lane.value} waits: " + (
        ", ".join(f"{seconds:.3g} s for {name}" for name, seconds in worth_naming.items()) or "never"
    )
