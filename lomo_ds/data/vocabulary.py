"""Checks that a model's embedding has a row for every token of a dataset, and that few tokens are unknown."""

import logging

import numpy as np
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.chunked_tokenization import TokenArray
from lomo_ds.data.formats import Tokens
from lomo_ds.data.rows import RowSource
from lomo_ds.data.samples import RowCounts, Samples, read_samples
from lomo_ds.data.tokens import TokenizationOptions
from lomo_ds.errors import DataError, one_line

SAMPLED = 2**20  # number of tokens from which the share of unknown tokens is estimated

logger = logging.getLogger(__name__)


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest token id of ``tokenizer``; ids may have gaps, so its length is no substitute."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_token_ids(
    samples: Samples, source: RowSource, tokenizer: PreTrainedTokenizerBase, rows: int, options: TokenizationOptions
) -> None:
    """Check that an embedding of ``rows`` rows has one for each token and label of ``samples``, those of ``source``.

    Raises:
        DataError: a token has no row; the message names the first one and the row of the data that it is in.
    """
    if highest_id(tokenizer) < rows and not samples.are(Tokens).any():
        return  # without reading all tokens
    if max(samples.ids.max(), samples.labels.max()) < rows:
        return
    for location, _, labelled in read_samples(source, tokenizer, options, RowCounts()):
        for numbers in labelled:
            _check_ids(numbers, location, tokenizer, rows)


def check_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that ``prompt`` has tokens and that an embedding of ``rows`` rows has one for each of them.

    Raises:
        DataError: the tokenizer fails or gives no token, or a token has no row.
    """
    try:
        ids = np.asarray(tokenizer(prompt)["input_ids"], dtype=np.int32)
    except Exception as error:
        raise DataError(f"the tokenizer fails at --sample_prompt: {one_line(error)}") from error
    if not len(ids):
        raise DataError("--sample_prompt must hold at least one token for the model to continue, got none")
    _check_ids(ids, "--sample_prompt", tokenizer, rows)


def _check_ids(ids: TokenArray, location: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    without_row = ids[ids >= rows]
    if len(without_row):
        number = int(without_row[0])
        raise DataError(
            f"{location} has the token {tokenizer.convert_ids_to_tokens(number)!r}, number {number}, but the model's "
            f"embedding has {rows} rows, the last for number {rows - 1}; add rows with --resize_embeddings, remove the "
            "token from the text, or give the model's own tokenizer with --tokenizer_name"
        )


def warn_about_unknown_tokens(tokens: TokenArray, source: RowSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log a warning if most of ``tokens`` are the unknown token, from which a model learns little."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    share = float(np.mean(tokens[:SAMPLED] == unknown))
    if share > 0.5:
        logger.warning(
            "%.0f%% of the tokens of %s are %s, the unknown token: the tokenizer is not made for such text",
            100 * share, source, tokenizer.unk_token,
        )  # fmt: skip
