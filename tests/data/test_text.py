"""Tests of reading documents from files, and of the error message for each kind of invalid file."""

from pathlib import Path

import pytest

from lomo_ds.data.text import read_documents
from lomo_ds.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_txt_is_one_document(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path, "a.txt", "one\n\ntwo\n"))) == ["one\n\ntwo\n"]


def test_each_row_of_a_jsonl_is_a_document(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "one", "id": 1}\n\n{"text": ""}\n{"text": "two"}')
    assert list(read_documents(path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", b"caf\xe9", "must be UTF-8 text, but byte 3 is not"),
        ("a.csv", "x", r"must be a .txt or .jsonl file, got .*a\.csv"),
        ("a.jsonl", '{"text": "one"}\n{"text": oops}', "line 2 is not valid JSON: .* at column 10"),
        ("a.jsonl", '{"text": "one"}\n\n{"txt": "two", "id": 3}', 'line 3 must be an object with a "text".*txt, id'),
        ("a.jsonl", '["one"]', 'line 1 must be an object with a "text", got a list'),
        ("a.jsonl", '{"text": 5}', 'line 1: "text" must be a string, got int'),
    ],
)  # fmt: skip
def test_error_messages(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_documents(write(tmp_path, name, content)))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: No such file"):
        list(read_documents(tmp_path / "nowhere.txt"))
