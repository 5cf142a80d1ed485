"""The chat template and the end token of a tokenizer, and where generation stops."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lomo_ds.errors import ModelError
from lomo_ds.models import add_stop_token, set_chat_template, set_eos_token
from lomo_ds.models.chat_template import SHIPPED
from tests.data.tokenizers import byte_level
from tests.reference import tiny_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.mark.parametrize("name", ["alpaca", "chatml"])
def test_a_shipped_template(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    set_chat_template(tokenizer, name)
    assert tokenizer.chat_template == (SHIPPED / f"{name}.jinja").read_text()


def test_the_tokenizers_own_template_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    set_chat_template(tokenizer, None)
    assert "### Instruction" in tokenizer.chat_template, "one without a template gets alpaca's"
    tokenizer.chat_template = "own"
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == "own"


def test_a_template_of_a_file_or_of_another_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("{{ 'é' }}")
    set_chat_template(tokenizer, str(tmp_path / "a.jinja"))
    assert tokenizer.chat_template == "{{ 'é' }}"
    tokenizer.save_pretrained(tmp_path / "other")
    other = byte_level()
    set_chat_template(other, str(tmp_path / "other"))
    assert other.chat_template == "{{ 'é' }}"


def test_templates_that_cannot_be_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere cannot be read: No such file.*or one of alpaca, chatml$"):
        set_chat_template(tokenizer, "nowhere")
    (tmp_path / "a.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"a\.jinja cannot be read: .*invalid start byte"):
        set_chat_template(tokenizer, str(tmp_path / "a.jinja"))
    tokenizer.save_pretrained(tmp_path / "without")
    with pytest.raises(ModelError, match="without is a tokenizer without a chat template"):
        set_chat_template(tokenizer, str(tmp_path / "without"))


def test_chatml_needs_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["<|im_end|>"])
    with pytest.raises(ModelError, match=r"chatml needs the tokens <\|im_start\|>, .*; add --new_special_tokens '"):
        set_chat_template(tokenizer, "chatml")


def test_another_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    set_eos_token(tokenizer, "<s>")
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<s>")
    with pytest.raises(ModelError, match=r"--eos_token <end> is not a token of the tokenizer; add it with"):
        set_eos_token(tokenizer, "<end>")


@pytest.mark.parametrize(("before", "after"), [(None, 7), (2, [7, 2]), ([2, 3], [7, 2, 3]), (7, 7), ([2, 7], [2, 7])])
def test_generation_stops_at_the_end_of_an_answer_too(before: int | list[int] | None, after: int | list[int]) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=before)
    add_stop_token(model, 7)
    assert model.generation_config.eos_token_id == after


def test_a_wheel_holds_the_templates() -> None:
    root = SHIPPED.parent.parent
    assert '"chat_templates/*.jinja"' in (root / "setup.py").read_text()
    assert json.dumps(sorted(file.stem for file in SHIPPED.glob("*.jinja"))) == '["alpaca", "chatml"]'
