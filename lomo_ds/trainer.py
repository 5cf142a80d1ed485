"""The training loop: steps, evaluations, log lines, checkpoints, and the model exported at the end."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

import deepspeed.comm as dist
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lomo_ds import zero3
from lomo_ds.arguments import TrainArguments
from lomo_ds.checkpoint import checkpoint_name, rotate
from lomo_ds.data import PackedBlocks, Position, TrainingSteps, evaluation_batches
from lomo_ds.distributed import agree
from lomo_ds.engine import LomoEngine
from lomo_ds.errors import CheckpointError
from lomo_ds.evaluate import continue_text, evaluate_loss
from lomo_ds.models import save_pretrained
from lomo_ds.monitor import Monitor
from lomo_ds.signals import StopRequest

logger = logging.getLogger(__name__)

FINISHED = "finished.json"


def mark_finished(output_dir: Path, steps: int) -> None:
    """Note that a run of so many steps has ended, and its model is whole."""
    (output_dir / FINISHED).write_text(json.dumps({"steps": steps}) + "\n", encoding="utf-8")


def is_finished(output_dir: Path, steps: int) -> bool:
    """Whether a run of so many steps has ended here."""
    try:
        return json.loads((output_dir / FINISHED).read_text(encoding="utf-8")) == {"steps": steps}
    except (OSError, ValueError):
        return False


@dataclass
class Progress:
    """What the loop itself must remember when it is stopped and goes on, as JSON."""

    step: int = 0
    epoch: int = 0
    consumed: int = 0  # sequences of the epoch under way
    losses: list[float] = field(default_factory=list)  # since the last log line
    unlogged: dict[str, float] | None = None  # of a step whose evaluation was cut short
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before the first step
    sample_before: str | None = None
    best: float | None = None  # the lowest held-out loss of a saved checkpoint
    best_step: int | None = None
    saved_step: int | None = None  # of the last checkpoint that is whole
    failed_saves: int = 0

    @property
    def position(self) -> Position:
        """Where the data goes on."""
        return Position(self.epoch, self.consumed)


class Trainer:
    """Runs what is left of a training job; stopped and resumed, it does what it would have done without.

    Args:
        progress: of the run so far.
        stop: once asked for, the step under way is the last.
        add_files: writes what checkpoints hold beside the engine's state into the folder it is given.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        engine: LomoEngine,
        tokenizer: PreTrainedTokenizerBase,
        steps: TrainingSteps,
        validation: PackedBlocks | None,
        monitor: Monitor,
        progress: Progress,
        stop: StopRequest,
        add_files: Callable[[Path], None],
    ) -> None:
        self.arguments = arguments
        self.engine = engine
        self.tokenizer = tokenizer
        self.steps = steps
        self.validation = validation
        self.monitor = monitor
        self.progress = progress
        self.stop = stop
        self.add_files = add_files
        self.output_dir = Path(arguments.output_dir)
        self.is_main = dist.get_rank() == 0
        self.bar = tqdm(
            total=steps.total, initial=steps.step, unit="step", disable=not self.is_main, dynamic_ncols=True
        )
        self.clock, self.counted = time.perf_counter(), steps.tokens  # at the last log line
        self.evaluation: dict[str, float] = {}  # the last one, after evaluated_step
        self.evaluated_step: int | None = None
        self.pending: Progress | None = None  # of a checkpoint that is being written

    def run(self) -> None:
        """Train, evaluate before, on the way and after, export, and say where everything is."""
        with self.bar:  # whatever ends the run begins on a line of its own
            self._run()

    def _run(self) -> None:
        self._say(self._describe())
        if self.steps.step == 0:
            evaluation = self._evaluate()
            if evaluation is None:
                return self._say_stopped()
            self.progress.before, self.progress.sample_before = evaluation, self._sample()
            if evaluation:
                self.monitor.log(0, evaluation)
        else:
            self._say(f"resumed: {self.steps.step} steps of {self.steps.total} were done")
        finished = self._train()
        self._settle_save()
        if not finished:
            return self._say_stopped()
        sample_after = self._sample()
        self._load_best()
        save_pretrained(self.engine.module, self.tokenizer, self.output_dir)
        if self.is_main:
            mark_finished(self.output_dir, self.steps.total)
        self.bar.close()
        self._say_results(sample_after)
        return None

    def _train(self) -> bool:
        """The steps that are left; False if a signal has ended them early, with a checkpoint."""
        if self.progress.unlogged is not None and not self._end_step(self.progress.unlogged):
            return False
        if self._stop_requested():
            return False
        for micro_batches in self.steps:
            learning_rate = self.engine.get_lr()[0]
            self.progress.losses.append(float(self.engine.train_batch(micro_batches)))
            self.bar.update()
            record: dict[str, float] = {}
            if self._is_due(self.arguments.logging_steps):
                record |= self._metrics(learning_rate)
                self._show(record)
            if not self._end_step(record):
                return False
        return True

    def _end_step(self, record: dict[str, float]) -> bool:
        """Evaluate, log and save, as far as they are due; False if this was the last step for a signal's sake."""
        stopping = self._stop_requested()
        if self._is_due(self.arguments.eval_steps):
            evaluation = None if stopping else self._evaluate()
            if evaluation is None:
                self.progress.unlogged = record
                self._save(last=True)
                return False
            self.evaluation, self.evaluated_step = evaluation, self.steps.step
            record |= evaluation
        self.progress.unlogged = None
        if record:
            self.monitor.log(self.steps.step, record)
            self.clock, self.counted = time.perf_counter(), self.steps.tokens
        if stopping or (self.arguments.save_steps and self._is_due(self.arguments.save_steps)):
            self._save(last=stopping)
        return not stopping

    def _is_due(self, every: int | None) -> bool:
        return self.steps.step == self.steps.total or bool(every and self.steps.step % every == 0)

    def _stop_requested(self) -> bool:
        """Whether any rank has received a signal; all ranks ask at the same time."""
        asked = torch.tensor(float(self.stop.name is not None), device=self.engine.device)
        return bool(agree(asked, self.engine.seq_data_parallel_group).item())

    def _save(self, last: bool = False) -> None:
        """Write a checkpoint; a failure ends the run if it is the last one, or if none was ever written."""
        self._settle_save()
        self.pending = self._state_to_save()
        in_background = self.arguments.async_save and not last
        blocks = self.steps.blocks
        try:
            self.engine.save_checkpoint(
                self.output_dir,
                checkpoint_name(self.pending.step),
                {"progress": dataclasses.asdict(self.pending), "blocks": [len(blocks), blocks.length]},
                self.add_files,
                partial(self._rotate, self.pending),
                in_background,
            )
        except CheckpointError as error:
            self._save_failed(error, last)
        if not in_background:
            self._settle_save()

    def _state_to_save(self) -> Progress:
        position, step = self.steps.position, self.steps.step
        state = dataclasses.replace(
            self.progress, step=step, epoch=position.epoch, consumed=position.consumed, saved_step=step
        )
        loss = self.evaluation.get("eval_loss") if self.evaluated_step == step else None
        if loss is not None and (state.best is None or loss < state.best):
            state.best, state.best_step = loss, step
        return state

    def _settle_save(self) -> None:
        """Wait for a checkpoint that is being written in the background, and note how it went."""
        if self.pending is None:
            return
        try:
            self.engine.saver.wait()
        except CheckpointError as error:
            self._save_failed(error, last=False)
            return
        done, self.pending = self.pending, None
        self.progress.saved_step, self.progress.best, self.progress.best_step = (
            done.saved_step,
            done.best,
            done.best_step,
        )

    def _save_failed(self, error: CheckpointError, last: bool) -> None:
        self.pending = None
        self.progress.failed_saves += 1
        if last or self.progress.saved_step is None:
            raise error
        if self.is_main:
            logger.warning(
                "%s; training goes on, %s is whole (%d saves have failed so far)",
                error, checkpoint_name(self.progress.saved_step), self.progress.failed_saves,
            )  # fmt: skip

    def _rotate(self, state: Progress) -> None:
        if self.arguments.save_total_limit is not None:
            protected = {checkpoint_name(step) for step in (state.saved_step, state.best_step) if step is not None}
            rotate(self.output_dir, self.arguments.save_total_limit, protected)

    def _load_best(self) -> None:
        """With --load_best_model_at_end, the weights of the best checkpoint, unless they are the ones at hand."""
        best = self.progress.best_step
        if self.arguments.load_best_model_at_end and best is not None and best != self.steps.step:
            self.engine.load_checkpoint(self.output_dir, checkpoint_name(best))
            self._say(f"best model: {checkpoint_name(best)}, held-out loss {self.progress.best:.4f}")

    def _metrics(self, learning_rate: float) -> dict[str, float]:
        progress, norm = self.progress, self.engine.get_global_grad_norm()
        finite = [loss for loss in progress.losses if math.isfinite(loss)]
        progress.losses = []
        tokens_per_second = (self.steps.tokens - self.counted) / (time.perf_counter() - self.clock)
        return {
            "epoch": self.steps.epochs,
            "loss": fmean(finite) if finite else math.nan,
            "learning_rate": learning_rate,
            "grad_norm": math.nan if norm is None else norm,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / dist.get_world_size(),
            "tokens": float(self.steps.tokens),
            "loss_scale": self.engine.cur_scale,
            "skipped_steps": float(self.engine.skipped_steps),
            "failed_saves": float(progress.failed_saves),
        }

    def _show(self, metrics: dict[str, float]) -> None:
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s, "
            f"lr {metrics['learning_rate']:.2g}, norm {metrics['grad_norm']:.2f}"
        )

    def _evaluate(self) -> dict[str, float] | None:
        """The held-out loss, if there is a held-out text; None if a signal has cut the evaluation short."""
        if self.validation is None:
            return {}
        batches = evaluation_batches(
            self.validation, self.arguments.per_device_eval_batch_size, dist.get_rank(), dist.get_world_size()
        )
        loss = evaluate_loss(self.engine, batches, self._stop_requested)
        return None if loss is None else {"eval_loss": loss}

    def _sample(self) -> str | None:
        if self.arguments.sample_prompt is None:
            return None
        return continue_text(self.engine, self.tokenizer, self.arguments.sample_prompt, self.arguments.sample_tokens)

    def _describe(self) -> str:
        arguments, gpus, blocks = self.arguments, dist.get_world_size(), self.steps.blocks
        sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        numel = sum(zero3.whole_shape(parameter).numel() for parameter in self.engine.module.parameters())
        return (
            f"model: {numel / 1e6:.2f}M parameters, all of them trained, on {gpus} ranks\n"
            f"batch: {arguments.per_device_train_batch_size} sequences x {arguments.gradient_accumulation_steps} "
            f"accumulated = {sequences} per GPU, x {gpus} GPUs = {sequences * gpus} in total; "
            f"{sequences * gpus * blocks.length} tokens per step\n"
            f"steps: {self.steps.total} ({self.steps.per_epoch} per epoch of {len(blocks)} sequences)"
        )

    def _say_stopped(self) -> None:
        self.bar.close()
        saved = self.progress.saved_step
        where = "nothing was to be saved" if saved is None else f"{self.output_dir / checkpoint_name(saved)} is saved"
        self._say(
            f"stopped by {self.stop.name or 'a signal to another rank'} after step {self.steps.step}: {where}; "
            "go on with --resume_from_checkpoint auto"
        )

    def _say_results(self, sample_after: str | None) -> None:
        before, output_dir = self.progress.before, self.output_dir
        if before and self.evaluation:
            self._say(
                f"held-out loss: {before['eval_loss']:.4f} before, {self.evaluation['eval_loss']:.4f} after "
                "(nats per token)"
            )
        if sample_after is not None:
            self._say(f"before: {self.progress.sample_before!r}\nafter:  {sample_after!r}")
        self._say(
            f"model, tokenizer and config.yaml: {output_dir}\nmetrics: {output_dir / 'metrics.jsonl'}\n"
            f"TensorBoard: tensorboard --logdir {output_dir / 'runs'}"
        )

    def _say(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)
