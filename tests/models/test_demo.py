"""Tests that the demo's files are reproducible and consistent with each other."""

import hashlib
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lomo_ds.models.demo import POSITIONS, VOCABULARY, make_demo


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_files_are_reproducible(demo: Path, tmp_path: Path) -> None:
    make_demo(tmp_path)
    assert digests(tmp_path) == digests(demo)


def test_tokenizer_matches_model(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    config = AutoModelForCausalLM.from_pretrained(demo / "model").config
    assert len(tokenizer) == config.vocab_size == VOCABULARY
    assert config.max_position_embeddings == POSITIONS
    text = "One day a brave fox called Anna found a shiny key under the oak."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
