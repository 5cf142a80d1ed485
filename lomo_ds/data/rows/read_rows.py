"""Rows of a dataset, read from files of any type that datasets are kept in."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lomo_ds.data.rows.csv_rows import read_csv
from lomo_ds.data.rows.json_rows import read_json, read_json_lines
from lomo_ds.data.rows.row_file import OnBadRow, Row, decode, not_utf8, open_text_file
from lomo_ds.data.rows.table_rows import read_table
from lomo_ds.errors import DataError

# files that datasets writes beside those with rows
METADATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-[0-9a-f]+\.arrow")
COMPRESSED = {".zst", ".xz", ".bz2", ".lz4", ".zip"}
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)[-_.]")  # begins the name of a file on the hub

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
    return (
        has_known_type(path) and path.is_file() and not METADATA.fullmatch(path.name) and not path.name.startswith(".")
    )


def _check_folder(folder: Path, names: list[Path], files: list[Path]) -> None:
    if not files:
        folders = ", ".join(name.name for name in names if name.is_dir())
        way_out = f"; give one of its folders: {folders}" if folders else ""
        raise DataError(f"{folder} holds no data file, whose name ends in {TYPES}{way_out}")
    splits = {match[1]: file.name for file in files if (match := SPLIT.match(file.name.lower()))}
    if len(splits) > 1:
        raise DataError(f"{folder} must hold files of one split, got {' and '.join(splits.values())}; give the files")
    inner = [name.name for name in names if name.is_dir() and not name.name.startswith(".")]
    if inner:
        raise DataError(
            f"{folder} must hold files or folders, got both {files[0].name} and {inner[0]}/; give the files"
        )
    compressed = [name for name in names if name.suffix in COMPRESSED and has_known_type(name.with_suffix(""))]
    if compressed:
        raise DataError(f"{compressed[0]} is compressed in a way that cannot be read; decompress it")
    texts = [file for file in files if is_text_file(file)]
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
    if not has_known_type(path):
        raise DataError(f"a dataset's file must end in {TYPES}, got {path}")
    return READERS[_type(path)]


def is_text_file(path: Path) -> bool:
    """Return whether a file is one plain text."""
    return _type(path) in (".txt", ".txt.gz")


def has_known_type(path: Path) -> bool:
    """Return whether the name of a file tells that it holds rows."""
    return _type(path) in READERS


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
