"""From text files to batches of packed token blocks."""

from lomo_ds.data.loader import MicroBatches, Position, TrainingSteps, evaluation_batches
from lomo_ds.data.packing import PackedBlocks
from lomo_ds.data.tokens import tokenize_file

__all__ = ["MicroBatches", "PackedBlocks", "Position", "TrainingSteps", "evaluation_batches", "tokenize_file"]
