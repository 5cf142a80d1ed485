"""Memory of the update rule on one rank: its state, its temporaries, and the gradient shards that wait for its sums."""

from lomo_ds.numerics import apply
from lomo_ds.numerics.square_sums import program_count
from lomo_ds.numerics.values import piece_numel_on
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.trace_events import StepTrace
from lomo_ds.update.rule_states import state_bytes
from lomo_ds.update.rules import RULES
from lomo_ds.update.target import Target

FP32 = 4


class RuleMemory:
    """Bytes of the rule that ``settings`` name, on the first rank, whose slices are the largest.

    Args:
        device_type: ``gpu`` or ``cpu``, where the ranks compute.

    Attributes:
        sums: number of times that gradient shards wait for a sum over the ranks; 0 on one rank.
    """

    def __init__(self, trace: StepTrace, settings: Settings, device_type: str) -> None:
        self.rule = RULES[settings.optimizer]()
        self.trace, self.settings, self.device_type = trace, settings, device_type
        self.sums = self.rule.sums_over_ranks if settings.gpus > 1 else 0

    def state(self) -> int:
        """Return the bytes of the state of all parameters."""
        targets = [
            Target(name, shape, 0, self.settings.shard_numel(shape.numel()), 0, {})
            for name, shape in zip(self.trace.names, self.trace.shapes, strict=True)
        ]
        return sum(state_bytes(target, self.rule.state(target), self.settings.gpus) for target in targets)

    def square_sums(self) -> int:
        """Return the bytes of the sums of squares that kernels write as they update; 0 if they write none."""
        if self.device_type == "cpu" or not self.rule.follows_gradient:
            return 0
        return FP32 * sum(program_count(self.settings.shard_numel(numel)) for numel in self.trace.numels)

    def temporaries(self, numels: list[int]) -> int:
        """Return the bytes that updates of shards of ``numels`` elements allocate.

        Floats that follow their gradient are updated together, all others one after the other, in pieces.
        """
        alone = self.settings.int8_weights or not self.rule.follows_gradient
        numel = max(numels) if alone else sum(numels)
        piece = min(numel, piece_numel_on(self.device_type))
        applied = apply.temporary_bytes(numel, self.settings.dtype, self.device_type)
        if self.rule.follows_gradient:
            return applied
        return max(self.rule.bytes_per_element * piece, FP32 * piece + applied)  # statistics, then the direction
