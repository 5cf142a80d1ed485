"""The chat template and end token of a tokenizer: set from arguments, and passed on to generation."""

import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lomo_ds.errors import ModelError
from lomo_ds.models.tokenizer import load_tokenizer

SHIPPED = Path(__file__).parent.parent / "chat_templates"
TOKENS = {"chatml": ["<|im_start|>", "<|im_end|>"]}  # that a shipped template needs
DEFAULT = "alpaca"  # it needs no token beyond the end token

logger = logging.getLogger(__name__)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None, trust_remote_code: bool = False) -> None:
    """Set the chat template of ``tokenizer``; without a ``path`` it keeps its own, or gets the default if it has none.

    Args:
        path: a .jinja file, a folder with a tokenizer whose template is taken, or the name of a shipped template.

    Raises:
        ModelError: there is no such template, or the tokenizer lacks a token that it needs.
    """
    missing = [token for token in TOKENS.get(path or "", []) if token not in tokenizer.get_vocab()]
    if missing:
        raise ModelError(
            f"--chat_template_path {path} needs the tokens {' and '.join(missing)}, which the tokenizer does not have; "
            f"add --new_special_tokens '{','.join(missing)}' --resize_embeddings mean"
        )
    if path is not None:
        tokenizer.chat_template = _read_template(path, trust_remote_code)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = _read_template(DEFAULT, trust_remote_code)
        logger.info("the tokenizer has no chat template; conversations are written in the form of %s", DEFAULT)


def set_eos_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Make ``token`` the end token of ``tokenizer``.

    Raises:
        ModelError: the tokenizer does not have it.
    """
    if token not in tokenizer.get_vocab():
        raise ModelError(
            f"--eos_token {token} is not a token of the tokenizer; add it with --new_special_tokens and "
            "--resize_embeddings, or give one that it has"
        )
    tokenizer.eos_token = token


def add_stop_token(model: PreTrainedModel, token_id: int) -> None:
    """Let ``generate`` stop at ``token_id``, too."""
    stops = model.generation_config.eos_token_id
    known = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if token_id not in known:
        model.generation_config.eos_token_id = [token_id, *known] if known else token_id


def _read_template(path: str, trust_remote_code: bool) -> str:
    shipped = SHIPPED / f"{path}.jinja"
    file = shipped if shipped.parent == SHIPPED and shipped.exists() else Path(path)
    if file.is_dir():
        template = load_tokenizer(str(file), trust_remote_code).chat_template
        if not template:
            raise ModelError(f"--chat_template_path {path} is a tokenizer without a chat template")
        return template
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(template.stem for template in SHIPPED.glob("*.jinja")))
        raise ModelError(
            f"--chat_template_path {path} cannot be read: {getattr(error, 'strerror', None) or error}; give a .jinja "
            f"file, a folder with a tokenizer, or one of {names}"
        ) from None
