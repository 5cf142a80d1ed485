"""Reading of rows from JSON Lines files, and from JSON files that hold one array or one object."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lomo_ds.data.rows.json_text import STRING, JsonText
from lomo_ds.data.rows.row_file import BYTE_ORDER_MARK, OnBadRow, Row, decode, open_text_file
from lomo_ds.errors import BadRowError, DataError

WRAPPER = re.compile(rf"\{{\s*{STRING}\s*:\s*\[")  # an object whose first field holds an array
MESSAGES = {"role"}, {"from", "value"}  # fields of a chat's message, by which it is told from a row


def read_json_lines(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a file with a JSON object on each line.

    Raises:
        DataError: the file cannot be read.
    """
    with open_text_file(path) as file:
        yield from _line_rows(file, path, on_bad_row)


def read_json(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a file with an array of objects, a field that holds such an array, or JSON Lines.

    Raises:
        DataError: the file cannot be read, or not from a malformed row on.
    """
    with open_text_file(path) as file:
        is_lines = _holds_lines(file)
        file.seek(0)
        if is_lines:
            yield from _line_rows(file, path, on_bad_row)
            return
        text = JsonText(path, decode(file.read()))
    start = text.skip_space(0)
    if text.text.startswith("[", start):
        yield from _array_rows(text, start + 1, "]", on_bad_row)
    elif array := _wrapped_array(text, start):
        yield from _array_rows(text, array, "]}", on_bad_row)
    elif start < len(text.text):
        yield from _single_row(text, start, on_bad_row)


def _line_rows(file: IO[bytes], path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        text = JsonText(path, decode(line.rstrip(b"\r\n"), is_start=number == 1), number)
        if text.text.strip():
            try:
                row = Row(f"{path} line {number}", _decode_line(text))
            except BadRowError as error:
                on_bad_row(error)
            else:
                yield row


def _decode_line(text: JsonText) -> dict[str, Any]:
    start = text.skip_space(0)
    if text.text.strip() in ("{", "["):
        raise BadRowError(
            f"{text.line(0)} must be a whole object, got only {text.text.strip()!r}; end the name of a file whose "
            "array or object spans several lines in .json"
        )
    value, end = text.decode(start)
    if text.skip_space(end) < len(text.text):
        raise BadRowError(text.fault(text.skip_space(end), "Extra data"))
    return text.check_row(value, start, end)


def _check_end(text: JsonText, position: int, closing: str = "") -> None:
    """Check that only ``closing`` follows from ``position`` on."""
    for bracket in closing:
        position = text.skip_space(position)
        if not text.text.startswith(bracket, position):
            raise DataError(text.fault(position, f"Expecting {bracket!r}"))
        position += 1
    position = text.skip_space(position)
    if position < len(text.text):
        raise DataError(text.fault(position, "Extra data"))


def _holds_lines(file: IO[bytes]) -> bool:
    """Return whether ``file`` has an object on each line: within an array or object, no line follows another so."""
    lines = (stripped for line in file if (stripped := line.removeprefix(BYTE_ORDER_MARK.encode()).strip()))
    first, second = next(lines, b""), next(lines, b"")
    return first.startswith(b"{") and first.endswith(b"}") and second[:1] not in (b"", b",", b"]", b"}")


def _single_row(text: JsonText, start: int, on_bad_row: OnBadRow) -> Iterator[Row]:
    row, end = _read_row(text, start, text.line(start))
    _check_end(text, end)
    if isinstance(row, Row):
        yield row
    else:
        on_bad_row(row)


def _array_rows(text: JsonText, position: int, closing: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of the array that begins before ``position`` and ends, as does the file, with ``closing``."""
    line, counted = text.first_line, 0
    position = text.skip_space(position)
    while not text.text.startswith("]", position):
        line += text.text.count("\n", counted, position)
        counted = position
        row, end = _read_row(text, position, f"{text.path} line {line}")
        if isinstance(row, Row):
            yield row
        else:
            on_bad_row(row)
        position = text.skip_space(end)
        if text.text.startswith(",", position):
            position = text.skip_space(position + 1)
            if text.text.startswith("]", position):
                raise DataError(text.fault(position, "Expecting a row behind the comma"))
        elif not text.text.startswith("]", position):
            raise DataError(text.fault(position, "Expecting ',' or ']' behind a row"))
    _check_end(text, position, closing)


def _read_row(text: JsonText, start: int, location: str) -> tuple[Row | BadRowError, int]:
    """Return the row at ``start``, or its error, and the position of its end.

    Raises:
        DataError: the row is malformed, and where it ends is not certain.
    """
    try:
        value, end = text.decode(start)
    except BadRowError as error:
        known_end = text.end_of_malformed(start)
        if known_end is None:
            raise DataError(f"{error}; the rest of the file cannot be read") from None
        return error, known_end
    try:
        return Row(location, text.check_row(value, start, end)), end
    except BadRowError as error:
        return error, end


def _wrapped_array(text: JsonText, start: int) -> int | None:
    """Return the position within the array of rows that is the only field of the object at ``start``.

    None if the object is a row itself: it has other fields, or its field is an array of anything but rows, such as the
    messages of a chat.
    """
    wrapper = WRAPPER.match(text.text, start)
    if wrapper is None:
        return None
    try:
        first, _ = text.decode(text.skip_space(wrapper.end()))
        if not isinstance(first, dict) or any(fields <= first.keys() for fields in MESSAGES):
            return None
        return wrapper.end() if len(text.decode(start)[0]) == 1 else None
    except BadRowError:  # an empty array, or a malformed row, which the reading of rows will name
        return wrapper.end()
