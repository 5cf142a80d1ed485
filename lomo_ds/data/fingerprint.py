"""A digest of everything that decides a text's tokens."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from lomo_ds.errors import DataError, one_line

FORMAT = 2  # of what lomo_ds does itself: how documents are cut, joined and marked
PLACES = {"name_or_path", "is_local", "local_files_only"}  # settings that say where a tokenizer came from


def fingerprint(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for the same file, tokenizer and libraries, in every process.

    The libraries' releases count, since they change how a tokenizer file is understood.

    Raises:
        DataError: the file cannot be read, or the tokenizer cannot be saved.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(os.fsencode(path.resolve()) + f" {status.st_size} {status.st_mtime_ns}".encode())
    digest.update(f" {FORMAT} {tokenizers.__version__} {transformers.__version__}".encode())
    digest.update(f" {tokenizer.bos_token_id} {tokenizer.eos_token_id}".encode())
    digest.update(_saved(tokenizer))
    return digest.hexdigest()[:16]


def _saved(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """The files that ``tokenizer`` is saved to, with all its settings, one behind the other."""
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer.save_pretrained(folder)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            return b"".join(f"{file.relative_to(folder)} ".encode() + _content(file) for file in files)
    except Exception as error:  # a tokenizer with code of its own may raise anything
        raise DataError(f"the tokenizer cannot be saved, as the trained model's must be: {one_line(error)}") from error


def _content(file: Path) -> bytes:
    if file.name != "tokenizer_config.json":
        return file.read_bytes()
    settings = json.loads(file.read_bytes())
    return json.dumps({name: settings[name] for name in sorted(settings.keys() - PLACES)}).encode()
