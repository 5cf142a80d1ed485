"""Detection of a file's format, and what each format makes of a row."""

import json
from typing import Any

import pytest

from lomo_ds.data.formats import Chat, Completion, Example, Text, Tokens, detect_format, is_empty, parse_row
from lomo_ds.data.rows import Row
from lomo_ds.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def row(**columns: Any) -> Row:
    return Row("chats.jsonl line 7", columns)


def example(**columns: Any) -> Example:
    return parse_row(row(**columns), detect_format(row(**columns)))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "t", "id": 3}, Text("t")),
        ({"prompt": "p", "completion": "c"}, Completion("p", "c")),
        ({"prompt": "[1, 2]", "completion": "{}"}, Completion("[1, 2]", "{}")),
        ({"prompt": "a", "completion": '[{"role": "CEO"}]'}, Completion("a", '[{"role": "CEO"}]')),
        ({"prompt": "[]", "completion": "[]"}, Completion("[]", "[]")),
        ({"prompt": [USER], "completion": [ANSWER]}, Chat([USER, ANSWER], prompt_length=1)),
        ({"messages": [USER, ANSWER], "prompt": "of UltraChat"}, Chat([USER, ANSWER])),
        ({"messages": [USER, ANSWER], "tools": [TOOL]}, Chat([USER, ANSWER], [TOOL])),
        ({"messages": [USER], "tools": "", "chat_template_kwargs": ""}, Chat([USER])),
        ({"conversations": [{"from": "Human", "value": "q"}, {"from": "Assistant", "value": "a"}]},
         Chat([USER, ANSWER])),
        ({"messages": [USER], "tools": "[]", "chat_template_kwargs": {"thinking": False}},
         Chat([USER], None, {"thinking": False})),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
         Chat([{"role": "user", "content": "ab"}])),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
         Chat([{"role": "system", "content": "s"}, USER, ANSWER])),
        ({"conversations": [USER, ANSWER]}, Chat([USER, ANSWER])),
        ({"instruction": "q", "input": "", "output": "a"}, Chat([USER, ANSWER])),
        ({"instruction": "q", "input": None, "output": "a"}, Chat([USER, ANSWER])),
        ({"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
         Chat([{"role": "system", "content": "s"}, USER, ANSWER, {"role": "user", "content": "q\ni"}, ANSWER])),
        ({"input_ids": [1, 2, 3]}, Tokens([1, 2, 3], [1, 2, 3])),
        ({"input_ids": [1, 2, 3], "labels": "", "attention_mask": None}, Tokens([1, 2, 3], [1, 2, 3])),
        ({"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [0, 1, 0]},
         Tokens([1, 2, 3], [-100, 2, -100])),
        ({"input_ids": [1, 2, 0], "labels": [-100, 2, -100], "attention_mask": [1, 1, 0]}, Tokens([1, 2], [-100, 2])),
    ],
)  # fmt: skip
def test_rows_of_every_format(columns: dict[str, Any], expected: Example) -> None:
    assert example(**columns) == expected


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [USER, ANSWER], "tools": [TOOL], "chat_template_kwargs": {"a": 1}},
        {"conversations": [{"from": "human", "value": "q"}], "tools": [TOOL]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "q", "output": "a", "history": [["b", "c"]]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ],
)
def test_columns_may_hold_json(columns: dict[str, Any]) -> None:
    """Read a row as a csv file has it, in which every value is text."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in columns.items()}
    assert example(**texts) == example(**columns)


def test_calls_of_functions_in_sharegpts_form() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    conversation = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    parsed = example(conversations=conversation)
    assert isinstance(parsed, Chat)
    assert parsed.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_arguments_of_calls_are_objects(arguments: Any) -> None:
    """OpenAI writes them as JSON, which templates would write as JSON once more."""
    for call in ({"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}},
                 {"name": "f", "arguments": arguments}):  # fmt: skip
        parsed = example(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
        assert isinstance(parsed, Chat)
        [parsed_call] = parsed.messages[0]["tool_calls"]
        assert parsed_call.get("function", parsed_call) == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages": [USER], "text": "t"}, "has the columns of several formats, messages and text .*--dataset_format"),
        ({"instruction": "q", "output": "a", "text": "t"}, "several formats, alpaca and text"),
        ({"mesages": [USER]}, r"must have the columns of a format .* 'mesages'; did you mean 'messages'"),
        ({"story": "t"}, "got the columns 'story'; --dataset_text_field names another"),
        ({}, "got no columns"),
        ({"prompt": "p", "response": "r"}, "got the columns 'prompt', 'response', but no 'completion'; --dataset_text"),
        ({"text": 3}, "'text' must be text, got int 3"),
        ({"text": None}, "'text' must be text, got null"),
        ({"text": "a\ud800"}, r"'text' must be Unicode text, but '\\ud800' is half of a surrogate pair"),
        ({"messages": [USER | {"content": "\ude00"}]}, "'messages' must be Unicode text, but"),
        ({"messages": [USER], "tools": [{"name": "\ude00"}]}, "'tools' must be Unicode text, but"),
        ({"messages": "hello"}, "'messages' must be a list of messages, got str 'hello'"),
        ({"messages": ["hello"]}, r"'messages\[0\]' must be a message, an object, got str 'hello'"),
        ({"messages": [USER, {"content": "a"}]}, r"'messages\[1\]\.role' must be text, got null"),
        ({"messages": [{"role": "user"}]}, r"'messages\[0\]\.content' must be text, as there are no tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
         r"'messages\[0\]\.content\[0\]' must be text: images and sounds cannot be trained on"),
        ({"messages": [USER], "tools": {"name": "f"}}, "'tools' must be a list of JSON schemas, got dict"),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object, got list"),
        ({"conversations": [{"from": "human"}]}, r"'conversations\[0\]\.value' must be text, got null"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, r"\.value\[0\]' must be a call such as"),
        ({"messages": [ANSWER | {"tool_calls": "f(1)"}]}, r"'messages\[0\]\.tool_calls' must be a list of calls"),
        ({"messages": [ANSWER | {"tool_calls": [{"name": 3}]}]}, r"tool_calls\[0\]' must be a call such as"),
        ({"prompt": "p", "completion": 3}, "'completion' must be text, got int 3"),
        ({"prompt": [USER], "completion": "c"}, "'completion' must be a list of messages, got str 'c'"),
        ({"instruction": "q", "output": ["a"]}, "'output' must be text, got list"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, r"'history' must be a list of \[question, answer\]"),
        ({"input_ids": "1 2"}, "'input_ids' must be a list of integers, got str '1 2'"),
        ({"input_ids": [1, 2.0]}, r"'input_ids\[1\]' must be an integer of 32 bits, got float 2.0"),
        ({"input_ids": [1, 2**31]}, r"'input_ids\[1\]' must be an integer of 32 bits"),
        ({"input_ids": [1, -100]}, '"input_ids" must be token ids, .* got -100'),
        ({"input_ids": [1], "labels": [-1]}, '"labels" too, or -100, got -1'),
        ({"input_ids": [1, 2], "labels": [1]}, '"labels" and masks must be as long as "input_ids", which has 2 tokens'),
        ({"input_ids": [1, 2], "assistant_masks": [1, 1, 1]}, "must be as long as"),
    ],
)  # fmt: skip
def test_messages_name_the_row_the_column_and_the_rule(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^chats\.jsonl line 7.*{message}"):
        example(**columns)


def test_a_text_file_has_no_other_column() -> None:
    """Read a .txt file beside files whose texts are in another column."""
    assert detect_format(row(text="t"), "story") == "text"
    assert parse_row(row(text="t"), "text", "story") == Text("t")
    assert parse_row(row(text="t", story="s"), "text", "story") == Text("s")


def test_a_named_format_needs_its_columns() -> None:
    with pytest.raises(DataError, match=r"must have the column 'messages', as .* decides, got the columns 'text'$"):
        parse_row(row(text="t"), "messages")


@pytest.mark.parametrize(
    ("empty", "columns"),
    [
        (True, {"text": " \n"}),
        (True, {"messages": []}),
        (True, {"messages": [{"role": "user", "content": " "}]}),
        (True, {"prompt": "", "completion": " "}),
        (True, {"input_ids": []}),
        (False, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}),
        (False, {"prompt": "", "completion": "c"}),
    ],
)
def test_rows_without_content(empty: bool, columns: dict[str, Any]) -> None:
    assert is_empty(example(**columns)) == empty
