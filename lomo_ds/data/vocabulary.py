"""Whether a model knows the tokens of a text: each has a row in its embedding, and most are not the unknown one."""

import logging
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.chunked_tokenization import TokenArray
from lomo_ds.data.tokens import document_ids
from lomo_ds.errors import DataError, one_line

LOOKED_AT = 2**20  # tokens that show how many of a text are unknown

logger = logging.getLogger(__name__)


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id that ``tokenizer`` has a token for; ids may have gaps, and its length says nothing of them."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_token_ids(tokens: TokenArray, path: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that a model whose embedding has ``rows`` rows has one for each of ``tokens``, which are those of ``path``.

    Raises:
        DataError: it has not; the first such token and its document are named.
    """
    if highest_id(tokenizer) < rows or not len(tokens) or tokens.max() < rows:
        return
    for number, ids in enumerate(document_ids(path, tokenizer), start=1):
        _refuse_beyond(ids, f"document {number} of {path}", tokenizer, rows)


def check_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that the model can continue ``prompt``.

    Raises:
        DataError: its tokenizer fails, gives no token, or gives one without a row.
    """
    try:
        ids = np.asarray(tokenizer(prompt)["input_ids"], dtype=np.int32)
    except Exception as error:
        raise DataError(f"the tokenizer fails at --sample_prompt: {one_line(error)}") from error
    if not len(ids):
        raise DataError("--sample_prompt must hold at least one token for the model to continue, got none")
    _refuse_beyond(ids, "--sample_prompt", tokenizer, rows)


def _refuse_beyond(ids: TokenArray, where: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    beyond = ids[ids >= rows]
    if len(beyond):
        number = int(beyond[0])
        raise DataError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(number)!r}, number {number}, and the model's "
            f"embedding has {rows} rows, the last for number {rows - 1}; add rows with --resize_embeddings, take the "
            "token out of the text, or give the model's own tokenizer with --tokenizer_name"
        )


def warn_about_unknown_tokens(tokens: TokenArray, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log that a model learns little from ``tokens``, where most of them say that the tokenizer has none."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    share = float(np.mean(tokens[:LOOKED_AT] == unknown))
    if share > 0.5:
        logger.warning(
            "%.0f%% of the tokens of %s are %s, the token of unknown text: the tokenizer is not for such text",
            100 * share, path, tokenizer.unk_token,
        )  # fmt: skip
