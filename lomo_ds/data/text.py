"""Documents out of ``.txt`` and ``.jsonl`` files."""

import json
from collections.abc import Iterator
from pathlib import Path

from lomo_ds.errors import DataError


def read_documents(path: Path) -> Iterator[str]:
    """The documents in ``path``: the whole of a ``.txt``, the ``"text"`` of each row of a ``.jsonl``.

    Raises:
        DataError: the file is missing, empty, not UTF-8, of another kind, or row N (named) is not what it must be.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"training text must be a .txt or .jsonl file, got {path}")
    try:
        with path.open(encoding="utf-8") as file:
            documents = _rows(path, file) if path.suffix == ".jsonl" else iter([file.read()])
            empty = True
            for document in documents:
                if document.strip():
                    empty = False
                    yield document
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text, but byte {error.start} is not: {error.reason}") from None
    if empty:
        raise DataError(f"{path} holds no text; training needs at least one word")


def _rows(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not valid JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict) or "text" not in row:
            got = f"the fields {', '.join(row) or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(f'{path} line {number} must be an object with a "text", got {got}')
        if not isinstance(row["text"], str):
            raise DataError(f'{path} line {number}: "text" must be a string, got {type(row["text"]).__name__}')
        yield row["text"]
