"""Dataset formats: detected by the columns of a file, and read into examples."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lomo_ds.data.formats.chats import alpaca_messages, parse_messages, parse_tools
from lomo_ds.data.formats.examples import IGNORE_INDEX, Chat, Completion, Example, Text, Tokens
from lomo_ds.data.formats.fields import check_unicode, column_names, integers, json_value, mapping, text
from lomo_ds.data.rows import Row
from lomo_ds.errors import DataError, did_you_mean

Format = Literal["messages", "conversations", "prompt_completion", "alpaca", "text", "tokenized"]
TEXT_FIELD = "text"
MASKS = ("attention_mask", "completion_mask", "assistant_masks")  # of tokenized rows; the last two are TRL's


def detect_format(row: Row, text_field: str = TEXT_FIELD) -> Format:
    """Return the only format whose columns ``row``, the first of its file, has.

    Args:
        text_field: the column of a plain text.

    Raises:
        DataError: it has the columns of no format or of several.
    """
    if row.values.keys() == {TEXT_FIELD}:
        return "text"  # of a .txt file, too, which has no other name for it
    matching = [name for name, columns in _columns(text_field).items() if set(columns) <= row.values.keys()]
    if len(matching) == 1:
        return matching[0]
    got = column_names(row)
    if matching:
        raise DataError(
            f"{row.location} has the columns of several formats, {' and '.join(matching)} ({got}); name one with "
            "--dataset_format"
        )
    expected = "; ".join(" and ".join(columns) for columns in _columns(text_field).values())
    raise DataError(
        f"{row.location} must have the columns of a format ({expected}), got {got}{_hint(row, text_field)}; "
        "--dataset_text_field names another column of a plain text"
    )


def _hint(row: Row, text_field: str) -> str:
    """Return the end of an error message: a column that is missing beside another one, or that is misspelt."""
    for columns in _columns(text_field).values():
        missing = [column for column in columns if column not in row.values]
        if len(missing) < len(columns):
            return f", but no {missing[0]!r}"
    known = [column for columns in _columns(text_field).values() for column in columns]
    return next((hint for column in row.values if (hint := did_you_mean(column, known))), "")


def parse_row(row: Row, name: Format, text_field: str = TEXT_FIELD) -> Example:
    """Return the example in ``row``, of the format ``name``.

    Raises:
        DataError: a column is missing or malformed; the message names the row and the column.
    """
    if name == "text":
        return Text(text(row, text_field if text_field in row.values else TEXT_FIELD))
    return _PARSERS[name](row)


def _columns(text_field: str) -> dict[Format, tuple[str, ...]]:
    return {
        "messages": ("messages",),
        "conversations": ("conversations",),
        "prompt_completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": (text_field,),
        "tokenized": ("input_ids",),
    }


def _parse_messages(row: Row) -> Chat:
    return _chat(row, parse_messages(row, "messages"))


def _parse_conversations(row: Row) -> Chat:
    return _chat(row, [*_system_message(row), *parse_messages(row, "conversations")])


def _parse_prompt_completion(row: Row) -> Chat | Completion:
    columns = [row.values.get(name) for name in ("prompt", "completion")]
    if not (any(isinstance(column, list) for column in columns) or all(map(_is_json_of_messages, columns))):
        return Completion(text(row, "prompt"), text(row, "completion"))
    prompt = parse_messages(row, "prompt")
    return _chat(row, prompt + parse_messages(row, "completion"), len(prompt))


def _is_json_of_messages(value: Any) -> bool:
    """Return whether a prompt or completion of a csv file is the JSON of messages, rather than a text."""
    parsed = json_value(value)
    return (
        isinstance(parsed, list)
        and bool(parsed)
        and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in parsed)
    )


def _parse_alpaca(row: Row) -> Chat:
    return _chat(row, [*_system_message(row), *alpaca_messages(row)])


def _parse_tokenized(row: Row) -> Tokens:
    ids = integers(row, "input_ids")
    labels, attended, *masks = (
        integers(row, name, default) for name, default in [("labels", ids), *((name, [1] * len(ids)) for name in MASKS)]
    )
    if {len(column) for column in (labels, attended, *masks)} != {len(ids)}:
        raise DataError(
            f'{row.location}: "labels" and masks must be as long as "input_ids", which has {len(ids)} tokens'
        )
    if not row.values.get("labels"):
        labels = [number if all(bits) else IGNORE_INDEX for number, *bits in zip(ids, *masks, strict=True)]
    negative = [number for number in [*ids, *(label for label in labels if label != IGNORE_INDEX)] if number < 0]
    if negative:
        raise DataError(
            f'{row.location}: "input_ids" must be token ids, and "labels" too, or {IGNORE_INDEX}, got {negative[0]}'
        )
    kept = [position for position, is_attended in enumerate(attended) if is_attended]
    return Tokens([ids[position] for position in kept], [labels[position] for position in kept])


def _system_message(row: Row) -> list[dict[str, Any]]:
    system = text(row, "system", default="")
    return [{"role": "system", "content": system}] if system else []


def _chat(row: Row, messages: list[dict[str, Any]], prompt_length: int | None = None) -> Chat:
    chat = Chat(messages, parse_tools(row), mapping(row, "chat_template_kwargs"), prompt_length)
    for name, value in (
        ("messages", messages),
        ("tools", chat.tools),
        ("chat_template_kwargs", chat.template_arguments),
    ):
        check_unicode(row, name, value)
    return chat


_PARSERS: Mapping[Format, Callable[[Row], Example]] = {
    "messages": _parse_messages,
    "conversations": _parse_conversations,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "tokenized": _parse_tokenized,
}
