"""Reading of documents from ``.txt`` and ``.jsonl`` files."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lomo_ds.errors import DataError

BYTE_ORDER_MARK = "\ufeff"  # some editors write it at the start of a file


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents in ``path``: the entire ``.txt`` file, or the ``"text"`` of each row of a ``.jsonl`` file.

    Windows line ends and a byte order mark are accepted; documents of white space only are skipped.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or of another type, or a row is invalid (the message names it).
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"training text must be a .txt or .jsonl file, got {path}")
    try:
        empty = True
        for document in (
            _read_rows(path) if path.suffix == ".jsonl" else [path.read_text("utf-8").removeprefix(BYTE_ORDER_MARK)]
        ):
            if document.strip():
                empty = False
                yield document
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text, but byte {error.start} is not: {error.reason}") from None
    if empty:
        raise DataError(f"{path} holds no text; training needs at least one word")


def _read_rows(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = line.decode().removeprefix(BYTE_ORDER_MARK if number == 1 else "")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number} must be UTF-8 text, but its byte {error.start} is not: {error.reason}"
                ) from None
            if row.strip():
                yield _parse_text(row, f"{path} line {number}")


def _parse_text(row: str, location: str) -> str:
    try:
        value = json.loads(row, parse_int=len)  # numbers are not used, and int() rejects very long ones
    except json.JSONDecodeError as error:
        raise DataError(f"{location} is not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{location} is nested too deep to be read") from None
    if not isinstance(value, dict) or "text" not in value:
        fields = textwrap.shorten(", ".join(list(value)[:10]), 200) if isinstance(value, dict) else ""
        got = f"the fields {fields or 'none'}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise DataError(f'{location} must be an object with a "text", got {got}')
    text = value["text"]
    if not isinstance(text, str):
        raise DataError(f'{location}: "text" must be a string, got {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'{location}: "text" must be Unicode text, but its character {error.start} is half of a surrogate pair'
        ) from None
    return text
