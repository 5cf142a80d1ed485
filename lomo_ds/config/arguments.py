"""The arguments of ``launch/train.py``: Hugging Face's names, from a YAML file and the command line."""

import argparse
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from lomo_ds.config.data_arguments import DataArguments
from lomo_ds.config.lomo_config import OPTIMIZERS, LomoParameters, OptimizerName
from lomo_ds.config.parameter import base_type, parameter, validate_fields
from lomo_ds.errors import ConfigError, did_you_mean, one_line
from lomo_ds.numerics.precision import Precision

MAX_SEQ_LENGTH = 2048  # default limit; longer sequences must be requested
BASELINE_LEARNING_RATES: dict[str, float] = {"adamw": 5e-5, "sgd": 0.03}  # defaults
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
TRACKERS = ("tensorboard", "wandb")  # of --report_to
HEADER = "# Written by lomo_ds, and written anew by the next run in this folder."  # first line of a dumped config.yaml


@dataclass(frozen=True, kw_only=True)
class JobArguments:
    """Arguments of a training job beside its data and the optimizer's parameters."""

    model_name_or_path: str = parameter(help="Model folder (Hugging Face layout), hub name, or 7b, 13b, 30b, 65b.")
    output_dir: str = parameter(help="Where the model, its tokenizer, config.yaml, metrics and runs/ go.")
    overwrite_output_dir: bool = parameter(
        False, "Begin anew where another run has been: its checkpoints are deleted, its model is replaced at the end."
    )
    tokenizer_name: str | None = parameter(None, "Tokenizer folder, if not the model's own.")
    pad_token: str | None = parameter(None, "The tokenizer's padding token, added to it if it has no such token.")
    new_special_tokens: str | None = parameter(
        None, "Tokens to add to the tokenizer, with commas between them; texts are never split within one."
    )
    resize_embeddings: Literal["mean", "normal"] | None = parameter(
        None,
        "Add rows to the model's embeddings, up to the tokenizer's last token: each the mean of the others, or normal "
        "as the model is initialized; by default none, and a text with a token without a row is refused.",
    )
    trust_remote_code: bool = parameter(False, "Run the code that comes with a model, where it has its own.")
    max_seq_length: int | None = parameter(
        None, f"Tokens per training sequence; by default the model's positions, {MAX_SEQ_LENGTH:,} at most.", at_least=2
    )
    rope_scaling: str | None = parameter(
        None,
        "Stretch rotary embeddings for longer sequences: linear, dynamic, yarn or llama3, by max_seq_length over the "
        "model's positions, or by a factor of your own, yarn:4 for example.",
    )
    per_device_train_batch_size: int = parameter(8, "Sequences per GPU and micro-batch.", at_least=1)
    per_device_eval_batch_size: int = parameter(8, "Sequences per GPU when evaluating.", at_least=1)
    gradient_accumulation_steps: int = parameter(1, "Micro-batches per optimizer step.", at_least=1)
    optim: OptimizerName = parameter(
        "lomo",
        "lomo is SGD; adalomo adapts the learning rate of each weight, with as little memory; adamw and sgd are "
        "torch.optim's on DeepSpeed's own ZeRO-3, to compare them with.",
    )
    learning_rate: float = parameter(
        OPTIMIZERS["lomo"].learning_rate,
        "Peak learning rate; LOMO is SGD and wants a large one. The default of adalomo is "
        f"{OPTIMIZERS['adalomo'].learning_rate}, that of adamw {BASELINE_LEARNING_RATES['adamw']}.",
        at_least=0,
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = parameter("linear", "Learning rate after warm-up.")
    warmup_ratio: float = parameter(
        0.0, "Share of all steps in which the learning rate rises from 0.", at_least=0, at_most=1
    )
    max_grad_norm: float = parameter(
        1.0,
        "Clip the global gradient norm to this; 0 clips nothing, and is adalomo's default. The default gives way to "
        "clip_grad_value, clip_group_norm or update_schedule immediate in the DeepSpeed config.",
        at_least=0,
    )
    num_train_epochs: float = parameter(1.0, "Passes over the training text.", above=0, at_most=1e9)
    max_steps: int = parameter(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    report_to: str = parameter(
        "tensorboard", "Where metrics go beside metrics.jsonl: tensorboard, wandb, both with a comma between, or none."
    )
    logging_steps: int = parameter(10, "Steps between two lines of metrics.jsonl.", at_least=1)
    eval_steps: int | None = parameter(
        None, "Steps between evaluations; by default only before and after training.", at_least=1
    )
    save_steps: int | None = parameter(
        None, "Steps between checkpoints, and one at the end; by default none is saved.", at_least=1
    )
    save_total_limit: int | None = parameter(
        None, "Keep so many checkpoints; older ones are deleted, the best is not.", at_least=1
    )
    async_save: bool = parameter(False, "Write checkpoints beside training, from a copy of the shards in host memory.")
    resume_from_checkpoint: str | None = parameter(
        None,
        "auto: go on from the newest whole checkpoint in output_dir, if there is one; latest: there must be one; or "
        "the folder of a checkpoint or run.",
    )
    load_best_model_at_end: bool = parameter(False, "Export the checkpoint with the lowest held-out loss.")
    bf16: bool = parameter(
        False, 'bfloat16 weights and gradients; where "auto" in the DeepSpeed config, by default what is fast here.'
    )
    fp16: bool = parameter(False, "float16 weights and gradients with a dynamic loss scale.")
    gradient_checkpointing: bool = parameter(False, "Recompute activations in backward instead of keeping them.")
    activation_offload: bool = parameter(
        False, "Keep what gradient_checkpointing keeps, the input of every layer, in pinned host memory."
    )
    attn_implementation: Attention | None = parameter(
        None,
        "How attention is computed; by default as transformers chooses, sdpa for most models. flash_attention_2 and "
        "flash_attention_3 need their package.",
    )
    tiled_logits: bool | None = parameter(
        None,
        "Compute the loss a tile of logits at a time, and return none; by default wherever the architecture allows it.",
    )
    deepspeed: str = parameter(
        "zero3_bf16",
        "DeepSpeed config: a JSON file, or zero3_auto, zero3_bf16, zero3_bf16_offload_cpu, zero3_fp16 or zero3_fp32, "
        "which come with lomo_ds. What is absent or auto in it takes the argument's value.",
    )
    sample_prompt: str | None = parameter(
        None,
        "Print how the model continues this text, or answers it where conversations are trained, before and after "
        "training.",
        multiline=True,
    )
    sample_tokens: int = parameter(40, "Tokens in that continuation.", at_least=1)
    debug: bool = parameter(False, "Show the traceback behind an error message, too.")
    local_rank: int = parameter(-1, "Set by the deepspeed launcher; RANK and LOCAL_RANK are what counts.")


@dataclass(frozen=True, kw_only=True)
class TrainArguments(LomoParameters, DataArguments, JobArguments):
    """Fine-tune all the weights of a causal language model with LOMO or AdaLomo inside DeepSpeed ZeRO-3."""

    def __post_init__(self) -> None:
        validate_fields(self, "--")
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16 were both asked for, and weights have one precision; keep one of them")
        self._validate_report_to()
        if self.activation_offload and not self.gradient_checkpointing:
            raise ConfigError(
                "--activation_offload moves the activations that --gradient_checkpointing keeps, and that was not "
                "asked for; give both"
            )
        self.validate_data()
        for name in ("save_steps", "resume_from_checkpoint", "load_best_model_at_end"):
            if self.is_baseline and getattr(self, name):
                raise ConfigError(
                    f"--{name} was asked for, but --optim {self.optim} is there to compare with, and keeps no "
                    f"checkpoints; leave it out, or train with --optim {' or '.join(OPTIMIZERS)}"
                )
        if self.load_best_model_at_end and not (
            (self.validation_file or self.validation_split_percentage)
            and self.save_steps
            and self.eval_steps
            and self.save_steps % self.eval_steps == 0
        ):
            raise ConfigError(
                "--load_best_model_at_end compares the held-out losses of saved checkpoints, so it needs "
                "--validation_file (or --validation_split_percentage), --eval_steps and --save_steps, a multiple of "
                f"it, got {self.validation_file}, {self.eval_steps} and {self.save_steps}"
            )

    def _validate_report_to(self) -> None:
        names = self._reported_names()
        if not names or not {*names} <= {*TRACKERS, "none"} or ("none" in names and len(names) > 1):
            raise ConfigError(
                f"--report_to must be none, or one or several of {', '.join(TRACKERS)} with commas between them, got "
                f"{self.report_to!r}"
            )

    def _reported_names(self) -> list[str]:
        return [name.strip() for name in self.report_to.split(",") if name.strip()]

    @property
    def trackers(self) -> tuple[str, ...]:
        """Programs that get the metrics."""
        return tuple(name for name in self._reported_names() if name != "none")

    @property
    def is_baseline(self) -> bool:
        """Return whether the optimizer is one of DeepSpeed's own ZeRO-3, to compare with."""
        return self.optim not in OPTIMIZERS

    @property
    def precision(self) -> Precision:
        """Precision of weights and gradients."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def special_tokens(self) -> list[str]:
        """Tokens to add to the tokenizer beside the padding token."""
        return [token.strip() for token in (self.new_special_tokens or "").split(",") if token.strip()]

    def dump(self, path: Path) -> None:
        """Write every argument as YAML that ``--config`` reads back to the same run."""
        values = dataclasses.asdict(self)
        del values["local_rank"], values["overwrite_output_dir"]  # these hold for one process or one start only
        path.write_text(f"{HEADER}\n{yaml.safe_dump(values, sort_keys=False)}", encoding="utf-8")


Arguments = TypeVar("Arguments", bound=TrainArguments)


def parse_arguments(argv: list[str]) -> tuple[TrainArguments, frozenset[str]]:
    """Read the arguments of ``launch/train.py``; see ``parse``."""
    return parse(TrainArguments, argv)


def parse(kind: type[Arguments], argv: list[str]) -> tuple[Arguments, frozenset[str]]:
    """Read arguments from the command line, and from the YAML file that ``--config FILE`` names; the former wins.

    Args:
        kind: the class whose fields are the arguments.

    Returns:
        The arguments, and the names of those that were given rather than left at their default.

    Raises:
        ConfigError: an argument is unknown, missing or not of its type; the message says where.
    """
    file, rest = _split_config(argv)
    given = _parse(_yaml_as_argv(file), kind, f"in {one_line(file)}: ") if file else {}
    given |= _parse(rest, kind, "")
    required = [entry.name for entry in dataclasses.fields(kind) if entry.default is dataclasses.MISSING]
    missing = [f"--{name}" for name in required if name not in given]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given, on the command line or in --config FILE")
    return kind(**(optimizer_defaults(given.get("optim", "lomo")) | given)), frozenset(given)


def optimizer_defaults(optim: str) -> dict[str, float]:
    """Return the defaults of the arguments that depend on the optimizer."""
    if optim in OPTIMIZERS:
        kind = OPTIMIZERS[optim]
        return {"learning_rate": kind.learning_rate, "max_grad_norm": kind.max_grad_norm}
    return {"learning_rate": BASELINE_LEARNING_RATES[optim]}


def help_text(kind: type[TrainArguments] = TrainArguments, program: str = "train.py") -> str:
    """Return the text that ``--help`` prints."""
    parser = HfArgumentParser(_help_fields(kind), prog=program, description=kind.__doc__)
    _make_flags(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these arguments; the command line wins.")
    return parser.format_help()


def _help_fields(kind: type[TrainArguments]) -> Any:
    """Return a dataclass with the fields of ``kind`` and their help alone: HfArgumentParser passes on all metadata."""
    hints = get_type_hints(kind)
    fields = []
    for entry in dataclasses.fields(kind):
        metadata = {"help": entry.metadata["help"]}
        if get_origin(base_type(hints[entry.name])) is list:
            metadata["action"] = "extend"  # several values, and the name several times
        fields.append((entry.name, hints[entry.name], field(default=entry.default, metadata=metadata)))
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)


def _make_flags(parser: HfArgumentParser) -> None:
    """Let the name of a boolean alone mean true: where its default is None, HfArgumentParser expects a value."""
    for action in parser._actions:
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True


class _Parser(HfArgumentParser):
    """Keeps only the arguments that were given, and raises instead of exiting."""

    def __init__(self, kind: type[TrainArguments], source: str) -> None:
        super().__init__(_help_fields(kind), add_help=False, allow_abbrev=False)
        _make_flags(self)
        self.source = source
        for action in self._actions:
            action.default = argparse.SUPPRESS
            action.required = False

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.source}{one_line(message)}")


def _parse(argv: list[str], kind: type[TrainArguments], source: str) -> dict[str, Any]:
    given, unknown = _Parser(kind, source).parse_known_args(argv)
    if unknown:
        name = one_line(unknown[0].partition("=")[0]) or "''"
        known = [f"--{entry.name}" for entry in dataclasses.fields(kind)]
        raise ConfigError(f"{source}unknown argument {name}{did_you_mean(name, known) or '; --help lists all'}")
    return vars(given)


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        parsed, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"--config needs the path of a YAML file: {one_line(error)}") from None
    return parsed.config, rest


class _TextLoader(yaml.BaseLoader):
    """YAML loader that keeps every scalar except null as text, like a command line.

    YAML would read 007 and 12:30 as numbers, 2024-01-01 as a date and yes as True, although they may be names.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(problem="it contains a name twice", problem_mark=node.start_mark)
        return mapping


_NULL = "tag:yaml.org,2002:null"
_TextLoader.add_implicit_resolver(_NULL, re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor(_NULL, lambda loader, node: None)


def _yaml_as_argv(file: Path) -> list[str]:
    """Return a YAML mapping as command-line words, so that one parser checks both; null leaves the default."""
    path = one_line(file)
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _TextLoader)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--config {path} is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deep to be read; it must hold `name: value` lines") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold arguments as `name: value` lines, got {type(values).__name__}")
    words: list[str] = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict) for item in items):
            raise ConfigError(f"in {path}: {one_line(name)} must be one value or a list, got a {type(value).__name__}")
        words += [f"--{name}={item}" for item in items if item is not None]
    return words
