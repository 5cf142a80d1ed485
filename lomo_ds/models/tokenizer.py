"""The tokenizer of a model folder."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lomo_ds.errors import ModelError
from lomo_ds.models.files import first_line
from lomo_ds.models.presets import is_preset


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if is_preset(folder):
        raise ModelError(f"the preset {folder} has no tokenizer of its own; give one with --tokenizer_name FOLDER")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(f"{folder} holds no tokenizer that transformers can read: {first_line(error)}") from None
