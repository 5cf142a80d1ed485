"""A digest of everything that determines the tokens of a source: files, tokenizer, options and library versions."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from lomo_ds.data.rows import RowSource
from lomo_ds.errors import DataError, one_line

FORMAT = 3  # version of lomo_ds' own processing: how rows are read, rendered, labelled and marked
LOCATION_SETTINGS = {"name_or_path", "is_local", "local_files_only"}  # where a tokenizer was loaded from


def fingerprint(source: RowSource, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """Return a digest that is equal in every process for the same files, tokenizer, options and library versions.

    Library versions are included because they can change how a tokenizer file is interpreted. Of a dataset on the hub
    only the name is known.

    Args:
        options: JSON values that decide how rows are read.

    Raises:
        DataError: a file cannot be read, or the tokenizer cannot be saved.
    """
    digest = hashlib.sha256(json.dumps([source.split, options]).encode())
    for part in source.parts():
        digest.update(_identity(part) if isinstance(part, Path) else part.encode())
    digest.update(f" {FORMAT} {tokenizers.__version__} {transformers.__version__}".encode())
    digest.update(f" {tokenizer.bos_token_id} {tokenizer.eos_token_id}".encode())
    digest.update(_serialize(tokenizer))
    return digest.hexdigest()[:16]


def _identity(file: Path) -> bytes:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    return os.fsencode(file.resolve()) + f" {status.st_size} {status.st_mtime_ns} ".encode()


def _serialize(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Save ``tokenizer`` and return its files, which hold all its settings, concatenated."""
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer.save_pretrained(folder)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            return b"".join(f"{file.relative_to(folder)} ".encode() + _content(file) for file in files)
    except Exception as error:  # a tokenizer with custom code may raise anything
        raise DataError(
            f"the tokenizer must be saved with the trained model, but it cannot be saved: {one_line(error)}"
        ) from error


def _content(file: Path) -> bytes:
    if file.name != "tokenizer_config.json":
        return file.read_bytes()
    settings = json.loads(file.read_bytes())
    return json.dumps({name: settings[name] for name in sorted(settings.keys() - LOCATION_SETTINGS)}).encode()
