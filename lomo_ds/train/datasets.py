"""The datasets of a training job: its files, tokenized and packed into sequences for training and validation."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.data import (
    Chat,
    Mixture,
    PackedSequences,
    RowSource,
    Samples,
    Sequences,
    Text,
    TokenizationOptions,
    check_token_ids,
    end_tokens,
    load_samples,
    needs_chat_template,
    warn_about_unknown_tokens,
)
from lomo_ds.errors import DataError
from lomo_ds.models import set_chat_template, set_eos_token

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Datasets:
    """Sequences to train on and to evaluate with; no rank holds a copy of the tokens, which are memory-mapped.

    Attributes:
        end_tokens: ids of the tokens that end the samples to train on, at which generation should stop.
        has_chats: whether conversations are among them.
    """

    training: Sequences
    validation: Sequences | None
    end_tokens: list[int]
    has_chats: bool


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, arguments: TrainArguments) -> None:
    """Set the end token and the chat template that ``arguments`` name; conversations need a template.

    Raises:
        LomoError: there is no such token or template, or the data cannot be read.
    """
    if arguments.eos_token is not None:
        set_eos_token(tokenizer, arguments.eos_token)
    options = tokenization_options(arguments)
    sources = training_sources(arguments) + _validation_sources(arguments)
    needed = any(needs_chat_template(source, options) for source in sources)
    if needed or arguments.chat_template_path is not None:
        set_chat_template(tokenizer, arguments.chat_template_path, arguments.trust_remote_code)


def tokenization_options(arguments: TrainArguments) -> TokenizationOptions:
    """Return the options that ``arguments`` give; only answers are trained unless they say otherwise."""
    return TokenizationOptions(
        arguments.dataset_format,
        arguments.dataset_text_field,
        arguments.completion_only_loss is not False and not arguments.train_on_prompt,
        False if arguments.train_on_prompt else arguments.assistant_only_loss,
        arguments.on_bad_rows,
    )


def load_datasets(arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase, rows: int) -> Datasets:
    """Tokenize the files of a job, or map the tokens of an earlier time, and pack them into sequences.

    Args:
        rows: of the model's embeddings.

    Raises:
        DataError: a file or row cannot be used, or nothing is left to train on or to evaluate with.
    """
    training, held_out, weights, stops = [], [], [], []
    for source, weight in zip(training_sources(arguments), arguments.train_file_weights or [1.0], strict=True):
        samples = _load(source, tokenizer, rows, arguments)
        stops += _end_tokens(samples, source, tokenizer)
        kept, others = _split(len(samples), arguments, source)
        parts = _pack(samples, kept, source, "trains on", arguments)
        training += parts
        weights += [weight] * len(parts)
        held_out += _pack(samples, others, source, "holds out", arguments) if len(others) else []
    for source in _validation_sources(arguments):
        samples = _load(source, tokenizer, rows, arguments)
        held_out += _pack(samples, np.arange(len(samples)), source, "holds out", arguments)
    return Datasets(
        _mix(training, weights),
        _mix(held_out, [1.0] * len(held_out)) if held_out else None,
        list(dict.fromkeys(stops)),
        any(part.samples.are(Chat).any() for part in training),
    )


def training_sources(arguments: TrainArguments) -> list[RowSource]:
    """Return the sources to train on: all files together, or one for each weight."""
    names = arguments.train_file
    return [RowSource((name,)) for name in names] if arguments.train_file_weights else [RowSource(tuple(names))]


def _validation_sources(arguments: TrainArguments) -> list[RowSource]:
    return [RowSource(tuple(arguments.validation_file), "validation")] if arguments.validation_file else []


def _load(source: RowSource, tokenizer: PreTrainedTokenizerBase, rows: int, arguments: TrainArguments) -> Samples:
    options = tokenization_options(arguments)
    samples = load_samples(source, tokenizer, Path(arguments.output_dir) / "cache", options)
    check_token_ids(samples, source, tokenizer, rows, options)
    warn_about_unknown_tokens(samples.ids, source, tokenizer)
    counts = samples.counts
    if counts.bad:
        logger.warning("%s: %d of %d rows are malformed and left out, the first: %s",
                       source, counts.bad, counts.rows, counts.first_bad)  # fmt: skip
    if counts.empty:
        logger.info("%s: %d of %d rows are empty and left out", source, counts.empty, counts.rows)
    return samples


def _end_tokens(samples: Samples, source: RowSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end samples, those of conversations first."""
    chats = samples.are(Chat)
    of_chats, of_others = (end_tokens(samples, np.flatnonzero(kind), tokenizer) for kind in (chats, ~chats))
    if of_chats == [None]:
        raise DataError(
            f"{source}: the chat template ends an answer with no special token, so the model would not learn to stop; "
            "give another with --chat_template_path, or make its end token special with --new_special_tokens"
        )
    return [token for token in of_chats + of_others if token is not None]


def _split(count: int, arguments: TrainArguments, source: RowSource) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples to train on and those to hold out, both in order."""
    held_out = round(count * arguments.validation_split_percentage / 100)
    if not arguments.validation_split_percentage:
        return np.arange(count), np.arange(0)
    if not 0 < held_out < count:
        raise DataError(
            f"--validation_split_percentage {arguments.validation_split_percentage} holds out {held_out} of the "
            f"{count} samples of {source}, and both parts need at least one; give a --validation_file"
        )
    order = np.random.default_rng(arguments.seed).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _pack(
    samples: Samples, chosen: np.ndarray, source: RowSource, use: str, arguments: TrainArguments
) -> list[PackedSequences]:
    """Pack the ``chosen`` samples, plain texts and others by the strategy of each, and log what comes of them."""
    assert arguments.max_seq_length is not None
    is_text = samples.are(Text)[chosen]
    strategies = {arguments.packing_strategy_of(kind) for kind in (True, False) if (is_text == kind).any()}
    groups = [chosen] if len(strategies) == 1 else [chosen[is_text], chosen[~is_text]]
    parts = []
    for group in groups:
        strategy = arguments.packing_strategy_of(bool(samples.are(Text)[group[0]]))
        sequences = PackedSequences(samples, arguments.max_seq_length, strategy, group)
        _log_losses(sequences, len(group), source)
        if not len(sequences) or sequences.sizes.max() < 2:
            raise DataError(
                f"{source} has nothing to learn: none of {len(group)} samples has an answer, or a token to predict, "
                f"among the first {sequences.length} tokens; give a larger --max_seq_length, or other data"
            )
        logger.info(
            "%s: %s %d samples, %d tokens in %d sequences (%s)",
            source, use, len(group) - sequences.losses.unlabelled_samples, sequences.sizes.sum(), len(sequences),
            "not packed" if strategy == "none" else f"packing {strategy}, {sequences.padding:.1%} padding",
        )  # fmt: skip
        parts.append(sequences)
    return parts


def _log_losses(sequences: PackedSequences, count: int, source: RowSource) -> None:
    losses = sequences.losses
    if losses.cut_samples:
        logger.warning(
            "%s: %d of %d samples are longer than --max_seq_length %d and cut off, by %d tokens in all",
            source, losses.cut_samples, count, sequences.length, losses.cut_tokens,
        )  # fmt: skip
    if losses.unlabelled_tokens:
        logger.warning(
            "%s: %d of %d samples have nothing to learn within --max_seq_length and are left out, with pieces of "
            "others %d tokens", source, losses.unlabelled_samples, count, losses.unlabelled_tokens,
        )  # fmt: skip


def _mix(parts: list[PackedSequences], weights: list[float]) -> Sequences:
    return parts[0] if len(parts) == 1 and weights == [1.0] else Mixture(parts, weights)
