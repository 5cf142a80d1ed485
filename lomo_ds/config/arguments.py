"""The arguments of ``launch/train.py``: Hugging Face's names, from a YAML file and the command line."""

import argparse
import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from lomo_ds.errors import ConfigError, did_you_mean, one_line
from lomo_ds.numerics.precision import Precision

MAX_SEQ_LENGTH = 2048  # where none is given: longer sequences are asked for by those who have the memory
LEARNING_RATES: dict[str, float] = {"lomo": 0.03, "adamw": 5e-5, "sgd": 0.03}  # where none is given
HEADER = "# Written by lomo_ds, and written anew by the next run in this folder."  # first line of a dumped config.yaml


def _argument(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainArguments:
    """Fine-tune all the weights of a causal language model with LOMO inside DeepSpeed ZeRO-3."""

    model_name_or_path: str = field(
        metadata={"help": "Model folder (Hugging Face layout), hub name, or 7b, 13b, 30b, 65b."}
    )
    train_file: str = field(metadata={"help": 'Training text: .txt, or .jsonl with a "text" in every row.'})
    output_dir: str = field(metadata={"help": "Where the model, its tokenizer, config.yaml, metrics and runs/ go."})
    overwrite_output_dir: bool = _argument(
        False, "Begin anew where another run has been: its checkpoints are deleted, its model is replaced at the end."
    )
    validation_file: str | None = _argument(None, "Held-out text, .txt or .jsonl; without it nothing is evaluated.")
    tokenizer_name: str | None = _argument(None, "Tokenizer folder, if not the model's own.")
    pad_token: str | None = _argument(None, "The tokenizer's padding token, added to it if it has no such token.")
    new_special_tokens: str | None = _argument(
        None, "Tokens to add to the tokenizer, with commas between them; texts are never split within one."
    )
    resize_embeddings: Literal["mean", "normal"] | None = _argument(
        None,
        "Add rows to the model's embeddings, up to the tokenizer's last token: each the mean of the others, or normal "
        "as the model is initialized; by default none, and a text with a token without a row is refused.",
    )
    trust_remote_code: bool = _argument(False, "Run the code that comes with a model, where it has its own.")
    max_seq_length: int | None = _argument(
        None, f"Tokens per training sequence; by default the model's positions, {MAX_SEQ_LENGTH:,} at most."
    )
    rope_scaling: str | None = _argument(
        None,
        "Stretch rotary embeddings for longer sequences: linear, dynamic, yarn or llama3, by max_seq_length over the "
        "model's positions, or by a factor of your own, yarn:4 for example.",
    )
    per_device_train_batch_size: int = _argument(8, "Sequences per GPU and micro-batch.")
    per_device_eval_batch_size: int = _argument(8, "Sequences per GPU when evaluating.")
    gradient_accumulation_steps: int = _argument(1, "Micro-batches per optimizer step.")
    optim: Literal["lomo", "adamw", "sgd"] = _argument(
        "lomo", "adamw and sgd are torch.optim's on DeepSpeed's own ZeRO-3, to compare LOMO with."
    )
    learning_rate: float = _argument(
        LEARNING_RATES["lomo"],
        f"Peak learning rate; LOMO is SGD and wants a large one, adamw has another default, {LEARNING_RATES['adamw']}.",
    )
    weight_decay: float = _argument(0.0, "Decoupled weight decay.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _argument("linear", "Learning rate after warm-up.")
    warmup_ratio: float = _argument(0.0, "Share of all steps in which the learning rate rises from 0.")
    max_grad_norm: float = _argument(
        1.0,
        "Clip the global gradient norm to this; 0 clips nothing. The default gives way to clip_grad_value, "
        "clip_group_norm or update_schedule immediate in the DeepSpeed config.",
    )
    num_train_epochs: float = _argument(1.0, "Passes over the training text.")
    max_steps: int = _argument(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    logging_steps: int = _argument(10, "Steps between two lines of metrics.jsonl.")
    eval_steps: int | None = _argument(None, "Steps between evaluations; by default only before and after training.")
    save_steps: int | None = _argument(None, "Steps between checkpoints, and one at the end; by default none is saved.")
    save_total_limit: int | None = _argument(None, "Keep so many checkpoints; older ones are deleted, the best is not.")
    async_save: bool = _argument(False, "Write checkpoints beside training, from a copy of the shards in host memory.")
    resume_from_checkpoint: str | None = _argument(
        None,
        "auto: go on from the newest whole checkpoint in output_dir, if there is one; latest: there must be one; or "
        "the folder of a checkpoint or run.",
    )
    load_best_model_at_end: bool = _argument(False, "Export the checkpoint with the lowest held-out loss.")
    seed: int = _argument(42, "Of data order, dropout and stochastic rounding.")
    bf16: bool = _argument(
        False, 'bfloat16 weights and gradients; where "auto" in the DeepSpeed config, by default what is fast here.'
    )
    fp16: bool = _argument(False, "float16 weights and gradients with a dynamic loss scale.")
    weights: Literal["auto", "int8"] = _argument(
        "auto", "int8 keeps weights in eight bits, half of bf16's memory; auto keeps them as they are computed with."
    )
    gradient_checkpointing: bool = _argument(False, "Recompute activations in backward instead of keeping them.")
    activation_offload: bool = _argument(
        False, "Keep what gradient_checkpointing keeps, the input of every layer, in pinned host memory."
    )
    tiled_logits: bool | None = _argument(
        None,
        "Compute the loss a tile of logits at a time, and return none; by default wherever the architecture allows it.",
    )
    deepspeed: str = _argument(
        "zero3_bf16",
        "DeepSpeed config: a JSON file, or zero3_auto, zero3_bf16, zero3_bf16_offload_cpu, zero3_fp16 or zero3_fp32, "
        "which come with lomo_ds. What is absent or auto in it takes the argument's value.",
    )
    sample_prompt: str | None = _argument(None, "Print how the model continues this text before and after training.")
    sample_tokens: int = _argument(40, "Tokens in that continuation.")
    debug: bool = _argument(False, "Show the traceback behind an error message, too.")
    local_rank: int = _argument(-1, "Set by the deepspeed launcher; RANK and LOCAL_RANK are what counts.")

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                     "logging_steps", "sample_tokens"):  # fmt: skip
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("max_seq_length", self.max_seq_length is None or self.max_seq_length >= 2, "at least 2")
        for name in ("eval_steps", "save_steps", "save_total_limit"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            self._require(name, 0 <= getattr(self, name) <= sys.float_info.max, "at least 0, and finite")
        self._require("warmup_ratio", 0 <= self.warmup_ratio <= 1, "between 0 and 1")
        self._require("num_train_epochs", 0 < self.num_train_epochs <= 1e9, "above 0, and at most 1e9")
        for name, value in vars(self).items():
            if isinstance(value, int):
                self._require(name, -(2**63) <= value < 2**63, "an integer of at most 64 bits")
            if isinstance(value, str):
                self._require(name, not re.search("[\ud800-\udfff]", value), "Unicode text")
                is_line = "\0" not in value and len(value.splitlines()) <= 1
                self._require(name, is_line or name == "sample_prompt", "one line of text without NUL bytes")
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16 were both asked for, and weights have one precision; keep one of them")
        if self.activation_offload and not self.gradient_checkpointing:
            raise ConfigError(
                "--activation_offload moves the activations that --gradient_checkpointing keeps, and that was not "
                "asked for; give both"
            )
        for name in ("save_steps", "resume_from_checkpoint", "load_best_model_at_end"):
            if self.optim != "lomo" and getattr(self, name):
                raise ConfigError(
                    f"--{name} was asked for, but --optim {self.optim} is there to compare LOMO with, and keeps no "
                    "checkpoints; leave it out, or train with --optim lomo"
                )
        if self.load_best_model_at_end and not (
            self.validation_file and self.save_steps and self.eval_steps and self.save_steps % self.eval_steps == 0
        ):
            raise ConfigError(
                "--load_best_model_at_end compares the held-out losses of saved checkpoints, so it needs "
                "--validation_file, --eval_steps and --save_steps, a multiple of it, got "
                f"{self.validation_file}, {self.eval_steps} and {self.save_steps}"
            )

    @property
    def precision(self) -> Precision:
        """Of weights and gradients."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def special_tokens(self) -> list[str]:
        """To add to the tokenizer, beside that of padding."""
        return [token.strip() for token in (self.new_special_tokens or "").split(",") if token.strip()]

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"--{name} must be {rule}, got {getattr(self, name)!r}")

    def dump(self, path: Path) -> None:
        """Write every argument as YAML that ``--config`` reads back to the same run."""
        values = dataclasses.asdict(self)
        del values["local_rank"], values["overwrite_output_dir"]  # of one process, and of one start
        path.write_text(f"{HEADER}\n{yaml.safe_dump(values, sort_keys=False)}", encoding="utf-8")


def parse_arguments(argv: list[str]) -> tuple[TrainArguments, frozenset[str]]:
    """The arguments, and the names of those that were given rather than left at their default.

    ``--config FILE`` names a YAML file of arguments; the command line wins over it.

    Raises:
        ConfigError: an argument is unknown, missing or not of its type; the message says where it stands.
    """
    file, rest = _split_config(argv)
    given = _parse(_yaml_as_argv(file), f"in {one_line(file)}: ") if file else {}
    given |= _parse(rest, "")
    required = [f.name for f in dataclasses.fields(TrainArguments) if f.default is dataclasses.MISSING]
    missing = [f"--{name}" for name in required if name not in given]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given, on the command line or in --config FILE")
    learning_rate = LEARNING_RATES[given.get("optim", "lomo")]
    return TrainArguments(**({"learning_rate": learning_rate} | given)), frozenset(given)


def help_text() -> str:
    """What ``--help`` prints."""
    parser = HfArgumentParser(TrainArguments, prog="train.py", description=TrainArguments.__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these arguments; the command line wins.")
    return parser.format_help()


class _Parser(HfArgumentParser):
    """Keeps only what was given, and raises instead of exiting."""

    def __init__(self, where: str) -> None:
        super().__init__(TrainArguments, add_help=False, allow_abbrev=False)
        self.where = where
        for action in self._actions:
            action.default = argparse.SUPPRESS
            action.required = False

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.where}{one_line(message)}")


def _parse(argv: list[str], where: str) -> dict[str, Any]:
    given, unknown = _Parser(where).parse_known_args(argv)
    if unknown:
        name = one_line(unknown[0].partition("=")[0]) or "''"
        known = [f"--{field.name}" for field in dataclasses.fields(TrainArguments)]
        raise ConfigError(f"{where}unknown argument {name}{did_you_mean(name, known) or '; --help lists all'}")
    return vars(given)


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"--config needs the path of a YAML file: {one_line(error)}") from None
    return found.config, rest


class _Words(yaml.BaseLoader):
    """Leaves every scalar the word it is in the file, as a command line would, but for null.

    YAML would make a number of 007 and of 12:30, a date of 2024-01-01 and True of yes, which are names as well.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(problem="a name stands in it twice", problem_mark=node.start_mark)
        return mapping


_NULL = "tag:yaml.org,2002:null"
_Words.add_implicit_resolver(_NULL, re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Words.add_constructor(_NULL, lambda loader, node: None)


def _yaml_as_argv(file: Path) -> list[str]:
    """A YAML mapping as command-line words, so that both are checked by one parser; null leaves the default."""
    path = one_line(file)
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Words)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--config {path} is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deep to be read; it must hold `name: value` lines") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold arguments as `name: value` lines, got {type(values).__name__}")
    for name, value in values.items():
        if isinstance(value, list | dict):
            raise ConfigError(f"in {path}: {one_line(name)} must be one value, got a {type(value).__name__}")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]
