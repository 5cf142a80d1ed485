"""Tests of which tokens of a conversation are trained, by templates of several kinds."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lomo_ds.data.chat_tokens import assistant_messages, chat_tokens, tokens_within
from lomo_ds.data.formats import IGNORE_INDEX, Chat
from lomo_ds.data.tokens import TokenizationOptions, tokenize_example
from lomo_ds.errors import DataError
from lomo_ds.models.chat_template import SHIPPED
from tests.data.tokenizers import KINDS, Letters, byte_level

SHIPPED_TEMPLATES = {file.stem: file.read_text() for file in SHIPPED.glob("*.jinja")}
# like Qwen3's, it drops what was thought in all answers but the last
FORGETFUL = """{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- if message.role == 'assistant' and loop.last %}{{- 'thinking ' }}{%- endif %}
    {{- message.content + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""
PICKY = "{{ raise_exception('roles must alternate') }}"


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str) -> Chat:
    """Return a conversation of user and assistant in turns."""
    roles = ["user", "assistant"] * len(contents)
    return Chat([{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)])


def trained_text(conversation: Chat, tokenizer: Any) -> str:
    ids, trained = chat_tokens(conversation, tokenizer, assistant_messages(conversation))
    return tokenizer.decode([number for number, is_trained in zip(ids, trained, strict=True) if is_trained])


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_shipped_templates_give_the_same_mask_by_markers_and_by_prefixes(name: str) -> None:
    template = SHIPPED_TEMPLATES[name]
    unmarked = template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "the fox"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "dog"},
        {"role": "assistant", "content": " two\n\n"},
        {"role": "user", "content": "three"},
    ]
    for tools in (None, [call]):
        conversation = Chat(messages, tools)
        answers = assistant_messages(conversation)
        marked = chat_tokens(conversation, tokenizer_with(template), answers)
        assert marked == chat_tokens(conversation, tokenizer_with(unmarked), answers)
        text = tokenizer_with(template).decode(marked[0])
        assert ("x" in text, "the fox" in text, "dog" in text) == (True, True, True)
        assert trained_text(conversation, tokenizer_with(template)).count('"é"') == 2, "both calls are trained"


def test_the_alpaca_template_is_alpacas_prompt() -> None:
    tokenizer = tokenizer_with(SHIPPED_TEMPLATES["alpaca"])
    ids, _ = chat_tokens(chat("Say no.", "No."), tokenizer, None)
    assert tokenizer.decode(ids) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay no.\n\n### Response:\nNo.</s>"
    )


def test_some_answers_of_a_conversation() -> None:
    tokenizer = tokenizer_with(SHIPPED_TEMPLATES["chatml"])
    conversation = chat("a", "b", "c", "d")
    assert trained_text(conversation, tokenizer) == "b<|im_end|>\nd<|im_end|>\n"
    for answer, text in ((1, 3), "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"), ((3, 4), "d<|im_end|>\n"):
        ids, trained = chat_tokens(conversation, tokenizer, [answer])
        assert tokenizer.decode([number for number, is_trained in zip(ids, trained, strict=True) if is_trained]) == text


def test_messages_of_weight_0_are_not_trained() -> None:
    """OpenAI's format has a weight of 0 or 1 for each message of the assistant."""
    tokenizer = tokenizer_with(SHIPPED_TEMPLATES["chatml"])
    conversation = chat("a", "b", "c", "d")
    conversation.messages[1]["weight"], conversation.messages[3]["weight"] = 0, 1
    _, labels = tokenize_example(conversation, tokenizer, TokenizationOptions())
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "d<|im_end|>\n"


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_arguments_of_calls_may_be_json(name: str) -> None:
    """OpenAI's client gives them to the exported template so, while a dataset's are objects."""
    texts = set()
    for arguments in ({"x": [1, 2]}, '{"x": [1, 2]}'):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        conversation = chat("a", "b")
        conversation.messages[1]["tool_calls"] = [call]
        texts.add(trained_text(conversation, tokenizer_with(SHIPPED_TEMPLATES[name])))
    assert len(texts) == 1
    assert '{"name": "f", "arguments": {"x": [1, 2]}}' in texts.pop()


def test_a_template_that_changes_earlier_messages_is_refused() -> None:
    assert trained_text(chat("a", "b"), tokenizer_with(FORGETFUL)) == "thinking b</s>"
    with pytest.raises(DataError, match=r"renders messages differently when others follow.*--chat_template_path"):
        trained_text(chat("a", "b", "c", "d"), tokenizer_with(FORGETFUL))
    ids, trained = chat_tokens(chat("a", "b", "c", "d"), tokenizer_with(FORGETFUL), None)
    assert trained == [True] * len(ids)


SYSTEM_FIRST = """{%- if not messages %}{{ raise_exception('empty') }}{%- endif %}
{{- '<system>be kind</s>' }}""" + FORGETFUL.replace("'thinking '", "''")


def test_a_conversation_may_begin_with_the_assistant() -> None:
    """Most templates render no empty conversation, which the prompt of such an answer would be."""
    assert trained_text(Chat(chat("a", "b", "c").messages[1:]), tokenizer_with(SYSTEM_FIRST)) == "b</s>"
    for template in SHIPPED_TEMPLATES.values():
        unmarked = template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
        conversation = Chat(chat("a", "b", "c", "d").messages[1:])
        texts = {trained_text(conversation, tokenizer_with(kind)) for kind in (template, unmarked)}
        assert len(texts) == 1


def test_templates_by_name() -> None:
    """Check that markers are looked for in the template that is used, which may be another one for tools."""
    plain = SHIPPED_TEMPLATES["chatml"].replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    tokenizer: Any = tokenizer_with("")
    tokenizer.chat_template = {"default": SHIPPED_TEMPLATES["chatml"], "tool_use": plain}
    conversation = Chat(chat("a", "b").messages, [{"type": "function", "function": {"name": "f"}}])
    assert trained_text(conversation, tokenizer) == "b<|im_end|>\n"


def test_a_template_that_refuses_messages() -> None:
    with pytest.raises(DataError, match=r"cannot render the messages: roles must alternate"):
        trained_text(chat("a", "b"), tokenizer_with(PICKY))


@pytest.mark.parametrize("kind", KINDS)
def test_a_span_has_the_tokens_of_its_words(kind: str) -> None:
    tokenizer, text = KINDS[kind](), "the quick brown fox jumps over the lazy dog"
    begin, end = text.index("brown"), text.index(" over")
    ids, trained = tokens_within(text, [(begin, end)], tokenizer)
    inside = [number for number, is_trained in zip(ids, trained, strict=True) if is_trained]
    words = "".join(tokenizer.convert_ids_to_tokens(inside)).replace("\u0120", "").replace("\u2581", "")
    assert "brownfoxjumps" in words
    assert "the" not in words, "a token across the beginning is in the span, but no token before it"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_does_not_say_where_its_tokens_are() -> None:
    letters: Any = Letters()
    ids, trained = tokens_within("abcdef", [(1, 3), (5, 6)], letters)
    assert (ids, trained) == ([*map(ord, "abcdef")], [False, True, True, False, False, True])
