"""The tokens that end samples, at which generation stops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lomo_ds.data import end_tokens
from tests.data.datasets import load, write_jsonl
from tests.data.tokenizers import byte_level

UNENDED = "{% for message in messages %}{{ message.content }}{% endfor %}"
ENDED = UNENDED.replace("}}", "+ '</s> \\n' }}")
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
QUESTION = {"messages": [{"role": "user", "content": "a"}]}
TOKENS = {"input_ids": [9, 10, 11]}


@pytest.mark.parametrize(
    ("template", "rows", "tokens"),
    [
        (ENDED, [CHAT], ["</s>"]),
        (UNENDED, [CHAT], [None]),
        (ENDED, [QUESTION, CHAT, CHAT], ["</s>"]),
        (ENDED, [QUESTION], []),
        ("", [{"prompt": "a", "completion": "b"}], ["</s>"]),
        ("", [{"text": "a"}], ["</s>"]),
        ("", [TOKENS, {"input_ids": [9, 0]}], [None, "<s>"]),
    ],
)
def test_the_tokens_that_end_samples(tmp_path: Path, template: str, rows: list[Any], tokens: list[str | None]) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    samples = load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    ends = end_tokens(samples, np.arange(len(samples)), tokenizer)
    assert ends == [token and tokenizer.convert_tokens_to_ids(token) for token in tokens]
