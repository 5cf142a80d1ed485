"""Tests of loading a tokenizer: it works, or an error message says what is wrong with the folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lomo_ds.errors import DataError, ModelError
from lomo_ds.models import load_config, load_tokenizer
from lomo_ds.models.meta_model import meta_model
from tests.data.datasets import load
from tests.data.tokenizers import byte_level

JSON = dict[str, Any]


@pytest.fixture
def folder(demo: Path, tmp_path: Path) -> Path:
    """Build a LLaMA folder with a SentencePiece model."""
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo / "model" / name, tmp_path)
    return tmp_path


@pytest.fixture
def with_json(tmp_path: Path) -> Path:
    """Build a folder with a tokenizer.json."""
    byte_level().save_pretrained(tmp_path)
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def load_error(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_tokenizer(str(folder))
    assert str(folder) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# vocabulary files that are missing or not whole, of which transformers makes a tokenizer without words


def test_without_the_sentencepiece_model(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    assert "a LlamaTokenizer reads its vocabulary from a file, but it holds no tokenizer.model" in load_error(folder)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "BertTokenizer", "GemmaTokenizer", "T5Tokenizer"])
def test_without_any_vocabulary_file(tmp_path: Path, name: str) -> None:
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=name)
    assert "holds no tokenizer" in load_error(tmp_path)


@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_sentencepiece_model(folder: Path, size: int) -> None:
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:size])
    assert "tokenizer.model" in load_error(folder)


def test_a_vocabulary_without_merges(with_json: Path) -> None:
    """Check it because every text would become tokens of one character."""
    content = json.loads((with_json / "tokenizer.json").read_text())
    edit(with_json / "tokenizer.json", model=content["model"] | {"merges": []})
    assert "nothing in tokenizer.json says how they are merged" in load_error(with_json)
    (with_json / "tokenizer.json").unlink()
    (with_json / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    edit(with_json / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert "it holds a vocab.json but no merges.txt" in load_error(with_json)
    (with_json / "merges.txt").write_text("")
    assert "merges" in load_error(with_json)


def test_truncated_merges(with_json: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check it because a text would get other tokens than in pre-training."""
    load_tokenizer(str(with_json))
    assert caplog.text == "", "a whole one needs no warning"
    model = json.loads((with_json / "tokenizer.json").read_text())["model"]
    edit(with_json / "tokenizer.json", model=model | {"merges": model["merges"][: len(model["merges"]) // 2]})
    load_tokenizer(str(with_json))
    assert f"no merge in tokenizer.json of {with_json} makes " in caplog.text
    assert "copy or download the folder whole" in caplog.text


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_a_file_that_git_lfs_has_not_fetched(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 499723\n")
    assert f"{folder / name} is a pointer of git-lfs" in load_error(folder)


def test_a_class_with_a_built_in_vocabulary(tmp_path: Path) -> None:
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    assert len(load_tokenizer(str(tmp_path))("fox").input_ids) == 4


def test_a_tokenizer_with_custom_code(tmp_path: Path) -> None:
    (tmp_path / "letters.py").write_text(
        "from transformers import PreTrainedTokenizer\n"
        "class Letters(PreTrainedTokenizer):\n"
        "    vocab_size = 128\n"
        "    def get_vocab(self): return {chr(n): n for n in range(128)}\n"
        "    def _tokenize(self, text): return list(text)\n"
        "    def _convert_token_to_id(self, token): return ord(token)\n"
        "    def _convert_id_to_token(self, number): return chr(number)\n"
    )
    edit(tmp_path / "config.json", model_type="llama")
    edit(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["letters.Letters", None]})
    assert load_tokenizer(str(tmp_path), trust_remote_code=True)("fox").input_ids == [ord(letter) for letter in "fox"]


# real-world folders


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_first_conversions_of_llama(demo: Path, folder: Path, file: str) -> None:
    """Check folders whose special tokens are empty strings and whose class exists in no release."""
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="LLaMATokenizer", model_max_length=1e30)
    edit(folder / file, bos_token="", eos_token="", unk_token={"content": ""} if "map" in file else "")
    old, new = load_tokenizer(str(folder)), load_tokenizer(str(demo / "model"))
    assert (old.bos_token, old.eos_token, old.unk_token) == ("<s>", "</s>", "<unk>")
    text = (demo / "validation.txt").read_text() + "  1234 été\t\U0001f600"
    assert old(text, add_special_tokens=False).input_ids == new(text, add_special_tokens=False).input_ids


def test_a_tokenizer_json_of_a_newer_release(with_json: Path) -> None:
    edit(with_json / "tokenizer.json", pre_tokenizer={"type": "Futuristic"})
    assert "upgrade: pip install -U tokenizers" in load_error(with_json)


def test_a_padding_token_beyond_the_embedding(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder / "config.json", pad_token_id=512)
    config = load_config(str(folder))
    assert config.pad_token_id is None
    assert "pad_token_id 512 has no row in its embedding of 512" in caplog.text
    assert meta_model(config, torch.float32).config.vocab_size == 512


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json must hold an object, got a list"),
        ("tokenizer_config.json", '{"model_max_length": "big"}', "TypeError"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": 4}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token has to be either str or AddedToken"),
        ("tokenizer.json", "", "tokenizer.json is not JSON"),
        ("tokenizer.json", "{}", "added_tokens"),
        ("tokenizer.json", '{"added_tokens": [], "model": null}', "holds no tokenizer"),
        ("special_tokens_map.json", "{,}", "special_tokens_map.json is not JSON"),
    ],
)
def test_error_messages(with_json: Path, file: str, content: str, message: str) -> None:
    (with_json / file).write_text(content)
    assert message in load_error(with_json)


# and whatever else a file may hold

scalars = st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.sampled_from(["", "<s>", "x", "left"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "0", "x"]), inner),
    max_leaves=5,
)
SETTINGS = [
    "tokenizer_class", "model_max_length", "added_tokens_decoder", "bos_token", "eos_token", "unk_token", "pad_token",
    "extra_special_tokens", "additional_special_tokens", "chat_template", "padding_side", "truncation_side",
    "clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space", "auto_map", "init_inputs", "vocab",
    "merges", "backend", "model_input_names", "legacy", "sp_model_kwargs", "fast_tokenizer_files", "errors",
]  # fmt: skip
PARTS = ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"]
CLASSES = st.sampled_from(["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", "T5Tokenizer", "Nothing"])


folders = st.tuples(
    CLASSES,
    st.dictionaries(st.sampled_from(SETTINGS), values, max_size=3),
    st.dictionaries(st.sampled_from(["bos_token", "eos_token", "extra_special_tokens"]), values, max_size=1),
    st.dictionaries(st.sampled_from(PARTS), values, max_size=1),
)
texts = st.just("the fox") | st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def check_folder(folder: Path, changes: tuple[str, JSON, JSON, JSON], text: str) -> bool:
    """Return whether a changed tokenizer tokenizes ``text``, and check that otherwise the error is one line."""
    name, changed, special, parts = changes
    byte_level().save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    edit(folder / "tokenizer_config.json", **{"tokenizer_class": name} | changed)
    edit(folder / "tokenizer.json", **parts)
    (folder / "a.txt").write_text(text)
    message = ""
    try:
        load(folder / "a.txt", load_tokenizer(str(folder)))
    except (ModelError, DataError) as error:
        message = str(error)
    assert len(message.splitlines()) <= 1, message
    return not message


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=folders, text=texts)
def test_any_settings_load_or_are_rejected(with_json: Path, changes: tuple[str, JSON, JSON, JSON], text: str) -> None:
    check_folder(with_json, changes, text)
