"""A row of a dataset, and the opening of the files that hold rows as text."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lomo_ds.errors import DataError, one_line

BYTE_ORDER_MARK = "\ufeff"  # some editors write it at the start of a file
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order mark, with which Windows programs begin such a file

OnBadRow = Callable[[DataError], None]  # raises the error of a malformed row, or counts it


@dataclass(frozen=True)
class Row:
    """A row of a dataset.

    Attributes:
        location: begins every error message about the row, such as "chats.jsonl line 7".
        values: the value of each column.
    """

    location: str
    values: dict[str, Any]


@contextmanager
def open_text_file(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` to read the bytes of its text, which is decompressed if its name ends in ``.gz``.

    Raises:
        DataError: the file is missing, not a whole gzip file, or UTF-16; also later, while it is read.
    """
    try:
        with _open(path) as file:
            if file.read(2) in UTF_16:
                raise DataError(f"{path} line 1 must be UTF-8 text, but the file is UTF-16; save it again as UTF-8")
            file.seek(0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} must be a whole gzip file, as its name ends in .gz, but {one_line(error)}; copy it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def decode(data: bytes, is_start: bool = True) -> str:
    """Return UTF-8 text in which a half of a surrogate pair stands for each byte that is not UTF-8.

    So the rows around such a byte can be read; ``not_utf8`` names it.

    Args:
        is_start: whether ``data`` begins a file, where a byte order mark is left out.
    """
    text = data.decode("utf-8", "surrogateescape")
    return text.removeprefix(BYTE_ORDER_MARK) if is_start else text


def not_utf8(text: str) -> str | None:
    """Return an error message, without its subject, if a byte of decoded ``text`` is not UTF-8."""
    try:
        text.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return f"must be UTF-8 text, but its byte {error.start} is not: {error.reason}"
    return None
