"""From text files to batches of packed token blocks."""

from lomo_ds.data.loader import MicroBatches, Position, TrainingSteps, evaluation_batches
from lomo_ds.data.packing import PackedBlocks
from lomo_ds.data.tokens import tokenize_file
from lomo_ds.data.vocabulary import (
    highest_id,
    refuse_unknown_rows,
    refuse_unknown_rows_of_prompt,
    warn_of_unknown_tokens,
)

__all__ = [
    "MicroBatches",
    "PackedBlocks",
    "Position",
    "TrainingSteps",
    "evaluation_batches",
    "highest_id",
    "refuse_unknown_rows",
    "refuse_unknown_rows_of_prompt",
    "tokenize_file",
    "warn_of_unknown_tokens",
]
