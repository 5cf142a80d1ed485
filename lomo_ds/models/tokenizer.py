"""Loading of the tokenizer in a model folder, with checks that it is complete."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from lomo_ds.errors import ModelError, one_line
from lomo_ds.models.files import first_line
from lomo_ds.models.presets import is_preset
from lomo_ds.models.verify import check_no_lfs_pointers

CONFIG, SENTENCEPIECE = "tokenizer_config.json", "tokenizer.model"
FIRST_LLAMA = "LLaMATokenizer"  # class name in the first LLaMA conversions, which no release of transformers has
BYTE = re.compile("<0x[0-9A-F]{2}>")  # token of a byte, which no merge produces
MAX_UNMERGED = 0.01  # accepted share of the vocabulary without a merge; some have pieces that were added manually

logger = logging.getLogger(__name__)


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in ``folder``.

    Raises:
        ModelError: the folder has no tokenizer, or it is incomplete or unreadable.
    """
    if is_preset(folder):
        raise ModelError(f"the preset {folder} has no tokenizer of its own; give one with --tokenizer_name FOLDER")
    check_no_lfs_pointers(Path(folder))
    try:
        special_tokens = _sentencepiece_special_tokens(Path(folder))
        first_llama = _settings(Path(folder) / CONFIG).get("tokenizer_class") == FIRST_LLAMA
        tokenizer_class = LlamaTokenizer if first_llama else AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=trust_remote_code, **special_tokens)
        _check_has_vocabulary(folder, tokenizer)
        tokenizer("")  # some invalid settings raise only on the first call
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # tokenizers raises any Exception, and Rust panics, which are not Exceptions
        reason = _reason(error, Path(folder))
        raise ModelError(f"{folder} holds no tokenizer that transformers can read: {reason}") from error
    return tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, pad_token: str | None, extra_tokens: list[str]) -> None:
    """Set the padding token and extra special tokens of ``tokenizer``, and add those it does not have yet.

    Raises:
        ModelError: tokens cannot be added.
    """
    before = tokenizer.get_vocab()
    try:
        if pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        if extra_tokens:
            tokenizer.add_special_tokens({"extra_special_tokens": extra_tokens}, replace_extra_special_tokens=False)
        added = {token: number for token, number in tokenizer.get_vocab().items() if token not in before}
    except Exception as error:  # a tokenizer with custom code may raise anything
        raise ModelError(f"no tokens can be added to the tokenizer: {one_line(first_line(error))}") from error
    if not set(before.values()).isdisjoint(added.values()):
        raise ModelError(
            f"no tokens can be added to the tokenizer: its numbers have gaps, so {', '.join(added)} would share one "
            "with another token; add them to the tokenizer's own files"
        )
    if pad_token in (tokenizer.bos_token, tokenizer.eos_token) and pad_token is not None:
        logger.warning(
            "--pad_token %s also begins or ends texts, but the input embedding of a padding token is not trained; "
            "to train it, use a separate padding token with --resize_embeddings mean",
            pad_token,
        )


def _check_has_vocabulary(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that there are more than special tokens, because transformers accepts missing and empty files."""
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.added_tokens_encoder)
    files = [name for name in tokenizer.vocab_files_names.values() if name != CONFIG]
    present = [name for name in files if (Path(folder) / name).exists()]
    if len(words) < 2:  # some classes add a single space to every vocabulary
        fault = f"{', '.join(present)} in it holds none" if present else f"it holds no {' and no '.join(files)}"
        raise ModelError(
            f"{folder} holds no tokenizer: a {type(tokenizer).__name__} reads its vocabulary from a file, but {fault}; "
            "copy or download the folder whole, or give another tokenizer with --tokenizer_name"
        )
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        _check_merges(folder, ", ".join(present) or "it", model, words)


def _check_merges(folder: str, source: str, model: dict[str, Any], words: set[str]) -> None:
    """Check that the merges of a BPE model produce its pieces, and warn if many pieces have no merge.

    Args:
        source: the file that holds the merges.
        words: the vocabulary without special and added tokens.

    Raises:
        ModelError: the merges produce none of the pieces.
    """
    if model["type"] != "BPE" or model["ignore_merges"]:
        return
    pieces = {word for word in words if len(word) > 1 and not BYTE.fullmatch(word)}
    unmerged = pieces - {"".join(merge) for merge in model["merges"]}
    if pieces and unmerged == pieces:
        raise ModelError(
            f"{folder} holds no whole tokenizer: its vocabulary has pieces of several characters, and nothing in "
            f"{source} says how they are merged; copy or download the folder whole"
        )
    if len(unmerged) > MAX_UNMERGED * len(words):
        logger.warning(
            "no merge in %s of %s makes %d of the tokenizer's %d pieces, such as %r, so that no text has them; if the "
            "file was cut short, copy or download the folder whole",
            source, folder, len(unmerged), len(words), min(unmerged),
        )  # fmt: skip


def _sentencepiece_special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens in the SentencePiece model for which the folder's settings have an empty string.

    The first LLaMA conversions have such settings, and transformers never stops searching for an empty token.
    """
    empty_names = set()
    for file in (CONFIG, "special_tokens_map.json"):
        for name, value in _settings(folder / file).items():
            content = value.get("content") if isinstance(value, dict) else value
            if content == "":
                empty_names.add(name)
    if not empty_names or not (folder / SENTENCEPIECE).is_file():
        return {}
    pieces = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE))
    numbers = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    return {name: pieces.id_to_piece(number) for name, number in numbers.items() if name in empty_names and number >= 0}


def _settings(file: Path) -> dict[str, Any]:
    """Return the settings in a JSON file, or an empty dict if it is unreadable, which transformers will report."""
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _reason(error: BaseException, folder: Path) -> str:
    """Return the message of ``error``, with a solution if one is known."""
    reason = one_line(first_line(error))
    if broken := _broken_json(folder):
        return broken
    if "did not match any variant" in reason or "unknown variant" in reason:
        return f"{reason}; a newer release of tokenizers made it, so upgrade: pip install -U tokenizers transformers"
    if "tiktoken" in reason and (folder / SENTENCEPIECE).is_file():
        return f"its {SENTENCEPIECE} is neither a SentencePiece nor a tiktoken model; copy or download it again"
    if (folder / "vocab.json").exists() and not (folder / "merges.txt").exists() and "merges" in reason:
        return "it holds a vocab.json but no merges.txt; copy or download the folder whole"
    return reason if isinstance(error, ValueError | OSError) else f"{reason} ({type(error).__name__})"


def _broken_json(folder: Path) -> str | None:
    """Return the error of the first .json file in ``folder`` that is not a JSON object, or None if all are."""
    for file in sorted(folder.glob("*.json")):
        try:
            settings = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return f"{file.name} is not JSON: {one_line(first_line(error))}"
        if not isinstance(settings, dict):
            return f"{file.name} must hold an object, got a {type(settings).__name__}"
    return None
