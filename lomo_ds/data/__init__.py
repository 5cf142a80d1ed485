"""The data pipeline: from text files to batches of packed token blocks."""

from lomo_ds.data.loader import MicroBatches, Position, TrainingSteps, evaluation_batches
from lomo_ds.data.packing import PackedBlocks
from lomo_ds.data.tokens import tokenize_file
from lomo_ds.data.vocabulary import (
    check_prompt,
    check_token_ids,
    highest_id,
    warn_about_unknown_tokens,
)

__all__ = [
    "MicroBatches",
    "PackedBlocks",
    "Position",
    "TrainingSteps",
    "check_prompt",
    "check_token_ids",
    "evaluation_batches",
    "highest_id",
    "tokenize_file",
    "warn_about_unknown_tokens",
]
