"""Conversations in OpenAI's form: messages of a role and a content, read from the forms that datasets have."""

from collections.abc import Mapping
from typing import Any

from lomo_ds.data.formats.fields import bad_column, json_value, text
from lomo_ds.data.rows import Row

ROLES = {  # of ShareGPT's "from", in lower case; any other name is the role itself
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def parse_messages(row: Row, name: str) -> list[dict[str, Any]]:
    """Return the messages in a column, in OpenAI's form; ShareGPT's ``from`` and ``value`` are renamed.

    Raises:
        DataError: the column is no list of messages; the message names the place.
    """
    value = json_value(row.values.get(name))
    if not isinstance(value, list):
        raise bad_column(row, name, "a list of messages", value)
    return [_parse_message(row, f"{name}[{position}]", message) for position, message in enumerate(value)]


def parse_tools(row: Row) -> list[Any] | None:
    """Return the tools that the assistant may call, None if there are none.

    Raises:
        DataError: ``tools`` is neither a list nor the JSON of one.
    """
    tools = json_value(row.values.get("tools"))
    if tools is None or tools == "":
        return None
    if not isinstance(tools, list):
        raise bad_column(row, "tools", "a list of JSON schemas", tools)
    return tools or None


def alpaca_messages(row: Row) -> list[dict[str, Any]]:
    """Return the messages of an alpaca row: its history, then ``instruction`` with ``input`` below, and ``output``.

    Raises:
        DataError: a column is not of its type.
    """
    question, more = text(row, "instruction"), text(row, "input", default="")
    turns = [*_history(row), [f"{question}\n{more}" if more else question, text(row, "output")]]
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _history(row: Row) -> list[list[str]]:
    history = json_value(row.values.get("history")) or []
    is_history = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn) for turn in history
    )
    if not is_history:
        raise bad_column(row, "history", "a list of [question, answer] pairs", history)
    return history


def _parse_message(row: Row, place: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise bad_column(row, place, "a message, an object", message)
    if "from" in message and "role" not in message:
        return _from_sharegpt(row, place, dict(message))
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise bad_column(row, f"{place}.role", "text", role)
    calls = message.get("tool_calls")
    if content is None and not calls:
        raise bad_column(row, f"{place}.content", "text, as there are no tool_calls", content)
    parsed = dict(message) | {"content": _parse_content(row, f"{place}.content", content)}
    return parsed | {"tool_calls": _parse_calls(row, f"{place}.tool_calls", calls)} if calls else parsed


def _parse_content(row: Row, place: str, content: Any) -> str:
    """Return the text of a message's content: text, null, or OpenAI's list of text parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    texts = []
    for position, part in enumerate(parts):
        value = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(value, str):
            where, got = (f"{place}[{position}]", part) if isinstance(content, list) else (place, content)
            raise bad_column(row, where, "text: images and sounds cannot be trained on", got)
        texts.append(value)
    return "".join(texts)


def _from_sharegpt(row: Row, place: str, message: dict[str, Any]) -> dict[str, Any]:
    sender, value = message.pop("from"), message.pop("value", None)
    if not isinstance(sender, str):
        raise bad_column(row, f"{place}.from", "text", sender)
    if not isinstance(value, str):
        raise bad_column(row, f"{place}.value", "text", value)
    sender = sender.lower()
    renamed = message | {"role": ROLES.get(sender, sender), "content": value}
    if sender != "function_call":
        return renamed
    parsed = json_value(value)
    calls = [{"type": "function", "function": call} for call in (parsed if isinstance(parsed, list) else [parsed])]
    return renamed | {"content": "", "tool_calls": _parse_calls(row, f"{place}.value", calls)}


def _parse_calls(row: Row, place: str, calls: Any) -> list[dict[str, Any]]:
    """Return calls of functions, whose arguments OpenAI writes as JSON, but chat templates expect as an object."""
    if not isinstance(calls, list):
        raise bad_column(row, place, "a list of calls", calls)
    parsed = []
    for position, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            expected = 'a call such as {"function": {"name": "f", "arguments": {}}}'
            raise bad_column(row, f"{place}[{position}]", expected, call)
        function = dict(function) | {"arguments": json_value(function.get("arguments", {}))}
        parsed.append(dict(call) | {"function": function} if "function" in call else function)
    return parsed
