"""Reading of rows from Arrow tables: Parquet and Arrow files, and datasets of the Hugging Face hub."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lomo_ds.data.rows.row_file import OnBadRow, Row
from lomo_ds.errors import BadRowError, DataError, one_line

BATCH = 1024  # rows of a Parquet file in memory at once
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")


def read_table(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file, without copying it into a cache.

    Raises:
        DataError: the file is missing or damaged.
    """
    import datasets  # here, because it is slow to import

    try:
        with path.open("rb"):
            pass  # its error message is clearer than that of datasets
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    kind = path.suffix.lower().removeprefix(".")
    options = {"batch_size": BATCH} if kind == "parquet" else {}
    try:
        files = [glob.escape(str(path.absolute()))]
        table = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)
    except Exception as error:  # of datasets, pyarrow and fsspec
        raise _damaged(str(path), error) from error
    yield from _rows(table, str(path), on_bad_row)


def read_hub_rows(name: str, split: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a dataset of the Hugging Face hub, while they are downloaded.

    Args:
        name: "owner/name", or "owner/name:config" for one of several configs.

    Raises:
        DataError: there is no such dataset, config or split, or no connection to the hub.
    """
    import datasets

    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(f'a dataset of the hub must be named "owner/name" or "owner/name:config", got {name!r}')
    try:
        splits = datasets.load_dataset(match[1], match[2], streaming=True)
    except Exception as error:  # of datasets, huggingface_hub and the network
        raise DataError(
            f"no file is named {name}, and there is no such dataset on the Hugging Face hub, or it cannot be read: "
            f"{one_line(error)}; check its name, its "
            f"config ({match[1]}:CONFIG) and the network, or download its files and give their folder"
        ) from error
    if split not in splits:
        raise DataError(f"the dataset {name} must have a split {split!r}, got only {', '.join(splits)}; choose one")
    yield from _rows(splits[split], name, on_bad_row)


def _rows(table: Any, name: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    rows = iter(table)
    number = 1
    while (values := _next_values(rows, name)) is not None:
        location = f"{name} row {number}"
        number += 1
        try:
            row = Row(location, {column: _without_none(value) for column, value in values.items()})
        except RecursionError:
            on_bad_row(BadRowError(f"{location} is nested too deep to be read"))
        else:
            yield row


def _next_values(rows: Iterator[dict[str, Any]], name: str) -> dict[str, Any] | None:
    try:
        return next(rows, None)
    except Exception as error:  # of datasets, pyarrow and the network
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(f"{name} cannot be read: {one_line(error)}; it may be damaged, so copy it again")


def _without_none(value: Any) -> Any:
    """Return ``value`` without the None that Arrow adds for fields that other rows have."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
