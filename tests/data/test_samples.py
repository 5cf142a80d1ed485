"""The path from a source's files to cached samples, and the counts of rows that are none."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from lomo_ds.data import IGNORE_INDEX, RowSource, Text, TokenizationOptions
from lomo_ds.data.formats import Completion
from lomo_ds.data.samples import RowCounts, load_samples, needs_chat_template, read_samples
from lomo_ds.errors import DataError
from tests.data.datasets import load, source, write_jsonl
from tests.data.tokenizers import Letters

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def letters() -> Any:
    return Letters()


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_each_document_has_begin_and_end_tokens(tmp_path: Path) -> None:
    samples = load(write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}]), letters())
    assert samples.ids.tolist() == samples.labels.tolist() == [0, *ids("ab"), 1, 0, *ids("c"), 1]
    assert samples.starts.tolist() == [0, 4, 7]
    assert samples.are(Text).all()


def test_a_completion_ends_with_the_end_token_and_its_prompt_has_no_label(tmp_path: Path) -> None:
    samples = load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}]), letters())
    assert samples.ids.tolist() == [*ids("abc"), 1]
    assert samples.labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, *ids("c"), 1]
    assert samples.are(Completion).all()


def test_samples_are_cached_until_the_file_or_an_option_changes(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": ""}])
    tokenizer = letters()
    for _ in range(2):
        samples = load(file, tokenizer)
        calls = tokenizer.calls
    assert samples.counts == RowCounts(rows=2, empty=1), "counts are told at every start"
    assert tokenizer.calls == calls
    assert load(file, tokenizer, completion_only_loss=False).labels.tolist() == [*ids("abc"), 1]
    write_jsonl(file, [{"prompt": "ab", "completion": "cd"}])
    os.utime(file, (1, 1))
    assert load(file, tokenizer).ids.tolist() == [*ids("abcd"), 1]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}])
    load(file, letters())
    next((tmp_path / "cache").glob("*/starts.npy")).write_bytes(b"")
    with pytest.raises(DataError, match=r"which caches the tokens of .*a\.jsonl, is damaged .*; delete it"):
        load(file, letters())


def test_files_of_several_formats_are_one_source(tmp_path: Path) -> None:
    """Read a folder and a file: texts, completions, and a csv file in which every value is text."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.csv").write_text('prompt,completion\n"a, b",1\n')
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "x"}).encode()))
    (tmp_path / "c.txt").write_text("yz")
    samples = read_samples(source(folder, tmp_path / "c.txt"), letters(), TokenizationOptions(), RowCounts())
    read = [(Path(location).name, "".join(map(chr, tokens[tokens > 1]))) for location, _, (tokens, _) in samples]
    assert read == [("a.jsonl.gz line 1", "x"), ("b.csv line 2", "a, b1"), ("c.txt", "yz")]


BAD = [{"text": "a"}, {"text": 1}, {"text": " "}, {"txt": "b"}, {"text": "c"}]


def test_a_bad_row_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", BAD)
    message = r"a\.jsonl line 2: 'text' must be text, got int 1; --on_bad_rows skip leaves such rows out$"
    with pytest.raises(DataError, match=message):
        load(file, letters())


def test_bad_and_empty_rows_are_counted(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", BAD)
    file.write_text(file.read_text() + "{not json}\n")
    samples = load(file, letters(), on_bad_rows="skip")
    assert samples.ids.tolist() == [0, *ids("a"), 1, 0, *ids("c"), 1]
    assert (samples.counts.rows, samples.counts.bad, samples.counts.empty) == (6, 3, 1)
    assert samples.counts.first_bad == f"{file} line 2: 'text' must be text, got int 1"


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}])
def test_only_conversations_have_an_assistant(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"line 1: --assistant_only_loss needs conversations, got "):
        load(write_jsonl(tmp_path / "a.jsonl", [row]), letters(), assistant_only_loss=True)


def test_a_source_without_a_sample(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": " "}, {"text": 1}])
    with pytest.raises(DataError, match="no example to train on: of 2 rows 1 are empty, 1 are malformed, the first: "):
        load(file, letters(), on_bad_rows="skip")


@pytest.mark.parametrize(
    ("rows", "needed"),
    [([CHAT], True), ([{"text": 3}, {"text": "a"}], False), ([{"prompt": "a", "completion": "b"}], False),
     ([{"prompt": [], "completion": []}], True), ([{"messages": 3}, CHAT], True)],
)  # fmt: skip
def test_sources_of_conversations_need_a_chat_template(tmp_path: Path, rows: list[Any], needed: bool) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert needs_chat_template(source(file), TokenizationOptions()) == needed


def test_a_cached_hub_dataset_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub: dict[str, Any] = {"train": [{"text": "ab"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    options, name = TokenizationOptions(), RowSource(("me/data",))
    before = load_samples(name, letters(), tmp_path, options)

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert not needs_chat_template(name, options)
    assert load_samples(name, letters(), tmp_path, options).ids.tolist() == before.ids.tolist() == [0, *ids("ab"), 1]


def test_a_hub_dataset_is_read_where_no_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["owner/name", "owner/other:config", "teknium/OpenHermes-2.5"]
    assert RowSource(tuple(names)).parts() == names
    (tmp_path / "owner").mkdir()
    write_jsonl(tmp_path / "owner/name.jsonl", [{"text": "a"}])
    assert RowSource(("owner/name.jsonl",)).parts() == [Path("owner/name.jsonl")]
    with pytest.raises(DataError, match=r"owner/other\.jsonl cannot be read: No such file"):
        RowSource(("owner/other.jsonl",)).parts()


def test_arrays_are_mapped_and_not_copied(tmp_path: Path) -> None:
    samples = load(write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}]), letters())
    assert isinstance(samples.ids, np.memmap)
    assert samples.labels is samples.ids, "texts have no labels of their own on disk"
