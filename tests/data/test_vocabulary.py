"""Tests of tokens without an embedding row, and of texts with mostly unknown tokens."""

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lomo_ds.data import (
    TokenizationOptions,
    check_prompt,
    check_token_ids,
    highest_id,
    warn_about_unknown_tokens,
)
from lomo_ds.errors import DataError
from tests.data.datasets import load, source, write_jsonl
from tests.data.tokenizers import Letters, byte_level


@pytest.fixture
def padded() -> tuple[PreTrainedTokenizerFast, int]:
    """Return a tokenizer with a <pad> token beyond the embedding (like CodeLlama's), and the number of rows."""
    tokenizer = byte_level()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer, rows


def check(file: Path, tokenizer: Any, rows: int) -> None:
    for _ in range(2):  # first from the file, then from the cache
        check_token_ids(load(file, tokenizer), source(file), tokenizer, rows, TokenizationOptions())


def test_the_tokenizer_may_have_a_token_without_a_row(tmp_path: Path, padded: tuple[Any, int]) -> None:
    (tmp_path / "a.txt").write_text("the fox")
    check(tmp_path / "a.txt", *padded)
    check_prompt("the fox", *padded)


def test_a_text_must_not_have_a_token_without_a_row(tmp_path: Path, padded: tuple[Any, int]) -> None:
    tokenizer, rows = padded
    (tmp_path / "a.jsonl").write_text('{"text": "the"}\n{"text": "fox"}\n{"text": "a <pad>"}\n{"text": "<pad>"}\n')
    message = f"has the token '<pad>', number {rows}, .* has {rows} rows.* --resize_embeddings"
    with pytest.raises(DataError, match=rf"^.*a\.jsonl line 3 {message}"):
        check(tmp_path / "a.jsonl", tokenizer, rows)
    with pytest.raises(DataError, match=f"^--sample_prompt {message}"):
        check_prompt("<pad>", tokenizer, rows)
    check(tmp_path / "a.jsonl", tokenizer, rows + 1)


@pytest.mark.parametrize("row", [{"input_ids": [5, 999]}, {"input_ids": [5, 6], "labels": [5, 999]}])
def test_tokenized_rows_must_not_have_an_id_without_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    """Check them even if the tokenizer has no token without a row, since another one may have made them."""
    tokenizer = byte_level()
    with pytest.raises(DataError, match=r"^.*a\.jsonl line 1 has the token None, number 999"):
        check(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, len(tokenizer))


def test_ids_with_a_gap(tmp_path: Path) -> None:
    """Check that an id beyond the embedding is found even if the tokenizer has fewer tokens than rows."""

    class Gap(Letters):
        def get_vocab(self) -> dict[str, int]:
            return {"a": ord("a"), "\u02bd": 701}

    gap: Any = Gap()
    assert highest_id(gap) == 701
    (tmp_path / "a.txt").write_text("abc")
    check(tmp_path / "a.txt", gap, 512)
    (tmp_path / "b.txt").write_text("ab\u02bd")
    with pytest.raises(DataError, match="number 701"):
        check(tmp_path / "b.txt", gap, 512)


def test_a_text_without_any_token(tmp_path: Path) -> None:
    """Check that a single row may have no token, but not all rows: only begin and end tokens would be learned."""

    class Deaf(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return super().__call__(text.replace("x", ""))

    deaf: Any = Deaf()
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "xx"}\n{"text": "axb"}\n')
    assert load(file, deaf).ids.tolist() == [0, 1, 0, ord("a"), ord("b"), 1]
    file.write_text('{"text": "xx"}\n{"text": "xxx"}\n')
    with pytest.raises(DataError, match=r"has no token for any text in .*a\.jsonl"):
        load(file, deaf)
    with pytest.raises(DataError, match="--sample_prompt must hold at least one token"):
        check_prompt("xx", deaf, 128)


def test_ids_that_are_not_numbers(tmp_path: Path) -> None:
    """Check tokenizers in Python, which return None for unknown text if they have no unknown token."""

    class Strange(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
            return {"input_ids": [None]}

    (tmp_path / "a.txt").write_text("text")
    strange: Any = Strange()
    with pytest.raises(DataError, match=r"the tokenizer fails at .*a\.txt"):
        load(tmp_path / "a.txt", strange)
    with pytest.raises(DataError, match="fails at --sample_prompt"):
        check_prompt("text", strange, 128)


def test_a_text_of_mostly_unknown_tokens_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "fox": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    for name, text in (("known.txt", "the quick fox"), ("unknown.txt", "der schnelle the Fuchs")):
        (tmp_path / name).write_text(text)
        samples = load(tmp_path / name, tokenizer)
        with caplog.at_level(logging.WARNING, "lomo_ds"):
            warn_about_unknown_tokens(samples.ids, source(tmp_path / name), tokenizer)
    assert len(caplog.messages) == 1
    assert "75% of the tokens of " in caplog.messages[0]
    assert "unknown.txt are <unk>" in caplog.messages[0]
