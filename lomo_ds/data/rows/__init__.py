"""Rows of a dataset: read from files of any type, folders of them, and the Hugging Face hub.

A row has a location, which begins every error message about it, and the values of its columns.
"""

from lomo_ds.data.rows.read_rows import data_files, read_rows
from lomo_ds.data.rows.row_file import OnBadRow, Row
from lomo_ds.data.rows.row_source import RowSource
from lomo_ds.data.rows.table_rows import read_hub_rows

__all__ = ["OnBadRow", "Row", "RowSource", "data_files", "read_hub_rows", "read_rows"]
