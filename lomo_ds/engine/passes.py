"""The forward and backward passes of one step, as update schedules ask an engine for them."""

from torch import Tensor

from lomo_ds.checkpoint.random_states import RandomStates
from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.engine.base import TokenAveragingEngine
from lomo_ds.engine.optimizer import LomoOptimizer
from lomo_ds.engine.step_batch import StepBatch


class EnginePasses:
    """Implements ``StepPasses`` for one step of an engine."""

    def __init__(self, engine: TokenAveragingEngine, optimizer: LomoOptimizer, step_batch: StepBatch) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.step_batch = step_batch
        self.random_states: RandomStates | None = None

    def backward(self, repeatable: bool = False) -> bool:
        """Implement ``StepPasses.backward``."""
        if repeatable:
            self.random_states = RandomStates.capture()
        return self._accept(self.engine.backward_all(self.step_batch))

    def forward(self) -> Tensor | None:
        """Implement ``StepPasses.forward``."""
        loss = self.engine.forward_all(self.step_batch)
        return all_reduce_sum(loss.clone(), self.engine.seq_data_parallel_group) if self._accept(loss) else None

    def reduce_norms(self) -> list[float] | None:
        """Implement ``StepPasses.reduce_norms``."""
        coefficients = self.optimizer.reduce_norms_and_loss()
        return coefficients if self.optimizer.skip_reason is None else None

    def repeat(self) -> None:
        """Implement ``StepPasses.repeat``."""
        assert self.random_states is not None
        self.random_states.restore()  # so that dropout draws the same masks
        self.engine.backward_all(self.step_batch)

    def _accept(self, local_loss: Tensor) -> bool:
        """Record the step's loss, of which this rank has a part; return False if the step must be skipped."""
        if self.step_batch.skip_reason is not None:
            self.optimizer.skip_step(self.step_batch.skip_reason, self.step_batch.counts_as_overflow)
            return False
        self.optimizer.set_loss(local_loss)
        return True
