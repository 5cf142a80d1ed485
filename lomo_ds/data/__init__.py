"""From text files to batches of packed token blocks."""

from lomo_ds.data.loader import evaluation_batches, training_loader
from lomo_ds.data.packing import PackedBlocks
from lomo_ds.data.tokens import tokenize_file

__all__ = ["PackedBlocks", "evaluation_batches", "tokenize_file", "training_loader"]
