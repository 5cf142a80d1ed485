"""The inputs of a training job: configuration, model folder, tokenizer and data, read before anything is built."""

import dataclasses
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.ds_config import resolve_config
from lomo_ds.data import check_prompt, highest_id
from lomo_ds.distributed.collectives import raise_on_all_ranks
from lomo_ds.distributed.process_group import is_local_main_process
from lomo_ds.errors import ConfigError
from lomo_ds.models import (
    add_special_tokens,
    find_model,
    load_config,
    load_tokenizer,
    scale_rope,
    sequence_length,
    set_attention,
    set_vocab_size,
    verify_export,
)
from lomo_ds.numerics.precision import FastPrecision
from lomo_ds.train.datasets import Datasets, load_datasets, prepare_tokenizer
from lomo_ds.train.output_folder import check_foreign_files, check_input_files, check_input_overlap, lock_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Everything that a training job reads before it looks for a checkpoint.

    Attributes:
        arguments: as resolved, their sequence length included.
        ds_config: reconciled with the arguments; fields that depend on the number of steps are still ``auto``.
        model_name: the model's folder, or the name of a preset.
        config: of the model to be trained, whose embeddings may have more rows than are stored.
        stored_rows: rows of the stored embeddings.
    """

    arguments: TrainArguments
    ds_config: dict[str, Any]
    model_name: str
    config: PretrainedConfig
    stored_rows: int
    tokenizer: PreTrainedTokenizerBase
    datasets: Datasets

    @property
    def output_dir(self) -> Path:
        """The folder that the job writes."""
        return Path(self.arguments.output_dir)


def read_inputs(arguments: TrainArguments, explicit: frozenset[str], fast: FastPrecision, lock: ExitStack) -> Inputs:
    """Read the inputs on all ranks; the first rank of each host downloads the model and tokenizes the data.

    Args:
        explicit: names of the arguments that the user set, rather than left at their default.
        lock: holds the lock of the output folder until it is closed.

    Raises:
        LomoError: an input is missing, damaged or contradicts another one; the other ranks raise ``PeerError``.
    """
    is_first = is_local_main_process()
    inputs = raise_on_all_ranks(lambda: _read(arguments, explicit, fast, lock, download=True) if is_first else None)
    return raise_on_all_ranks(lambda: inputs or _read(arguments, explicit, fast, lock, download=False))


def _read(
    arguments: TrainArguments, explicit: frozenset[str], fast: FastPrecision, lock: ExitStack, download: bool
) -> Inputs:
    ds_config, arguments, from_hardware = resolve_config(arguments, explicit, dist.get_world_size(), fast.precision)
    if from_hardware:
        logger.info("precision auto: %s, for %s", arguments.precision, fast.reason)
    name = find_model(arguments.model_name_or_path, download, arguments.trust_remote_code)
    verify_export(name, dist.get_rank(), dist.get_world_size(), weights=False)
    output_dir = Path(arguments.output_dir)
    _claim_folder(output_dir, name, arguments)
    if dist.get_rank() == 0:
        lock.enter_context(lock_folder(output_dir))
    config, stored_rows, tokenizer = _load_vocabulary(name, arguments)
    arguments = dataclasses.replace(arguments, max_seq_length=sequence_length(config, arguments.max_seq_length))
    prepare_tokenizer(tokenizer, arguments)
    datasets = load_datasets(arguments, tokenizer, config.vocab_size)
    return Inputs(arguments, ds_config, name, config, stored_rows, tokenizer, datasets)


def _claim_folder(output_dir: Path, model: str, arguments: TrainArguments) -> None:
    """Create the output folder, after checking that the run overwrites no foreign files."""
    check_input_overlap(output_dir, [model, *([arguments.tokenizer_name] if arguments.tokenizer_name else [])])
    check_foreign_files(output_dir)
    check_input_files(arguments)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir} cannot be created: {error.strerror}") from None


def _load_vocabulary(name: str, arguments: TrainArguments) -> tuple[PretrainedConfig, int, PreTrainedTokenizerBase]:
    """Load the model's configuration and tokenizer, and make room for new tokens where that was asked for.

    Returns:
        The configuration of the model to be trained, the rows of the stored embeddings, and the tokenizer.
    """
    config = load_config(name, arguments.trust_remote_code)
    if arguments.rope_scaling is not None:
        scale_rope(config, arguments.rope_scaling, arguments.max_seq_length)
    if arguments.attn_implementation is not None:
        set_attention(config, arguments.attn_implementation, arguments.precision)
    tokenizer = load_tokenizer(arguments.tokenizer_name or name, arguments.trust_remote_code)
    add_special_tokens(tokenizer, arguments.pad_token, arguments.special_tokens)
    stored_rows, highest = config.vocab_size, highest_id(tokenizer)
    if arguments.resize_embeddings and highest >= stored_rows:
        set_vocab_size(config, highest + 1)
        logger.info("the embeddings are extended from %d to %d rows for new tokens", stored_rows, config.vocab_size)
    if _has_new_padding(tokenizer, arguments, stored_rows, config.vocab_size):
        config.pad_token_id = tokenizer.pad_token_id
    if highest >= config.vocab_size:
        logger.info(
            "the tokenizer has tokens up to number %d, and the model's embedding rows up to %d; a text with a token "
            "beyond them will be refused", highest, config.vocab_size - 1,
        )  # fmt: skip
    if arguments.sample_prompt is not None:
        check_prompt(arguments.sample_prompt, tokenizer, config.vocab_size)
    return config, stored_rows, tokenizer


def _has_new_padding(
    tokenizer: PreTrainedTokenizerBase, arguments: TrainArguments, stored_rows: int, rows: int
) -> bool:
    """Return whether the padding token was requested, or had no embedding row before, and has one now."""
    pad = tokenizer.pad_token_id
    return pad is not None and pad < rows and (arguments.pad_token is not None or pad >= stored_rows)
