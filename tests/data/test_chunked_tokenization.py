"""Tests that a long document tokenized in chunks has the same tokens as when tokenized at once."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lomo_ds.data import chunked_tokenization
from lomo_ds.data.chunked_tokenization import token_ids
from tests.data.tokenizers import KINDS, Letters


def at_once(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_tokenization, "CHUNK", 301)
    monkeypatch.setattr(chunked_tokenization, "OVERLAP", 120)


words = st.sampled_from(
    ["the", "fox", "quick", " ", "  ", "\n", "\n\n", ", ", "été", "中文", "\U0001f600", "12345", "x"]
)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_chunks_of_any_text_give_the_same_tokens(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()

    @settings(max_examples=25, deadline=None)
    @given(st.lists(words, min_size=20, max_size=60), st.integers(1, 30), st.randoms(use_true_random=False))
    def check(drawn: list[str], times: int, chance: random.Random) -> None:
        text = "".join(chance.choice(drawn) for _ in range(40 * times))
        assert token_ids(text, tokenizer).tolist() == at_once(text, tokenizer)

    check()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_long_text_is_chunked_and_no_cut_adds_a_space(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    text = "the quick brown fox\njumps over the lazy dog\n" * 99
    parts = chunked_tokenization._tokenize_in_chunks(text, tokenizer)
    assert parts is not None
    assert len(parts) > 10
    assert np.concatenate(parts).tolist() == at_once(text, tokenizer)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_without_a_common_token_are_not_joined() -> None:
    """Check the fallback with digits, which are grouped by threes from the left, so differently in each chunk."""
    numbers = Tokenizer(models.WordLevel({"111": 0, "11": 1, "1": 2}, unk_token="1"))
    numbers.pre_tokenizer = pre_tokenizers.Split(Regex("1{1,3}"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=numbers)
    text = "1" * 1001
    assert chunked_tokenization._tokenize_in_chunks(text, tokenizer) is None
    assert token_ids(text, tokenizer).tolist() == [0] * 333 + [1]


@pytest.mark.usefixtures("small_chunks")
def test_a_slow_tokenizer_gets_the_entire_document() -> None:
    tokenizer: Any = Letters()
    assert token_ids("text " * 300, tokenizer).tolist() == [ord(letter) for letter in "text " * 300]
    assert tokenizer.calls == 1


@pytest.mark.parametrize("folder", ["stories260K", "llama_tokenizer"])
def test_shakespeare_with_and_without_line_breaks(assets: Path, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / folder)
    text = (assets / "text/tinyshakespeare_train.txt").read_text()[:200_000]
    for document in (text, text.replace("\n", " ")):
        assert len(chunked_tokenization._tokenize_in_chunks(document, tokenizer) or []) > 2
        assert token_ids(document, tokenizer).tolist() == at_once(document, tokenizer)
