"""The training loop: the one room that knows all the others."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase, get_scheduler

from lomo_ds import zero3
from lomo_ds.arguments import TrainArguments
from lomo_ds.config import parse_ds_config, refuse_what_cannot_be
from lomo_ds.data import PackedBlocks, evaluation_batches, tokenize_file, training_loader
from lomo_ds.distributed import is_local_main_process, together
from lomo_ds.ds_config import fill_scheduler, read_ds_config, reconcile, warmup_steps
from lomo_ds.engine import LomoEngine, initialize
from lomo_ds.errors import ConfigError, DataError, ModelError
from lomo_ds.evaluate import continue_text, evaluate_loss
from lomo_ds.models import find_model, load_config, load_model, load_tokenizer, save_pretrained, verify_export
from lomo_ds.monitor import Monitor

MicroBatches = list[dict[str, Tensor]]


def train(arguments: TrainArguments, given: frozenset[str]) -> None:
    """Fine-tune as ``arguments`` say; the process group must have been started.

    Args:
        given: the arguments that were given, as opposed to left at their default.

    Raises:
        LomoError: in the user's words, on the rank that knows; the others raise ``PeerError``.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ds_config, arguments = together(
        lambda: reconcile(read_ds_config(arguments.deepspeed), arguments, given, world_size)
    )
    output_dir = Path(arguments.output_dir)
    together(lambda: _make_folder(output_dir))
    name = _find_model(arguments)
    config, tokenizer, length = together(lambda: _load_vocabulary(name, arguments))
    training, validation = _load_blocks(arguments, tokenizer, length, output_dir / "cache")
    loader, sampler = training_loader(training, arguments.per_device_train_batch_size, rank, world_size, arguments.seed)
    steps = TrainingSteps(loader, sampler, arguments)
    filled = together(lambda: _checked(fill_scheduler(ds_config, arguments, steps.total)))

    torch.manual_seed(arguments.seed + rank)
    together(lambda: verify_export(name, rank, world_size))
    model = together(
        lambda: load_model(name, config, filled, _dtype(arguments), arguments.seed, arguments.trust_remote_code)
    )
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scheduler = None if "scheduler" in filled else _scheduler(arguments, steps.total)
    engine, *_ = initialize(model=model, config=filled, lr_scheduler=scheduler)
    if rank == 0:
        dataclasses.replace(arguments, max_seq_length=length).dump(output_dir / "config.yaml")
        (output_dir / "ds_config.json").write_text(json.dumps(filled, indent=2), encoding="utf-8")
    with Monitor(output_dir, rank) as monitor:
        Trainer(arguments, engine, tokenizer, steps, validation, monitor).run()


class TrainingSteps:
    """The micro-batches of every optimizer step of a run, in order."""

    def __init__(self, loader: Any, sampler: Any, arguments: TrainArguments) -> None:
        self.loader = loader
        self.sampler = sampler
        self.accumulation = arguments.gradient_accumulation_steps
        self.per_epoch = -(-len(loader) // self.accumulation)
        epochs = math.ceil(arguments.num_train_epochs * self.per_epoch)
        self.total = arguments.max_steps if arguments.max_steps > 0 else epochs

    def __iter__(self) -> Iterator[MicroBatches]:
        return itertools.islice(self._endless(), self.total)

    def _endless(self) -> Iterator[MicroBatches]:
        for epoch in itertools.count():
            self.sampler.set_epoch(epoch)
            batches = iter(self.loader)
            while micro_batches := list(itertools.islice(batches, self.accumulation)):
                yield micro_batches


class Trainer:
    """Steps, evaluations and log lines of one run, and the model saved at its end."""

    def __init__(
        self,
        arguments: TrainArguments,
        engine: LomoEngine,
        tokenizer: PreTrainedTokenizerBase,
        steps: TrainingSteps,
        validation: PackedBlocks | None,
        monitor: Monitor,
    ) -> None:
        self.arguments = arguments
        self.engine = engine
        self.tokenizer = tokenizer
        self.steps = steps
        self.validation = validation
        self.monitor = monitor
        self.is_main = dist.get_rank() == 0
        self.bar = tqdm(total=steps.total, unit="step", disable=not self.is_main, dynamic_ncols=True)
        self.step = 0
        self.tokens = 0
        self.losses: list[float] = []  # since the last log line

    def run(self) -> None:
        """Train, evaluate before, on the way and after, save, and say where everything is."""
        self._say(self._describe())
        before, sample_before = self._evaluate(), self._sample()
        if before:
            self.monitor.log(0, before)
        after = self._train()
        sample_after = self._sample()
        output_dir = Path(self.arguments.output_dir)
        save_pretrained(self.engine.module, self.tokenizer, output_dir)
        self.bar.close()
        if before and after:
            self._say(
                f"held-out loss: {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after (nats per token)"
            )
        if sample_before is not None:
            self._say(f"before: {sample_before!r}\nafter:  {sample_after!r}")
        self._say(
            f"model, tokenizer and config.yaml: {output_dir}\nmetrics: {output_dir / 'metrics.jsonl'}\n"
            f"TensorBoard: tensorboard --logdir {output_dir / 'runs'}"
        )

    def _train(self) -> dict[str, float]:
        """All steps; returns the evaluation after the last."""
        clock, counted = time.perf_counter(), 0  # when the last log line was written, and the tokens by then
        evaluation: dict[str, float] = {}
        for micro_batches in self.steps:
            learning_rate = self.engine.get_lr()[0]
            self.losses.append(float(self.engine.train_batch(micro_batches)))
            self.step += 1
            self.tokens += dist.get_world_size() * sum(batch["input_ids"].numel() for batch in micro_batches)
            self.bar.update()
            record: dict[str, float] = {}
            if self._is_due(self.arguments.logging_steps):
                record |= self._metrics(learning_rate, (self.tokens - counted) / (time.perf_counter() - clock))
                self._show(record)
            if self._is_due(self.arguments.eval_steps):
                evaluation = self._evaluate()
                record |= evaluation
            if record:
                self.monitor.log(self.step, record)
                clock, counted = time.perf_counter(), self.tokens
        return evaluation

    def _is_due(self, every: int | None) -> bool:
        return self.step == self.steps.total or bool(every and self.step % every == 0)

    def _metrics(self, learning_rate: float, tokens_per_second: float) -> dict[str, float]:
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        self.losses.clear()
        norm = self.engine.get_global_grad_norm()
        return {
            "epoch": self.step / self.steps.per_epoch,
            "loss": fmean(finite) if finite else math.nan,
            "learning_rate": learning_rate,
            "grad_norm": math.nan if norm is None else norm,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / dist.get_world_size(),
            "tokens": float(self.tokens),
            "loss_scale": self.engine.cur_scale,
            "skipped_steps": float(self.engine.skipped_steps),
        }

    def _show(self, metrics: dict[str, float]) -> None:
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s, "
            f"lr {metrics['learning_rate']:.2g}, norm {metrics['grad_norm']:.2f}"
        )

    def _evaluate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        batches = evaluation_batches(
            self.validation, self.arguments.per_device_eval_batch_size, dist.get_rank(), dist.get_world_size()
        )
        return {"eval_loss": evaluate_loss(self.engine, batches)}

    def _sample(self) -> str | None:
        if self.arguments.sample_prompt is None:
            return None
        return continue_text(self.engine, self.tokenizer, self.arguments.sample_prompt, self.arguments.sample_tokens)

    def _describe(self) -> str:
        arguments, gpus = self.arguments, dist.get_world_size()
        sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        blocks = self.steps.loader.dataset
        numel = sum(zero3.whole_shape(parameter).numel() for parameter in self.engine.module.parameters())
        return (
            f"model: {numel / 1e6:.2f}M parameters, all of them trained, on {gpus} ranks\n"
            f"batch: {arguments.per_device_train_batch_size} sequences x {arguments.gradient_accumulation_steps} "
            f"accumulated = {sequences} per GPU, x {gpus} GPUs = {sequences * gpus} in total; "
            f"{sequences * gpus * blocks.length} tokens per step\n"
            f"steps: {self.steps.total} ({self.steps.per_epoch} per epoch of {len(blocks)} sequences)"
        )

    def _say(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)


def _checked(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The config itself, refused before a model is loaded for nothing."""
    refuse_what_cannot_be(ds_config)
    parse_ds_config(ds_config)
    return ds_config


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be made: {error.strerror}") from None


def _find_model(arguments: TrainArguments) -> str:
    """The folder of the model, or a preset's name; what has to be downloaded is, once on each host."""
    name = arguments.model_name_or_path
    together(lambda: find_model(name) if is_local_main_process() else None)
    return together(lambda: find_model(name, download=False))


def _load_vocabulary(name: str, arguments: TrainArguments) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, int]:
    """The model's configuration, the tokenizer, and a sequence length that both allow."""
    config = load_config(name, arguments.trust_remote_code)
    tokenizer = load_tokenizer(arguments.tokenizer_name or name, arguments.trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer's vocabulary of {len(tokenizer)} does not fit the model's embedding of "
            f"{config.vocab_size} rows; give the model's own tokenizer with --tokenizer_name"
        )
    positions = getattr(config, "max_position_embeddings", None)
    length = arguments.max_seq_length or positions
    if length is None:
        raise ConfigError("the model's config.json names no max_position_embeddings; give --max_seq_length")
    if positions is not None and length > positions:
        raise ConfigError(
            f"--max_seq_length {length} is longer than the model's {positions} positions; use at most {positions}"
        )
    return config, tokenizer, length


def _load_blocks(
    arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase, length: int, cache: Path
) -> tuple[PackedBlocks, PackedBlocks | None]:
    def tokenized(file: str) -> PackedBlocks:
        tokens = tokenize_file(Path(file), tokenizer, cache)
        if len(tokens) < 2:
            raise DataError(f"{file} gives {len(tokens)} token; there is nothing to predict in fewer than 2")
        return PackedBlocks(tokens, length)

    def both() -> tuple[PackedBlocks, PackedBlocks | None]:
        return tokenized(arguments.train_file), tokenized(
            arguments.validation_file
        ) if arguments.validation_file else None

    together(lambda: both() if is_local_main_process() else None)  # one rank of each host tokenizes, the others map
    return together(both)


def _dtype(arguments: TrainArguments) -> torch.dtype:
    if arguments.bf16:
        return torch.bfloat16
    return torch.float16 if arguments.fp16 else torch.float32


def _scheduler(arguments: TrainArguments, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    warmup = warmup_steps(arguments, total_steps)
    name = "constant_with_warmup" if arguments.lr_scheduler_type == "constant" else arguments.lr_scheduler_type
    return lambda optimizer: get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
