"""Rows of a dataset, read from files of any type that datasets are kept in."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lomo_ds.data.rows.csv_rows import read_csv
from lomo_ds.data.rows.json_rows import read_json, read_json_lines
from lomo_ds.data.rows.row_file import OnBadRow, Row, decode, not_utf8, open_text_file
from lomo_ds.data.rows.table_rows import read_hub_rows, read_table
from lomo_ds.errors import DataError

__all__ = ["OnBadRow", "Row", "data_files", "read_hub_rows", "read_rows"]

# files that datasets writes beside those with rows
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

Reader = Callable[[Path, OnBadRow], Iterator[Row]]


def data_files(source: str) -> list[Path]:
    """Return the file ``source``, or the data files of the folder ``source``, sorted by name.

    Raises:
        DataError: there is no such file or folder, the file is of another type, or the folder holds no data file or
            text files beside others, which may be notes.
    """
    path = Path(source)
    try:
        path.stat()  # raises a clear error if there is no such file
        names = sorted(path.iterdir()) if path.is_dir() else None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if names is None:
        _reader(path)
        return [path]
    files = [file for file in names if _is_data_file(file)]
    _check_folder(path, names, files)
    return files


def _is_data_file(path: Path) -> bool:
    return _type(path) in READERS and path.is_file() and path.name not in METADATA and not path.name.startswith(".")


def _check_folder(folder: Path, names: list[Path], files: list[Path]) -> None:
    if not files:
        folders = ", ".join(name.name for name in names if name.is_dir())
        way_out = f"; give one of its folders: {folders}" if folders else ""
        raise DataError(f"{folder} holds no data file, whose name ends in {TYPES}{way_out}")
    texts = [file for file in files if _type(file).startswith(".txt")]
    if texts and len(texts) < len(files):
        other = next(file for file in files if file not in texts)
        raise DataError(
            f"{folder} must hold files of text or of rows, got both {texts[0].name} and {other.name}; move one of them"
        )


def read_rows(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yield the rows of a file, whose name tells its type.

    Args:
        on_bad_row: called with the error of each malformed row, which it raises or counts; then reading goes on.

    Raises:
        DataError: the file is missing, empty, damaged or of another type, or cannot be read behind a malformed row.
    """
    is_empty = True

    def report(error: DataError) -> None:
        nonlocal is_empty
        is_empty = False
        on_bad_row(error)

    for row in _reader(path)(path, report):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{path} holds no rows; a dataset needs at least one")


def _reader(path: Path) -> Reader:
    if _type(path) not in READERS:
        raise DataError(f"a dataset's file must end in {TYPES}, got {path}")
    return READERS[_type(path)]


def _type(path: Path) -> str:
    """Return the end of the file's name that tells its type, such as ".csv" or ".csv.gz"."""
    name = path.name.lower()
    suffix = Path(name).suffix
    return Path(name.removesuffix(suffix)).suffix + suffix if suffix == ".gz" else suffix


def _read_text(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    with open_text_file(path) as file:
        text = decode(file.read())
    if reason := not_utf8(text):
        raise DataError(f"{path} {reason}")
    if not text.strip():
        raise DataError(f"{path} holds no text; training needs at least one word")
    yield Row(str(path), {"text": text.replace("\r\n", "\n").replace("\r", "\n")})


TEXT_READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".txt": _read_text,
}
READERS: dict[str, Reader] = {
    **TEXT_READERS,
    **{f"{suffix}.gz": reader for suffix, reader in TEXT_READERS.items()},
    ".parquet": read_table,
    ".arrow": read_table,
}
TYPES = f"{', '.join(TEXT_READERS)} (or with .gz behind it), .parquet or .arrow"
