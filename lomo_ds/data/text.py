"""Documents out of ``.txt`` and ``.jsonl`` files."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lomo_ds.errors import DataError

MARK = "\ufeff"  # some editors begin a file with it


def read_documents(path: Path) -> Iterator[str]:
    """The documents in ``path``: the whole of a ``.txt``, the ``"text"`` of each row of a ``.jsonl``.

    Line ends of Windows and a byte order mark mean nothing; a document of white space is none.

    Raises:
        DataError: the file is missing, empty, not UTF-8, of another kind, or row N (named) is not what it must be.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"training text must be a .txt or .jsonl file, got {path}")
    try:
        empty = True
        for document in _rows(path) if path.suffix == ".jsonl" else [path.read_text("utf-8").removeprefix(MARK)]:
            if document.strip():
                empty = False
                yield document
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text, but byte {error.start} is not: {error.reason}") from None
    if empty:
        raise DataError(f"{path} holds no text; training needs at least one word")


def _rows(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = line.decode().removeprefix(MARK if number == 1 else "")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number} must be UTF-8 text, but its byte {error.start} is not: {error.reason}"
                ) from None
            if row.strip():
                yield _text(row, f"{path} line {number}")


def _text(row: str, where: str) -> str:
    try:
        found = json.loads(row, parse_int=len)  # no number is looked at, and int() refuses long ones
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deep to be read") from None
    if not isinstance(found, dict) or "text" not in found:
        fields = textwrap.shorten(", ".join(list(found)[:10]), 200) if isinstance(found, dict) else ""
        got = f"the fields {fields or 'none'}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise DataError(f'{where} must be an object with a "text", got {got}')
    text = found["text"]
    if not isinstance(text, str):
        raise DataError(f'{where}: "text" must be a string, got {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'{where}: "text" must be Unicode text, but its character {error.start} is half of a surrogate pair'
        ) from None
    return text
