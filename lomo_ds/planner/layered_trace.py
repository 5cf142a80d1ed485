"""Lets the micro-batches of a step run layer by layer while a trace is recorded, as layered accumulation does.

All rows of the step pass through the model, so tensors of the whole step have their size. Micro-batches are alike and
leave nothing behind, so a few of them stand for all: the operations of one count for all that are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from lomo_ds.models.layered import MicroBatch, layered
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.trace_recorder import TraceRecorder

# The first whose gradients arrive, the last, with which their sums are complete, and one that stands for all others
TRACED_MICRO_BATCHES = 3


@dataclass(frozen=True)
class _TracedMicroBatch(MicroBatch):
    """A micro-batch whose operations count ``count`` times; the layers ask for its rows before they run it."""

    recorder: TraceRecorder
    count: int

    def of(self, values: Tensor) -> Tensor:
        self.recorder.counted = self.count
        return super().of(values)


@contextmanager
def joined_micro_batches(model: PreTrainedModel, settings: Settings, recorder: TraceRecorder) -> Iterator[None]:
    """Let a batch of all rows of ``settings`` pass through ``model``; its gradients are added up for each layer."""
    if settings.joined == 1:
        yield
        return
    with layered(model, _traced(settings, recorder), lambda traced: recorder.summed(settings.joined, traced)):
        yield


def _traced(settings: Settings, recorder: TraceRecorder) -> list[MicroBatch]:
    rows, count = settings.batch, min(settings.joined, TRACED_MICRO_BATCHES)
    counts = [1] * count
    counts[count // 2] += settings.joined - count
    return [
        _TracedMicroBatch(number * rows, (number + 1) * rows, settings.sequence, recorder, times)
        for number, times in enumerate(counts)
    ]
