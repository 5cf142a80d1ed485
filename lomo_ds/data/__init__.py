"""The data pipeline: from rows of files to batches of training sequences.

A source is read row by row (``rows``), each row is an example (``formats``) of tokens and labels (``tokens``), and
samples are packed into sequences (``packing``) that ranks and steps share (``loader``).
"""

from lomo_ds.data.end_tokens import end_tokens
from lomo_ds.data.formats import IGNORE_INDEX, Chat, Format, Text
from lomo_ds.data.loader import MicroBatches, Position, TrainingSteps, evaluation_batches
from lomo_ds.data.packing import SIDE_BY_SIDE, Strategy
from lomo_ds.data.rows import RowSource
from lomo_ds.data.samples import Samples, load_samples, needs_chat_template
from lomo_ds.data.sequences import Mixture, PackedSequences, Sequences
from lomo_ds.data.tokens import TokenizationOptions
from lomo_ds.data.vocabulary import (
    check_prompt,
    check_token_ids,
    highest_id,
    warn_about_unknown_tokens,
)

__all__ = [
    "IGNORE_INDEX",
    "SIDE_BY_SIDE",
    "Chat",
    "Format",
    "MicroBatches",
    "Mixture",
    "PackedSequences",
    "Position",
    "RowSource",
    "Samples",
    "Sequences",
    "Strategy",
    "Text",
    "TokenizationOptions",
    "TrainingSteps",
    "check_prompt",
    "check_token_ids",
    "end_tokens",
    "evaluation_batches",
    "highest_id",
    "load_samples",
    "needs_chat_template",
    "warn_about_unknown_tokens",
]
