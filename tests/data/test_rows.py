"""Tests of reading rows from files of each type, compared with what other libraries wrote, and of error messages."""

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lomo_ds.data.rows import Row, data_files, read_hub_rows, read_rows
from lomo_ds.errors import BadRowError, DataError

ROWS: list[dict[str, Any]] = [{"text": "one"}, {"text": 'zwei, drei\n"vier"'}, {"text": "\u4e94 \U0001f600"}]
NESTED = [{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "calls": [{"x": 1}]}], "n": None, "m": 2}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") and isinstance(content, str) else data)
    return path


def raise_error(error: DataError) -> None:
    raise error


def read(path: Path) -> list[Row]:
    return list(read_rows(path, raise_error))


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read(path)]


def read_all(path: Path) -> tuple[list[Any], list[str]]:
    """Return the values of all rows that are well-formed, and the error messages of the others."""
    errors: list[DataError] = []
    rows = [row.values for row in read_rows(path, errors.append)]
    assert all(type(error) is BadRowError for error in errors)
    return rows, [str(error).removeprefix(f"{path} ") for error in errors]


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- what a file may be


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines_of(ROWS)),
        ("a.NDJSON", "\n\n" + lines_of(ROWS).replace("\n", "\n \n")),
        ("a.jsonl", "\ufeff" + lines_of(ROWS).replace("\n", "\r\n").removesuffix("\r\n")),
        ("a.json", lines_of(ROWS)),
        ("a.json", "\ufeff\n" + lines_of(ROWS).replace("\n", "\r\n")),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False).replace("\n", "\r\n")),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"a \"key\"": ROWS}, indent=1) + "\n"),
        ("a.csv", pandas.DataFrame(ROWS).to_csv(index=False)),
        ("a.csv", "\ufeff" + pandas.DataFrame(ROWS).to_csv(index=False, quoting=csv.QUOTE_ALL)),
        ("a.csv", pandas.DataFrame(ROWS).to_csv(index=False, lineterminator="\r\n") + "\r\n\r\n"),
        ("a.tsv", pandas.DataFrame(ROWS).to_csv(index=False, sep="\t")),
    ],
)  # fmt: skip
def test_text_files(tmp_path: Path, name: str, content: str, suffix: str) -> None:
    assert values(write(tmp_path, name + suffix, content)) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz"])
def test_a_txt_is_one_row(tmp_path: Path, name: str) -> None:
    content = "\ufeffone\r\n\r\ntwo\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode(), mtime=0) if name.endswith(".gz") else content.encode())
    assert read(path) == [Row(str(path), {"text": "one\n\ntwo\n"})]


def write_parquet(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        pq.write_table(table, file, row_group_size=2)


def write_stream(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


TABLES = [("a.parquet", write_parquet), ("a [b]*.PARQUET", write_parquet), ("a.arrow", write_stream),
          ("a.arrow", write_arrow_file)]  # fmt: skip
WriteTable = Callable[[pa.Table, Path], None]


@pytest.mark.parametrize(("name", "write_table"), TABLES)
def test_tables(tmp_path: Path, name: str, write_table: WriteTable) -> None:
    path = tmp_path / name
    rows = NESTED + [{"messages": [], "n": n, "m": None} for n in range(4)]
    write_table(pa.Table.from_pylist(rows), path)
    assert read(path) == [Row(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]


def test_a_saved_dataset(tmp_path: Path) -> None:
    """JSON types, which hold objects with different fields, are decoded."""
    rows = [{"arguments": {"a": 1}}, {"arguments": {"a": "x", "b": [None, {"c": None}]}}]
    mixed = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    mixed.save_to_disk(tmp_path / "saved", num_shards=2)
    files = data_files(str(tmp_path / "saved"))
    assert [file.name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    rows[1]["arguments"]["b"][1] = {}  # type: ignore[index]
    assert [row for file in files for row in values(file)] == rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"tools": [{"type": "function"}], "messages": [{"role": "user", "content": "a"}]},
        {"input_ids": [1, 2]},
        {"text": "a"},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_of_one_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    path = write(tmp_path, "a.json", "\n" + json.dumps(row, indent=indent))
    assert read(path) == [Row(f"{path} line 2", row)]


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    number = "1" * 4300
    [row] = values(write(tmp_path, "a.jsonl", f'{{"a": {number}, "b": -0.5e3, "c": NaN, "d": 1{"0" * 5000}.5}}'))
    assert row["a"] == int(number)
    assert row["b"] == -500.0
    assert row["c"] != row["c"]
    [row] = values(write(tmp_path, "b.jsonl", f'{{"id": {number}1, "text": "one"}}'))
    assert row == {"id": float("inf"), "text": "one"}, (
        "Python reads no integer of so many digits, and no column has one"
    )


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_huge_field(tmp_path: Path, name: str) -> None:
    """A CSV's field may be larger than the csv module's own limit, which is the same afterwards."""
    limit = 1000
    before = csv.field_size_limit(limit)
    rows = [{"text": "x" * (limit + 1)}, {"text": "y"}]
    csv_text = pandas.DataFrame(rows).to_csv(index=False)
    path = write(tmp_path, name, csv_text if name == "a.csv" else lines_of(rows))
    try:
        for row, expected in zip(read_rows(path, raise_error), rows, strict=True):
            assert row.values == expected
            assert csv.field_size_limit() == limit
    finally:
        csv.field_size_limit(before)


def test_files_are_streamed(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", lines_of(ROWS) + "{oops}"), ("a.csv", 'a\n1\n"')):
        path = write(tmp_path, name, content + "\n" * 2**20)
        assert next(read_rows(path, raise_error)).values


# --- any rows, written and read

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(['"', "\\ud800", "]},\n{"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
json_rows = st.lists(st.dictionaries(texts, json_values, max_size=3), min_size=1, max_size=5)
any_rows = settings(max_examples=60, deadline=None, derandomize=True)


@any_rows
@given(
    json_rows,
    st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz"]),
    st.booleans(),
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
)
def test_any_json_lines(rows: list[dict[str, Any]], name: str, ascii_only: bool, blank: list[int]) -> None:
    lines: list[str] = []
    numbers = []
    for row, count in zip(rows, blank, strict=False):
        lines += [""] * count + [json.dumps(row, ensure_ascii=ascii_only)]
        numbers.append(len(lines))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), name, "\n".join(lines))
        if name == "a.json" and len(rows) == 1:
            return  # one object may also hold the rows
        assert read(path) == [Row(f"{path} line {n}", row) for n, row in zip(numbers, rows, strict=True)]


@any_rows
@given(json_rows, st.sampled_from(["a.json", "a.json.gz"]), st.booleans(), st.sampled_from([None, 0, 2]), st.booleans())
def test_any_json_array(
    rows: list[dict[str, Any]], name: str, ascii_only: bool, indent: int | None, wrapped: bool
) -> None:
    if wrapped and {"role"} <= rows[0].keys():
        return
    content = json.dumps({"data": rows} if wrapped else rows, ensure_ascii=ascii_only, indent=indent)
    numbers, line = [], 1 if indent is None else 3 if wrapped else 2
    for row in rows:
        numbers.append(line)
        line += 0 if indent is None else json.dumps(row, indent=indent).count("\n") + 1
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), name, content)
        assert read(path) == [Row(f"{path} line {n}", row) for n, row in zip(numbers, rows, strict=True)]


@any_rows
@given(
    st.lists(st.lists(texts.filter(str.strip), min_size=2, max_size=2), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([("a.csv", ","), ("a.csv.gz", ","), ("a.tsv", "\t")]),
)
def test_any_csv(rows: list[list[str]], line_end: str, kind: tuple[str, str]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=kind[1], lineterminator=line_end)
    numbers = []
    for row in [["a", "b"], *rows]:
        before = buffer.getvalue()
        numbers.append(len(before.replace("\r\n", "\n").replace("\r", "\n").split("\n")))
        writer.writerow(row)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), kind[0], buffer.getvalue())
        expected = [Row(f"{path} line {n}", {"a": a, "b": b}) for n, (a, b) in zip(numbers[1:], rows, strict=True)]
        assert read(path) == expected


table_rows = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.none() | texts,
            "ids": st.none() | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
            "messages": st.lists(
                st.fixed_dictionaries(
                    {"role": texts}, optional={"content": texts, "score": st.floats(allow_nan=False)}
                ),
                max_size=3,
            ),
        }
    ),
    min_size=1,
    max_size=5,
)
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "ids": pa.list_(pa.int64()),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "score": pa.float64()})),
    }
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(table_rows, st.sampled_from(TABLES))
def test_any_table(rows: list[dict[str, Any]], kind: tuple[str, WriteTable]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind[0]
        kind[1](pa.Table.from_pylist(rows, SCHEMA), path)
        assert read(path) == [Row(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]


# --- malformed rows

INTEGER = "9" * 4301
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops}", "is not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"text": oops}', "is not valid JSON: Expecting value at column 10"),
        ('{"text": "two"', "is not valid JSON: Expecting ',' delimiter at column 15"),
        ('{"text": "two"} {}', "is not valid JSON: Extra data at column 17"),
        ('{"text": "two\ttwo"}', "is not valid JSON: Invalid control character at at column 14"),
        ('["two"]', 'must be an object such as {"text": "..."}, got an array'),
        ('"two"', 'must be an object such as {"text": "..."}, got a string'),
        ("null", 'must be an object such as {"text": "..."}, got null'),
        ("{", "must be a whole object, got only '{'; end the name of a file whose array or object spans several lines "
         "in .json"),
        (b'{"text": "caf\xe9"}', "must be UTF-8 text, but its byte 13 is not: invalid continuation byte"),
        (b'{"caf\xe9": oops}', "must be UTF-8 text, but its byte 5 is not: invalid continuation byte"),
        (f'{{"text": {DEEP}', "is nested too deep to be read"),
    ],
)  # fmt: skip
def test_malformed_json_lines(tmp_path: Path, row: str | bytes, message: str) -> None:
    """Each is reported with its line, and the rows around it are read."""
    content = b'{"text": "one"}\n\n' + (row if isinstance(row, bytes) else row.encode()) + b'\r\n{"text": "three"}'
    for name in ("a.jsonl", "a.json"):
        path = write(tmp_path, name, content)
        assert read_all(path) == ([{"text": "one"}, {"text": "three"}], [f"line 3 {message}"])
        with pytest.raises(BadRowError):
            read(path)


@pytest.mark.parametrize("start", ["[", '{"data": ['])
@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        ('{"a": 1}, [{"a": 0}], {"a": 2}', ['line 1 must be an object such as {"text": "..."}, got an array']),
        (b'{"a": 1},\n{"a":\n "\xff"}, {"a": 2}', ["line 3 must be UTF-8 text, but its byte 2 is not"]),
        ('\n  {"a": 1},\n  {"a": oops, "b": [{}]},\n  {"a": 2}\n',
         ["line 3 is not valid JSON: Expecting value at column 9"]),
        (' {"a": 1},\n {"a" 0},\n\n {"a": oops}\r\n,\n {"a": 2}', ["line 2 is not valid", "line 4 is not valid"]),
        ('\n {"a": 1},\n {\n  "a": [\n   {"b": "]" "}"}\n  ]\n },\n {"a": 2}', ["line 5 is not valid JSON"]),
        ('{"a": 1},\n{"a": 2},\n{"a": "say "hi" now"}', ["line 3 is not valid JSON"]),
        (f'{{"a": 1}}, {{"a": {DEEP}{"]" * 100_000}}},\n{{"a": 2}}', ["line 1 is nested too deep"]),
    ],
)  # fmt: skip
def test_malformed_rows_of_an_array(tmp_path: Path, start: str, rows: str | bytes, messages: list[str]) -> None:
    data = rows if isinstance(rows, bytes) else rows.encode()
    end = b"]}" if start.startswith("{") else b"]"
    well_formed, errors = read_all(write(tmp_path, "a.json", start.encode() + data + end))
    assert well_formed == [{"a": 1}, {"a": 2}]
    assert [error[: len(message)] for error, message in zip(errors, messages, strict=True)] == messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, {"a": oops}, {"a": 2}]', "line 1 is not valid JSON: Expecting value at column 18; the rest of the "
         "file cannot be read"),
        ('[{"a": 1},\n{"b": [{"a": oops}},\n{"a": 2}]', "line 2 .* at column 14; the rest of the file cannot be read"),
        ('[{"a": 1},\n{"b": [oops}},\n{"a": 2}]', "line 2 .* at column 8; the rest of the file cannot be read"),
        ('[{"a": 1},\n{"a": [oops,\n{"a": 2}]},\n{"a": 3}]', None),
        ('[{"a": 1},\n{"a": [oops,\n {"a": 2}]},\n  {"a": 3}]', "line 2 .*; the rest of the file cannot be read"),
        ('[{"a": 1},\n{"a": "x},\n{"a": 2}]', "line 2 .*; the rest of the file cannot be read"),
        ('[{"a": 1},\n{"a"', "line 2 .* at column 5; the rest of the file cannot be read"),
        ('[{"a": 1},\n', "line 2 is not valid JSON: Expecting value at column 1; the rest of the file"),
        ('[{"a": 1}', "line 1 is not valid JSON: Expecting ',' or ']' behind a row at column 10"),
        ('[{"a": 1}\n {"a": 2}]', "line 2 is not valid JSON: Expecting ',' or ']' behind a row at column 2"),
        ('[{"a": 1}, ]', "line 1 is not valid JSON: Expecting a row behind the comma at column 12"),
        ('[{"a": 1}]\n{"a": 2}', "line 2 is not valid JSON: Extra data at column 1"),
        ('{"data": [{"a": 1}]', "line 1 is not valid JSON: Expecting '}' at column 20"),
        ('{"data": [{"a": 1}], "b": oops}', "line 1 is not valid JSON: Expecting '}' at column 20"),
        ('{"a":\n oops}', "line 2 is not valid JSON: Expecting value at column 2"),
        ('{"a": \n1} 2', "line 2 is not valid JSON: Extra data at column 4"),
        ("oops", "line 1 is not valid JSON: Expecting value at column 1"),
    ],
)  # fmt: skip
def test_unreadable_json(tmp_path: Path, content: str, message: str | None) -> None:
    """The rest of a file is read only if it is certain where the next row begins."""
    path = write(tmp_path, "a.json", content)
    if message is None:
        assert read_all(path)[0] == [{"a": 1}, {"a": 3}]
        return
    with pytest.raises(DataError, match=message) as raised:
        read_all(path)
    assert type(raised.value) is DataError


def test_a_json_of_one_malformed_row(tmp_path: Path) -> None:
    rows, errors = read_all(write(tmp_path, "a.json", b'\n{"text":\n "\xff"}'))
    assert (rows, errors) == ([], ["line 3 must be UTF-8 text, but its byte 2 is not: invalid start byte"])


def test_malformed_rows_of_a_csv(tmp_path: Path) -> None:
    content = b'text,b\n"one\n",1\n\n2\ncaf\xe9,2\n3,4,5\n,\n"two",2\n'
    rows, errors = read_all(write(tmp_path, "a.csv", content))
    assert rows == [{"text": "one\n", "b": "1"}, {"text": "", "b": ""}, {"text": "two", "b": "2"}]
    assert [error.partition(";")[0] for error in errors] == [
        "line 5 must have 2 fields, one for each column, got 1",
        "line 6: column 'text' must be UTF-8 text, but its byte 3 is not: unexpected end of data",
        "line 7 must have 2 fields, one for each column, got 3",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,a\n1,2,3", "line 1 must name each column once, got 'a' twice"),
        (b"\na\xff,b\n1,2", "line 2: column .* must be UTF-8 text, but its byte 1 is not"),
        ('a,b\n1,2\n"3\n\n"x",4', r"line 3 is not valid CSV: .* after .*; a field in .* rest of the file"),
        ('a\n1\n"2\n3', "line 3 is not valid CSV: unexpected end of data"),
    ],
)  # fmt: skip
def test_unreadable_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_all(write(tmp_path, "a.csv", content))


# --- faults of whole files

GZIPPED = gzip.compress(lines_of(ROWS).encode(), mtime=0)


def table_bytes(write_table: WriteTable, rows: list[dict[str, Any]]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        write_table(pa.Table.from_pylist(rows, pa.schema({"text": pa.string()})), path)
        return path.read_bytes()


PARQUET, STREAM = table_bytes(write_parquet, ROWS), table_bytes(write_stream, ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *((name, content, "holds no rows; a dataset needs at least one")
          for name, content in [("a.jsonl", ""), ("a.jsonl", "\ufeff\r\n \n"), ("a.jsonl.gz", ""), ("a.json", " \n"),
                                ("a.json", "[ ]"), ("a.json", '{"data": []}'), ("a.csv", ""), ("a.csv", "text\n")]),
        ("a.parquet", table_bytes(write_parquet, []), "holds no rows"),
        ("a.arrow", table_bytes(write_stream, []), "holds no rows"),
        ("a.txt", "\ufeff \n\n", "holds no text; training needs at least one word"),
        ("a.txt", b"caf\xe9", "must be UTF-8 text, but its byte 3 is not: unexpected end of data"),
        ("a.jsonl", "text".encode("utf-16"), "line 1 must be UTF-8 text, but the file is UTF-16; save it again"),
        ("a.xlsx", "x", r"must end in .jsonl, .ndjson, .json, .csv, .*\.parquet or .arrow, got .*a\.xlsx"),
        ("a.parquet.gz", "x", "must end in"),
        ("jsonl", "x", "must end in"),
        ("a.jsonl.gz", b"{}", r"must be a whole gzip file, as its name ends in .gz, but Not a gzipped file"),
        ("a.json.gz", GZIPPED[:-9], "must be a whole gzip file.*Compressed file ended"),
        ("a.txt.gz", GZIPPED[:-8] + b"1" * 8, "must be a whole gzip file.*CRC check failed"),
        ("a.json.gz", GZIPPED[:10] + b"\xff" * 50, "must be a whole gzip file.*Error -3"),
        ("a.parquet", b"", "cannot be read: .* size is 0 bytes; it may be damaged"),
        ("a.parquet", PARQUET[:-9], "cannot be read: .*magic bytes not found.*; it may be damaged"),
        ("a.parquet", PARQUET[:4] + b"\0" * 40 + PARQUET[44:], "cannot be read: .*; it may be damaged"),
        ("a.arrow", STREAM[: len(STREAM) // 2], "cannot be read: .*; it may be damaged"),
    ],
)  # fmt: skip
def test_unreadable_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as raised:
        read(path)
    assert type(raised.value) is DataError
    assert str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".csv", ".txt", ".parquet", ".arrow"])
def test_missing_files(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"nowhere\{suffix} cannot be read: No such file or directory"):
        read(tmp_path / f"nowhere{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DataError, match=rf"folder\{suffix} cannot be read: Is a directory"):
        read(tmp_path / f"folder{suffix}")


def test_a_file_of_malformed_rows_is_not_empty(tmp_path: Path) -> None:
    assert read_all(write(tmp_path, "a.jsonl", "1"))[0] == []


# tokens of the formats, so that files are nearly well-formed
pieces = st.sampled_from([
    "{", "}", "[", "]", ",", ":", '"', '"a"', '{"a": 1}', '{"a": [{"b": "]"}]}', "\n", "\r\n", " ", "\t", "a", "1e999",
    "NaN", '"\\ud800"', "\\", '"\\u"', '{"data": [', "\ufeff", "\0", "\u2028",
])  # fmt: skip
files = st.lists(pieces.map(str.encode) | st.binary(max_size=3), max_size=20).map(b"".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(files, st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz"]))
def test_any_text_file_is_read_or_refused_in_one_line(content: bytes, name: str) -> None:
    places: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), name, gzip.compress(content) if name.endswith(".gz") else content)
        try:
            for row in read_rows(path, lambda error: places.append(str(error))):
                places.append(row.location)
                assert json.dumps(row.values, ensure_ascii=False).encode()
        except DataError as error:
            places.append(str(error))
    assert all(len(place.splitlines()) == 1 and str(path) in place for place in places)


@any_rows
@given(json_rows, st.sampled_from([None, 0, 1]), st.data())
def test_a_damaged_array_loses_only_damaged_rows(rows: list[dict[str, Any]], indent: int | None, data: Any) -> None:
    """If reading goes on behind a malformed row, all other rows are those that were written."""
    parts = [json.dumps(row, indent=indent) for row in rows]
    number = data.draw(st.integers(0, len(rows) - 1))
    begin, end = sorted(data.draw(st.tuples(*[st.integers(1, len(parts[number]) - 1)] * 2)))
    parts[number] = parts[number][:begin] + data.draw(pieces.filter(lambda piece: piece != "\n")) + parts[number][end:]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "a.json", "[" + ",\n".join(parts) + "]")
        read_so_far: list[Any] = []
        errors: list[DataError] = []
        with suppress(DataError):
            for row in read_rows(path, errors.append):
                read_so_far.append(row.values)
            assert read_so_far[:number] == rows[:number]
            if errors:
                assert read_so_far[number:] == rows[number + 1 :]


# --- folders


@pytest.mark.parametrize("names", [["b.jsonl", "a.json.gz", "c.CSV", "d.parquet"], ["a.txt", "b.txt.gz"]])
def test_the_data_files_of_a_folder(tmp_path: Path, names: list[str]) -> None:
    for name in [*names, "README.md", "state.json", ".hidden.jsonl", "cache-1f.arrow"]:
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    assert data_files(str(tmp_path)) == [tmp_path / name for name in sorted(names)]
    assert data_files(f"{tmp_path}/{names[0]}") == [tmp_path / names[0]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
         r"must hold files of one split, got .*test-.*; give the files"),
        (["a.jsonl", "b/"], "must hold files or folders, got both a.jsonl and b/; give the files"),
        (["a.jsonl", "b.jsonl.zst"], r"b\.jsonl\.zst is compressed in a way that cannot be read; decompress it"),
    ],
)  # fmt: skip
def test_folders_of_which_a_part_would_be_read(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        data_files(str(tmp_path))


def test_folders_without_data_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data file, whose name ends in .jsonl.* or .arrow$"):
        data_files(str(tmp_path))
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"; give one of its folders: test, train$"):
        data_files(str(tmp_path))
    (tmp_path / "a.md").touch()
    with pytest.raises(DataError, match=r"must end in .*, got .*a\.md"):
        data_files(f"{tmp_path}/a.md")
    with pytest.raises(DataError, match="nowhere cannot be read: No such file or directory"):
        data_files(f"{tmp_path}/nowhere")


def test_text_beside_rows_is_refused(tmp_path: Path) -> None:
    for name in ("LICENSE.txt", "a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"files of text or of rows, got both LICENSE\.txt and a\.jsonl; move one"):
        data_files(str(tmp_path))


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the hub by a dataset of two splits, and return the list of its downloads."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, streaming: bool) -> Any:
        calls.append((path, name, streaming))
        if path.startswith("nobody/"):
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}'\ndoesn't exist")
        splits = {"train": ROWS, "test": NESTED}
        return datasets.IterableDatasetDict(
            {split: datasets.Dataset.from_list(rows).to_iterable_dataset() for split, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("name", "download"), [("me/data", ("me/data", None)), ("me/d.a-t_a:x y", ("me/d.a-t_a", "x y"))]
)
def test_hub_rows(hub: list[tuple[Any, ...]], name: str, download: tuple[Any, ...]) -> None:
    rows = list(read_hub_rows(name, "train", raise_error))
    assert rows == [Row(f"{name} row {number}", row) for number, row in enumerate(ROWS, start=1)]
    assert hub == [(*download, True)]
    assert [row.values for row in read_hub_rows(name, "test", raise_error)] == NESTED


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("me", "train", 'must be named "owner/name" or "owner/name:config", got \'me\''),
        ("me/a/b", "train", "must be named"),
        ("me/data", "valid", "the dataset me/data must have a split 'valid', got only train, test; choose one"),
        ("nobody/x", "train", "no file is named nobody/x, .*: Dataset 'nobody/x' doesn't exist; check"),
    ],
)  # fmt: skip
def test_hub_errors(hub: list[tuple[Any, ...]], name: str, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_hub_rows(name, split, raise_error))


def test_hub_rows_that_fail_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON within a table may be nested deep, and the network may fail at any row."""

    def rows() -> Any:
        yield {"text": json.loads("[" * 900 + "]" * 900)}
        yield {"text": "b"}
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows()})
    errors: list[DataError] = []
    read_so_far = read_hub_rows("me/data", "train", errors.append)
    assert next(read_so_far) == Row("me/data row 2", {"text": "b"})
    assert [str(error) for error in errors] == [
        "me/data row 1 is nested too deep to be read",
    ]
    with pytest.raises(DataError, match="me/data cannot be read: reset by peer"):
        next(read_so_far)
