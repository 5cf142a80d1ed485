"""The training loop: steps, evaluations, log lines, checkpoints, and the model exported at the end."""

import logging
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import deepspeed.comm as dist
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lomo_ds import zero3
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.data import PackedBlocks, TrainingSteps, evaluation_batches
from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.engine.protocol import TrainingEngine
from lomo_ds.models import save_pretrained
from lomo_ds.train.checkpoint_manager import Keeper
from lomo_ds.train.evaluate import continue_text, evaluate_loss
from lomo_ds.train.metrics import Monitor
from lomo_ds.train.progress import Progress, mark_finished
from lomo_ds.train.signals import StopRequest

logger = logging.getLogger(__name__)


class Trainer:
    """Runs what is left of a training job; stopped and resumed, it does what it would have done without.

    Args:
        progress: of the run so far.
        stop: once asked for, the step under way is the last.
        keeper: of the run's checkpoints.
        run_id: what tells this run from others, see ``mark_finished``.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        engine: TrainingEngine,
        tokenizer: PreTrainedTokenizerBase,
        steps: TrainingSteps,
        validation: PackedBlocks | None,
        monitor: Monitor,
        progress: Progress,
        stop: StopRequest,
        keeper: Keeper,
        run_id: dict[str, Any],
    ) -> None:
        self.arguments = arguments
        self.engine = engine
        self.tokenizer = tokenizer
        self.steps = steps
        self.validation = validation
        self.monitor = monitor
        self.progress = progress
        self.stop = stop
        self.run_id = run_id
        self.keeper = keeper
        self.output_dir = Path(arguments.output_dir)
        self.is_main = dist.get_rank() == 0
        self.bar = tqdm(
            total=steps.total, initial=steps.step, unit="step", disable=not self.is_main, dynamic_ncols=True
        )
        self.clock, self.counted = time.perf_counter(), steps.tokens  # at the last log line

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
        self.keeper.settle()
        if not finished:
            return self._say_stopped()
        sample_after = self._sample()
        if best := self.keeper.load_best(self.steps.step):
            self._say(best)
        save_pretrained(self.engine.module, self.tokenizer, self.output_dir)
        if self.is_main:
            self._mark_finished()
        self.bar.close()
        self._say_results(sample_after)
        return None

    def _train(self) -> bool:
        """The steps that are left; False if a signal has ended them early."""
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
                self.keeper.save(self.steps.step, self.steps.position, self.steps.data, last=True)
                return False
            self.progress.evaluation, self.progress.evaluated_step = evaluation, self.steps.step
            record |= evaluation
        self.progress.unlogged = None
        if record:
            self.monitor.log(self.steps.step, record)
            self.clock, self.counted = time.perf_counter(), self.steps.tokens
        if stopping or (self.arguments.save_steps and self._is_due(self.arguments.save_steps)):
            self.keeper.save(self.steps.step, self.steps.position, self.steps.data, last=stopping)
        return not stopping

    def _is_due(self, every: int | None) -> bool:
        return self.steps.step == self.steps.total or bool(every and self.steps.step % every == 0)

    def _stop_requested(self) -> bool:
        """Whether any rank has received a signal; all ranks ask at the same time."""
        asked = torch.tensor(float(self.stop.name is not None), device=self.engine.device)
        return bool(all_reduce_sum(asked, self.engine.seq_data_parallel_group).item())

    def _mark_finished(self) -> None:
        try:
            mark_finished(self.output_dir, self.run_id)
        except OSError as error:
            logger.warning("%s cannot be marked as finished: %s", self.output_dir, error.strerror)

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
        numel = sum(zero3.full_shape(parameter).numel() for parameter in self.engine.module.parameters())
        return (
            f"model: {numel / 1e6:.2f}M parameters, all of them trained, on {gpus} ranks\n"
            f"batch: {arguments.per_device_train_batch_size} sequences x {arguments.gradient_accumulation_steps} "
            f"accumulated = {sequences} per GPU, x {gpus} GPUs = {sequences * gpus} in total; "
            f"{sequences * gpus * blocks.length} tokens per step\n"
            f"steps: {self.steps.total} ({self.steps.per_epoch} per epoch of {len(blocks)} sequences)"
        )

    def _say_stopped(self) -> None:
        self.bar.close()
        who = self.stop.name or "a signal to another rank"
        self._say(f"stopped by {who} after step {self.steps.step}: {self.keeper.way_on()}")

    def _say_results(self, sample_after: str | None) -> None:
        before, output_dir = self.progress.before, self.output_dir
        after = self.progress.evaluation
        if before and after:
            self._say(
                f"held-out loss: {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after (nats per token)"
            )
        if sample_after is not None:
            before_it = f"before: {self.progress.sample_before!r}\n" if self.progress.sample_before is not None else ""
            self._say(f"{before_it}after:  {sample_after!r}")
        self._say(
            f"model, tokenizer and config.yaml: {output_dir}\nmetrics: {output_dir / 'metrics.jsonl'}\n"
            f"TensorBoard: tensorboard --logdir {output_dir / 'runs'}"
        )

    def _say(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)
