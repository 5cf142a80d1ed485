"""Columns of a dataset row with their types checked: an error message names the row, the column and what it must be."""

import json
import textwrap
from typing import Any

from lomo_ds.data.rows import Row
from lomo_ds.errors import DataError, did_you_mean

MAX_ID = 2**31 - 1  # token ids are stored as int32


def text(row: Row, name: str, default: str | None = None) -> str:
    """Return the text in a column; ``default``, unless it is None, stands for an absent or null one."""
    value = row.values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise bad_column(row, name, "text", value)
    check_unicode(row, name, value)
    return value


def check_unicode(row: Row, name: str, value: Any) -> None:
    """Raise unless every string in ``value``, a JSON value, is Unicode: JSON can hold half of a surrogate pair."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError as error:
        half = repr(error.object[error.start])
        raise DataError(
            f"{row.location}: {name!r} must be Unicode text, but {half} is half of a surrogate pair"
        ) from None


def mapping(row: Row, name: str) -> dict[str, Any]:
    """Return the JSON object in a column, empty if it is absent."""
    value = json_value(row.values.get(name))
    if value is None or value == "":  # an empty field of a csv file
        return {}
    if not isinstance(value, dict):
        raise bad_column(row, name, "an object", value)
    return value


def integers(row: Row, name: str, default: list[int] | None = None) -> list[int]:
    """Return the list of token ids or labels in a column; ``default``, unless it is None, stands for an absent one."""
    value = json_value(row.values.get(name))
    if default is not None and value in (None, ""):
        return default
    if not isinstance(value, list):
        raise bad_column(row, name, "a list of integers", value)
    for position, number in enumerate(value):
        if type(number) is not int or not -MAX_ID <= number <= MAX_ID:
            raise bad_column(row, f"{name}[{position}]", "an integer of 32 bits", number)
    return value


def json_value(value: Any) -> Any:
    """Return a column's value, with the JSON of a list or an object read: a csv file has nothing but text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def bad_column(row: Row, name: str, expected: str, value: Any) -> DataError:
    """Return the error that a column is not what it must be."""
    if name not in row.values and not ("[" in name or "." in name):
        return DataError(
            f"{row.location} must have the column {name!r}, as the first row of a file or --dataset_format decides, "
            f"got {column_names(row)}{did_you_mean(name, list(row.values))}"
        )
    got = "null" if value is None else f"{type(value).__name__} {textwrap.shorten(repr(value), 60)}"
    return DataError(f"{row.location}: {name!r} must be {expected}, got {got}")


def column_names(row: Row) -> str:
    """Return the names of a row's columns as an error message lists them."""
    return textwrap.shorten(f"the columns {', '.join(map(repr, row.values))}", 200) if row.values else "no columns"
