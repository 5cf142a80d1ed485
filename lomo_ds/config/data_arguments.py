"""The arguments of the data: files, formats, what is trained, and packing. TRL's names where it has them."""

from dataclasses import dataclass
from typing import Literal

from lomo_ds.config.parameter import parameter
from lomo_ds.data import Format, Strategy
from lomo_ds.data.formats import TEXT_FIELD
from lomo_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Arguments that decide which sequences are trained on."""

    train_file: list[str] = parameter(
        help="Training data: files (.jsonl, .json, .csv, .parquet, .arrow, .txt; .gz too), folders of them, or names "
        "of datasets on the Hugging Face hub."
    )
    train_file_weights: list[float] | None = parameter(
        None, "How often each train_file occurs in an epoch, 2 or 0.5 for example; by default once.", above=0
    )
    validation_file: list[str] | None = parameter(
        None, "Held-out data, in the same forms; without it nothing is evaluated."
    )
    validation_split_percentage: int = parameter(
        0,
        "Hold out this share of train_file's rows, drawn at random, where there is no validation_file.",
        at_least=0,
        at_most=99,
    )
    dataset_format: Format | None = parameter(
        None, "The format of all files, where their columns fit several; by default each file's columns decide."
    )
    dataset_text_field: str = parameter(TEXT_FIELD, "Column of a plain text.")
    on_bad_rows: Literal["error", "skip"] = parameter("error", "Whether a malformed row ends the run, or is left out.")
    completion_only_loss: bool | None = parameter(
        None, "Train on the completion after a prompt alone, not on the prompt; by default so."
    )
    assistant_only_loss: bool | None = parameter(
        None, "Train on the assistant's messages alone; by default so for messages, conversations and alpaca rows."
    )
    train_on_prompt: bool = parameter(False, "Train on prompts and all messages, too.")
    packing: bool | None = parameter(
        None, "Pack samples into sequences of max_seq_length; by default plain texts alone are packed."
    )
    packing_strategy: Strategy | None = parameter(
        None,
        "bfd: whole samples side by side that do not see each other, cut off at max_seq_length; bfd_split: long ones "
        "are split; wrapped: one stream, cut anywhere. By default wrapped for plain texts, else bfd.",
    )
    chat_template_path: str | None = parameter(
        None,
        "Chat template: a .jinja file, a folder with a tokenizer, or alpaca or chatml, which come with lomo_ds; by "
        "default the tokenizer's, or alpaca where it has none.",
    )
    eos_token: str | None = parameter(None, "The token that ends a text or an answer, if not the tokenizer's.")

    def validate_data(self) -> None:
        """Raise if arguments of the data contradict each other."""
        weights = self.train_file_weights
        if weights is not None and len(weights) != len(self.train_file):
            raise ConfigError(
                f"--train_file_weights must be one number for each --train_file, got {len(weights)} for "
                f"{len(self.train_file)}"
            )
        if self.validation_file and self.validation_split_percentage:
            raise ConfigError(
                "--validation_file and --validation_split_percentage both say what is held out; give one of them"
            )
        masks = [name for name in ("completion_only_loss", "assistant_only_loss") if getattr(self, name)]
        if self.train_on_prompt and masks:
            raise ConfigError(f"--train_on_prompt and --{masks[0]} contradict each other; give one of them")
        if self.packing is False and self.packing_strategy is not None:
            raise ConfigError(
                f"--packing_strategy {self.packing_strategy} was given with --packing false; leave one of them out"
            )

    def packing_strategy_of(self, is_text: bool) -> Strategy:
        """Return how samples are packed: plain texts as one stream by default, others not at all unless asked for."""
        if self.packing is False or not (self.packing or self.packing_strategy or is_text):
            return "none"
        return self.packing_strategy or ("wrapped" if is_text else "bfd")
