"""Tests of a folder that was edited after its export: settings may change, but weights may not."""

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_ds.checkpoint.manifest import MANIFEST, compute_entries, write_manifest
from lomo_ds.errors import DamagedError, ModelError
from lomo_ds.models.verify import verify_export
from tests.data.tokenizers import byte_level


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Build a model folder with the manifest of an export."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)).save_pretrained(tmp_path, max_shard_size="2KB")
    for file in tmp_path.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt", "manifest": MANIFEST})
    byte_level().save_pretrained(tmp_path)
    write_manifest(tmp_path, compute_entries(tmp_path, sorted(tmp_path.iterdir())))
    return tmp_path


def verify_all(folder: Path) -> None:
    for weights in (False, True):
        for rank in (0, 1):
            verify_export(str(folder), rank, 2, weights)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_an_edited_setting_is_logged_once_and_used(exported: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    file = exported / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7}))
    with caplog.at_level(logging.WARNING, "lomo_ds"):
        verify_all(exported)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(f"used as it is now: {name}")


def test_a_tokenizer_that_was_saved_again(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    (exported / "generation_config.json").unlink()
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(exported)
    with caplog.at_level(logging.WARNING, "lomo_ds"):
        verify_all(exported)
    assert caplog.messages[0].endswith(": generation_config.json, tokenizer.json"), "one is missing, one changed"


def test_unchanged_files_are_not_logged(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lomo_ds"):
        verify_all(exported)
    assert not caplog.messages


@pytest.mark.parametrize("name", ["model-00001-of-*.safetensors", "model.safetensors.index.json", MANIFEST])
def test_changed_weights_are_rejected(exported: Path, name: str) -> None:
    file = next(exported.glob(name))
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.raises(DamagedError, match=f"{file.name} is damaged"):
        verify_all(exported)
    file.write_bytes(content[:-1])
    with pytest.raises(DamagedError, match=f"{file.name} is damaged"):
        verify_all(exported)
    file.unlink()
    with pytest.raises(DamagedError, match=file.name):
        verify_all(exported)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_invalid_json_in_a_setting(exported: Path, content: bytes) -> None:
    (exported / "config.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"config\.json was changed and is no longer valid JSON"):
        verify_all(exported)


def test_weights_that_git_lfs_has_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=r"model\.safetensors is a pointer of git-lfs.*git lfs pull"):
        verify_export(str(tmp_path), weights=False)
