"""Tokenization of examples: the ids of each, and the labels of the tokens that are trained."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.chat_tokens import MessageRange, assistant_messages, chat_tokens, tokens_within
from lomo_ds.data.chunked_tokenization import TokenArray, token_ids
from lomo_ds.data.formats import IGNORE_INDEX, TEXT_FIELD, Chat, Completion, Example, Format, Text, Tokens
from lomo_ds.errors import DataError

NAMES: dict[type, str] = {Text: "a plain text", Completion: "a prompt and its completion"}
Labelled = tuple[TokenArray, TokenArray]  # ids, and the label of each token itself


@dataclass(frozen=True)
class TokenizationOptions:
    """Options that decide the tokens and labels of a dataset, beside its rows and the tokenizer.

    Attributes:
        dataset_format: the format of every file; None detects it for each.
        text_field: the column of a plain text.
        completion_only_loss: whether only the completion after a prompt is trained.
        assistant_only_loss: whether only the assistant's messages are trained; None where no prompt is given.
        on_bad_rows: whether a malformed row is an error, or skipped and counted.
    """

    dataset_format: Format | None = None
    text_field: str = TEXT_FIELD
    completion_only_loss: bool = True
    assistant_only_loss: bool | None = None
    on_bad_rows: Literal["error", "skip"] = "error"


def tokenize_example(example: Example, tokenizer: PreTrainedTokenizerBase, options: TokenizationOptions) -> Labelled:
    """Return the token ids and labels of ``example``, both int32.

    Raises:
        DataError: the chat template does not fit the messages.
    """
    if isinstance(example, Chat):
        return _labelled(*chat_tokens(example, tokenizer, _answers(example, options)))
    if options.assistant_only_loss and not isinstance(example, Tokens):
        raise DataError(f"--assistant_only_loss needs conversations, got {NAMES[type(example)]}; leave it out")
    if isinstance(example, Text):
        ids = _with_marks(token_ids(example.text, tokenizer), tokenizer)
        return ids, ids
    if isinstance(example, Completion):
        return _completion_tokens(example, tokenizer, options.completion_only_loss)
    return np.asarray(example.ids, dtype=np.int32), np.asarray(example.labels, dtype=np.int32)


def _answers(chat: Chat, options: TokenizationOptions) -> list[MessageRange] | None:
    """Return the messages of ``chat`` to train on, None for all; a ``weight`` of 0 leaves one out, as at OpenAI."""
    assistant = [answer for answer in assistant_messages(chat) if chat.messages[answer[0]].get("weight") != 0]
    prompt = chat.prompt_length
    if prompt is None:
        return None if options.assistant_only_loss is False else assistant
    if options.assistant_only_loss:
        return [answer for answer in assistant if answer[0] >= prompt or not options.completion_only_loss]
    return [(prompt, len(chat.messages))] if options.completion_only_loss else None


def _with_marks(ids: TokenArray, tokenizer: PreTrainedTokenizerBase) -> TokenArray:
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin, end = (np.asarray([] if mark is None else [mark], dtype=np.int32) for mark in marks)
    return np.concatenate([begin, ids, end])


def _completion_tokens(example: Completion, tokenizer: PreTrainedTokenizerBase, only_completion: bool) -> Labelled:
    """Return the tokens of a prompt and its completion, which ends with the end token."""
    text, end = example.prompt + example.completion, tokenizer.eos_token_id
    ids, trained = tokens_within(text, [(len(example.prompt), len(text))], tokenizer, add_special_tokens=True)
    if end is not None and ids[-1:] == [end]:
        trained[-1] = True  # it may have been added by the tokenizer, as a token of no characters
    elif end is not None:
        ids, trained = [*ids, end], [*trained, True]
    return _labelled(ids, trained if only_completion else [True] * len(ids))


def _labelled(ids: list[int], trained: list[bool]) -> Labelled:
    array = np.asarray(ids, dtype=np.int32)
    return array, np.where(np.asarray(trained, dtype=bool), array, IGNORE_INDEX).astype(np.int32)
