"""Sources of training examples: files, folders and names on the Hugging Face hub, read one after the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lomo_ds.data.rows.read_rows import data_files, has_known_type, is_text_file, read_rows
from lomo_ds.data.rows.row_file import Row
from lomo_ds.data.rows.table_rows import read_hub_rows
from lomo_ds.errors import DataError

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class RowSource:
    """Files, folders and hub datasets whose rows form one dataset.

    Attributes:
        names: as the user gave them.
        split: of the hub datasets.
    """

    names: tuple[str, ...]
    split: Split = "train"

    def __str__(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} and {len(self.names) - 1} more"

    @property
    def stem(self) -> str:
        """A name for files about this source."""
        return Path(self.names[0]).stem[:50]

    def parts(self) -> list[Path | str]:
        """Return the files, with those of a folder in its place, and the names of hub datasets.

        Raises:
            DataError: a folder has no data file.
        """
        parts: list[Path | str] = []
        for name in self.names:
            parts += [name] if _is_hub_name(name) else data_files(name)
        return parts

    def rows_by_part(
        self, on_bad_row: Callable[[DataError], None], without_texts: bool = False
    ) -> Iterator[Iterator[Row]]:
        """Yield the rows of each part, see ``read_rows``; perhaps without those of .txt files, each one long row."""
        for part in self.parts():
            if isinstance(part, Path):
                if not (without_texts and is_text_file(part)):
                    yield read_rows(part, on_bad_row)
            else:
                yield read_hub_rows(part, self.split, on_bad_row)


def _is_hub_name(name: str) -> bool:
    """Return whether ``name`` is that of a dataset on the hub, owner/name, and not of a local file."""
    path = Path(name)
    return (
        len(path.parts) == 2 and not name.startswith((".", "/", "~")) and not has_known_type(path) and not path.exists()
    )
