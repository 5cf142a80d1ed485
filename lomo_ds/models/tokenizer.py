"""The tokenizer of a model folder."""

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
FIRST_LLAMA = "LLaMATokenizer"  # the class in the first conversions, which no release of transformers has
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte's token, which no merge makes
FEW_UNMADE = 0.01  # of a vocabulary: some have pieces that were added by hand, of which no merge is known

logger = logging.getLogger(__name__)


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        ModelError: there is none, it is not whole, or it cannot be read.
    """
    if is_preset(folder):
        raise ModelError(f"the preset {folder} has no tokenizer of its own; give one with --tokenizer_name FOLDER")
    check_no_lfs_pointers(Path(folder))
    try:
        named = _names_of_nameless(Path(folder))
        first_llama = _settings(Path(folder) / CONFIG).get("tokenizer_class") == FIRST_LLAMA
        kind = LlamaTokenizer if first_llama else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, trust_remote_code=trust_remote_code, **named)
        _refuse_without_vocabulary(folder, tokenizer)
        tokenizer("")  # wrong settings show only now
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # tokenizers raises any Exception, and a panic in Rust, which is none
        reason = _reason(error, Path(folder))
        raise ModelError(f"{folder} holds no tokenizer that transformers can read: {reason}") from error
    return tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, pad_token: str | None, others: list[str]) -> None:
    """Let ``tokenizer`` pad with ``pad_token``, and know ``others``; what it has no token for is added.

    Raises:
        ModelError: it cannot be done.
    """
    before = tokenizer.get_vocab()
    try:
        if pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        if others:
            tokenizer.add_special_tokens({"extra_special_tokens": others}, replace_extra_special_tokens=False)
        added = {token: number for token, number in tokenizer.get_vocab().items() if token not in before}
    except Exception as error:  # a tokenizer with code of its own may raise anything
        raise ModelError(f"no tokens can be added to the tokenizer: {one_line(first_line(error))}") from error
    if not set(before.values()).isdisjoint(added.values()):
        raise ModelError(
            f"no tokens can be added to the tokenizer: its numbers have gaps, and {', '.join(added)} would share one "
            "with another token; add them to the tokenizer's own files"
        )
    if pad_token in (tokenizer.bos_token, tokenizer.eos_token) and pad_token is not None:
        logger.warning(
            "--pad_token %s also begins or ends texts, and the input embedding of a padding token is not trained; "
            "a token of its own, with --resize_embeddings mean, is",
            pad_token,
        )


def _refuse_without_vocabulary(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that there is more than special tokens: transformers makes tokenizers of missing and empty files, too."""
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.added_tokens_encoder)
    files = [name for name in tokenizer.vocab_files_names.values() if name != CONFIG]
    present = [name for name in files if (Path(folder) / name).exists()]
    if len(words) < 2:  # some classes put a lone space into every vocabulary
        fault = f"{', '.join(present)} in it holds none" if present else f"it holds no {' and no '.join(files)}"
        raise ModelError(
            f"{folder} holds no tokenizer: a {type(tokenizer).__name__} reads its vocabulary from a file, and {fault}; "
            "copy or download the folder whole, or give another's with --tokenizer_name"
        )
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        _check_merges(folder, ", ".join(present) or "it", model, words)


def _check_merges(folder: str, source: str, model: dict[str, Any], words: set[str]) -> None:
    """Refuse a BPE model whose merges make none of its pieces, and warn of one whose merges lack many.

    Args:
        source: the file that holds the merges.
        words: the vocabulary, without special and added tokens.
    """
    if model["type"] != "BPE" or model["ignore_merges"]:
        return
    pieces = {word for word in words if len(word) > 1 and not BYTE.fullmatch(word)}
    unmade = pieces - {"".join(merge) for merge in model["merges"]}
    if pieces and unmade == pieces:
        raise ModelError(
            f"{folder} holds no whole tokenizer: its vocabulary has pieces of several characters, and nothing in "
            f"{source} says how they are merged; copy or download the folder whole"
        )
    if len(unmade) > FEW_UNMADE * len(words):
        logger.warning(
            "no merge in %s of %s makes %d of the tokenizer's %d pieces, such as %r, so that no text has them; if the "
            "file was cut short, copy or download the folder whole",
            source, folder, len(unmade), len(words), min(unmade),
        )  # fmt: skip


def _names_of_nameless(folder: Path) -> dict[str, str]:
    """The names in the SentencePiece model of special tokens that the folder's settings call "".

    The first conversions of LLaMA do so, and transformers looks for a token of that name without end.
    """
    nameless = set()
    for file in (CONFIG, "special_tokens_map.json"):
        for name, value in _settings(folder / file).items():
            content = value.get("content") if isinstance(value, dict) else value
            if content == "":
                nameless.add(name)
    if not nameless or not (folder / SENTENCEPIECE).is_file():
        return {}
    pieces = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE))
    numbers = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    return {name: pieces.id_to_piece(number) for name, number in numbers.items() if name in nameless and number >= 0}


def _settings(file: Path) -> dict[str, Any]:
    """What a file of settings holds; nothing where it cannot be read, which transformers will say."""
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _reason(error: BaseException, folder: Path) -> str:
    """What ``error`` says, and the way out where it is known."""
    reason = one_line(first_line(error))
    if broken := _broken_json(folder):
        return broken
    if "did not match any variant" in reason or "unknown variant" in reason:
        return f"{reason}; a newer release of tokenizers made it, so upgrade: pip install -U tokenizers transformers"
    if "tiktoken" in reason and (folder / SENTENCEPIECE).is_file():
        return f"its {SENTENCEPIECE} is not a whole SentencePiece model, nor one of tiktoken; copy or download it anew"
    if (folder / "vocab.json").exists() and not (folder / "merges.txt").exists() and "merges" in reason:
        return "it holds a vocab.json and no merges.txt; copy or download the folder whole"
    return reason if isinstance(error, ValueError | OSError) else f"{reason} ({type(error).__name__})"


def _broken_json(folder: Path) -> str | None:
    """What is wrong with the first .json file in ``folder`` that holds no object; None if all do."""
    for file in sorted(folder.glob("*.json")):
        try:
            settings = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return f"{file.name} is not JSON: {one_line(first_line(error))}"
        if not isinstance(settings, dict):
            return f"{file.name} must hold an object, got a {type(settings).__name__}"
    return None
