"""Tokens of a conversation, rendered by the tokenizer's chat template, and which of them are answers."""

import re
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.formats import Chat
from lomo_ds.errors import DataError, one_line

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # begins an answer in a chat template
MessageRange = tuple[int, int]  # the first message of an answer, and the first after it


def chat_tokens(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, answers: list[MessageRange] | None
) -> tuple[list[int], list[bool]]:
    """Return the token ids of ``chat``, and whether each is trained.

    The assistant's messages are what the template's ``{% generation %}`` encloses. Without it, and for other answers,
    an answer begins where the prompt before it ends, rendered with the generation prompt, and ends where the messages
    up to it end.

    Args:
        answers: the messages to train on; None for all tokens.

    Raises:
        DataError: the template cannot render the messages, or it renders them differently when others follow.
    """
    if answers is None:
        ids = _render(chat, len(chat.messages), tokenizer, tokenize=True)["input_ids"]
        return ids, [True] * len(ids)
    if answers == assistant_messages(chat) and tokenizer.is_fast and _has_generation_markers(chat, tokenizer):
        rendered = _render(chat, len(chat.messages), tokenizer, tokenize=True, return_assistant_tokens_mask=True)
        return rendered["input_ids"], [bool(is_answer) for is_answer in rendered["assistant_masks"]]
    text = _render(chat, len(chat.messages), tokenizer)
    spans = [_answer_span(chat, first, last, text, tokenizer) for first, last in answers]
    return tokens_within(text, spans, tokenizer)


def assistant_messages(chat: Chat) -> list[MessageRange]:
    """Return the assistant's messages of ``chat``, each an answer."""
    return [(k, k + 1) for k, message in enumerate(chat.messages) if message["role"] == "assistant"]


def tokens_within(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> tuple[list[int], list[bool]]:
    """Return the token ids of ``text``, and whether each is in one of ``spans``, which are ranges of characters.

    A token that lies across the beginning of a span is in it; one that the tokenizer adds around the text is in none.

    Args:
        options: arguments of the tokenizer.
    """
    options = {"add_special_tokens": False, "verbose": False} | options
    if not tokenizer.is_fast:  # it does not say which characters a token is made of
        return _tokens_by_prefixes(text, spans, tokenizer, options)
    tokenized = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)
    starts, stops = np.asarray(tokenized["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    trained = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        trained |= ((stops > begin) | (starts >= begin)) & (starts < end)
    trained &= ~np.asarray(tokenized["special_tokens_mask"], dtype=bool)
    return tokenized["input_ids"], trained.tolist()


def _has_generation_markers(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template for ``chat`` says which parts of a conversation are answers."""
    return bool(MARKER.search(tokenizer.get_chat_template(tools=chat.tools)))


def _answer_span(chat: Chat, first: int, last: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the range of characters in ``text``, the whole conversation, of the messages ``first`` to ``last``."""
    until = text if last == len(chat.messages) else _render(chat, last, tokenizer)
    before = _render(chat, first, tokenizer, add_generation_prompt=True) if first else _opening(chat, text, tokenizer)
    if not (before and text.startswith(until) and until.startswith(before)):
        raise DataError(
            "the tokenizer's chat template renders messages differently when others follow, so where an answer begins "
            "and ends is unknown; give a template that marks answers with {% generation %} with --chat_template_path, "
            "or train on whole conversations with --train_on_prompt"
        )
    return len(before), len(until)


def _opening(chat: Chat, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what precedes a first message of the assistant, since most templates render no empty conversation.

    It ends with the generation prompt; empty if that is unknown.
    """
    message, prompted = _render(chat, 1, tokenizer), _render(chat, 1, tokenizer, add_generation_prompt=True)
    prompt = prompted.removeprefix(message) if prompted.startswith(message) else ""
    return text[: text.index(prompt) + len(prompt)] if prompt and prompt in text else ""


def _render(chat: Chat, count: int, tokenizer: PreTrainedTokenizerBase, tokenize: bool = False, **options: Any) -> Any:
    """Render the first ``count`` messages as text, or as a dict of tokens."""
    try:
        return tokenizer.apply_chat_template(
            chat.messages[:count],
            tools=chat.tools,
            tokenize=tokenize,
            return_dict=tokenize,
            **options,
            **chat.template_arguments,
        )
    except Exception as error:  # templates raise jinja2's errors, and TypeError and others of their expressions
        raise DataError(f"the tokenizer's chat template cannot render the messages: {one_line(error)}") from error


def _tokens_by_prefixes(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> tuple[list[int], list[bool]]:
    ids = tokenizer(text, **options)["input_ids"]
    trained = [False] * len(ids)
    for begin, end in spans:
        first, last = (_common_prefix(ids, tokenizer(text[:place], **options)["input_ids"]) for place in (begin, end))
        trained[first:last] = [True] * (last - first)
    return ids, trained


def _common_prefix(ids: list[int], others: list[int]) -> int:
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (number, other) in pairs if number != other), min(len(ids), len(others)))
