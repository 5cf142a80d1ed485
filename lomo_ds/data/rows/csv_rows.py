"""Reading of rows from CSV files, whose first line names the columns and all of whose values are text."""

import csv
from collections import Counter
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from lomo_ds.data.rows.row_file import OnBadRow, Row, not_utf8, open_text_file
from lomo_ds.errors import BadRowError, DataError

LARGEST_FIELD = 2**31 - 1  # characters


def read_csv(path: Path, on_bad_row: OnBadRow, delimiter: str = ",") -> Iterator[Row]:
    """Yield the rows of a file with fields separated by ``delimiter``.

    Raises:
        DataError: the file cannot be read, two columns have one name, or a quotation mark is wrong, so that it is
            unknown where rows begin.
    """
    with open_text_file(path) as file:
        text = TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        records = _records(text, delimiter, path)
        location, columns = next(records, ("", []))
        _check_columns(location, columns)
        for location, fields in records:
            try:
                row = Row(location, _values(location, columns, fields))
            except BadRowError as error:
                on_bad_row(error)
            else:
                yield row


def _records(text: TextIOWrapper, delimiter: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the location and the fields of each record; a blank line is none."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    fields: list[str] | None = []
    while fields is not None:
        location = f"{path} line {reader.line_num + 1}"
        before = csv.field_size_limit(LARGEST_FIELD)  # a setting of the process, which others may rely on
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{location} is not valid CSV: {error}; a field in quotation marks must have each of its own doubled, "
                "and the rest of the file cannot be read"
            ) from None
        finally:
            csv.field_size_limit(before)
        if fields:
            yield location, fields


def _check_columns(location: str, columns: list[str]) -> None:
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise DataError(f"{location} must name each column once, got {repeated[0]!r} twice")
    _values(location, columns, columns)


def _values(location: str, columns: list[str], fields: list[str]) -> dict[str, str]:
    if len(fields) != len(columns):
        raise BadRowError(
            f"{location} must have {len(columns)} fields, one for each column, got {len(fields)}; put a field with a "
            "separator or a line break in quotation marks"
        )
    for column, field in zip(columns, fields, strict=True):
        if not field.isascii() and (reason := not_utf8(field)):
            raise BadRowError(f"{location}: column {column!r} {reason}")
    return dict(zip(columns, fields, strict=True))
