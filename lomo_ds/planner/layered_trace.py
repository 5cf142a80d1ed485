"""Lets the micro-batches of a step run layer by layer while a trace is recorded, as layered accumulation does.

All rows of the step pass through the model, so tensors of the whole step have their size. Micro-batches are alike and
leave nothing behind, so a few of them stand for all: their operations are counted as often as there are micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

from transformers import PreTrainedModel

from lomo_ds.models.layered import MicroBatch, layered
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.trace_recorder import TraceRecorder

TRACED_MICRO_BATCHES = 2  # of which the second finds the gradients of the first


def repetitions(settings: Settings) -> Fraction:
    """Return the number of micro-batches that each traced one stands for."""
    return Fraction(settings.joined, len(_traced(settings)))


@contextmanager
def joined_micro_batches(model: PreTrainedModel, settings: Settings, recorder: TraceRecorder) -> Iterator[None]:
    """Let a batch of all rows of ``settings`` pass through ``model``; its gradients are added up for each layer."""
    if settings.joined == 1:
        yield
        return
    with layered(model, _traced(settings), lambda traced: recorder.summed(settings.joined, traced)):
        yield


def _traced(settings: Settings) -> list[MicroBatch]:
    rows = settings.batch
    count = min(settings.joined, TRACED_MICRO_BATCHES)
    return [MicroBatch(number * rows, (number + 1) * rows, settings.sequence) for number in range(count)]
