"""Tests that cached tokens are reused only for the same file, tokenizer and library versions."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lomo_ds.data import fingerprint as fingerprint_module
from lomo_ds.errors import DataError
from tests.data.datasets import load, source
from tests.data.tokenizers import Letters, byte_level


def fingerprint(file: Path, tokenizer: Any, **options: Any) -> str:
    return fingerprint_module.fingerprint(source(file), tokenizer, options)


def set_part(name: str, part: Any) -> Callable[[PreTrainedTokenizerFast], None]:
    return lambda tokenizer: setattr(tokenizer.backend_tokenizer, name, part)


CHANGES: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "another end": lambda tokenizer: setattr(tokenizer, "eos_token", "<s>"),
    "no begin": lambda tokenizer: setattr(tokenizer, "bos_token", None),
    "a normalizer": set_part("normalizer", normalizers.Lowercase()),
    "another splitting into words": set_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "a token added": lambda tokenizer: tokenizer.add_tokens(["quick brown"]),
    "a special token added": lambda tokenizer: tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken("fox", lstrip=True)]}
    ),
    "other merges": set_part("model", models.BPE({chr(33 + n): n for n in range(300)}, [])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tokenizer_invalidates_the_cache(
    tmp_path: Path, change: Callable[[PreTrainedTokenizerFast], Any]
) -> None:
    """Change the tokenizer like a user would: between two runs, in its folder."""
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("The quick brown fox</s>")
    before = byte_level()
    load(file, before, cache)
    after = byte_level()
    change(after)
    after.save_pretrained(tmp_path / "changed")
    after = AutoTokenizer.from_pretrained(tmp_path / "changed")
    assert fingerprint(file, before) != fingerprint(file, after)
    cached, uncached = (load(file, after, folder).ids.tolist() for folder in (cache, tmp_path / "empty"))
    assert cached == uncached


@pytest.mark.parametrize(
    "setting", [{"eos_token": "<s>"}, {"bos_token": None}, {"split_special_tokens": True}, {"chat_template": "none"}]
)
def test_an_edited_setting_changes_the_fingerprint(tmp_path: Path, setting: dict[str, Any]) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox</s>")
    byte_level().save_pretrained(tmp_path / "model")
    before = fingerprint(tmp_path / "a.txt", AutoTokenizer.from_pretrained(tmp_path / "model"))
    file = tmp_path / "model/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    assert fingerprint(tmp_path / "a.txt", AutoTokenizer.from_pretrained(tmp_path / "model")) != before


def test_the_fingerprint_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    byte_level().save_pretrained(tmp_path / "one")
    once = AutoTokenizer.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    twice = AutoTokenizer.from_pretrained(tmp_path / "two", local_files_only=True)
    fingerprints = {fingerprint(tmp_path / "a.txt", tokenizer) for tokenizer in (once, copy.deepcopy(once), twice)}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("module", "name"), [(fingerprint_module.transformers, "__version__"), (fingerprint_module, "FORMAT")]
)
def test_another_library_version_changes_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    letters: Any = Letters()
    before = fingerprint(tmp_path / "a.txt", letters)
    monkeypatch.setattr(module, name, "another")
    assert fingerprint(tmp_path / "a.txt", letters) != before


def test_a_tokenizer_that_cannot_be_saved_is_rejected_before_training(tmp_path: Path) -> None:
    class Homemade(Letters):
        def save_pretrained(self, folder: Path) -> None:
            raise NotImplementedError("no save_vocabulary\nhere")

    (tmp_path / "a.txt").write_text("text")
    homemade: Any = Homemade()
    with pytest.raises(DataError, match=r"but it cannot be saved: no save_vocabulary here$"):
        fingerprint(tmp_path / "a.txt", homemade)


def test_every_setting_counts_except_locations(tmp_path: Path) -> None:
    class Noted(Letters):
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer_config.json").write_text(json.dumps(self.settings))

    def fingerprint_of(**settings: Any) -> str:
        noted: Any = Noted(**settings)
        return fingerprint(tmp_path / "a.txt", noted)

    (tmp_path / "a.txt").write_text("text")
    assert fingerprint_of(a=1, name_or_path="here") == fingerprint_of(name_or_path="there", is_local=True, a=1)
    assert fingerprint_of(a=1) != fingerprint_of(a=2)
    assert fingerprint_of(chat_template="a") != fingerprint_of()
