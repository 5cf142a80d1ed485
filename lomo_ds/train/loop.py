"""The training loop: steps, evaluations, log lines, checkpoints, and the model exported at the end."""

import logging
import math
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lomo_ds import zero3
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.data import TrainingSteps, evaluation_batches
from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.engine.protocol import TrainingEngine
from lomo_ds.engine.separation import check_separation
from lomo_ds.models import save_pretrained
from lomo_ds.train.checkpoint_manager import RunCheckpoints
from lomo_ds.train.datasets import Datasets
from lomo_ds.train.evaluate import answer, continue_text, evaluate_loss
from lomo_ds.train.metrics import Monitor
from lomo_ds.train.progress import Progress, mark_finished
from lomo_ds.train.signals import StopRequest

logger = logging.getLogger(__name__)


class Trainer:
    """Runs the remaining steps of a training job; stopping and resuming does not change the result.

    Args:
        progress: progress of the run so far.
        stop: a request to end after the current step.
        run_id: identifies this run, see ``mark_finished``.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        engine: TrainingEngine,
        tokenizer: PreTrainedTokenizerBase,
        steps: TrainingSteps,
        datasets: Datasets,
        monitor: Monitor,
        progress: Progress,
        stop: StopRequest,
        checkpoints: RunCheckpoints,
        run_id: dict[str, Any],
    ) -> None:
        self.arguments = arguments
        self.engine = engine
        self.tokenizer = tokenizer
        self.steps = steps
        self.datasets = datasets
        self.monitor = monitor
        self.progress = progress
        self.stop = stop
        self.run_id = run_id
        self.checkpoints = checkpoints
        self.output_dir = Path(arguments.output_dir)
        self.is_main = dist.get_rank() == 0
        has_bar = self.is_main and sys.stderr.isatty()  # a log file gets lines instead
        self.bar = tqdm(total=steps.total, initial=steps.step, unit="step", disable=not has_bar, dynamic_ncols=True)
        self.started_time, self.started_step = time.perf_counter(), steps.step  # of the steps in this process
        self.logged_time, self.logged_tokens = time.perf_counter(), steps.tokens  # at the last log line

    def run(self) -> None:
        """Train, with evaluations before, during and after training; export the model, and print where it is."""
        with self.bar:  # closes the bar, so that later output starts on a new line
            self._run()

    def _run(self) -> None:
        self._check_separation()
        self._print(self._describe())
        if self.steps.step == 0:
            evaluation = self._evaluate()
            if evaluation is None:
                return self._print_stopped()
            self.progress.before, self.progress.sample_before = evaluation, self._sample()
            if evaluation:
                self.monitor.log(0, evaluation)
        else:
            self._print(f"resumed after step {self.steps.step} of {self.steps.total}")
        finished = self._train()
        self.checkpoints.wait()
        if not finished:
            return self._print_stopped()
        sample_after = self._sample()
        if best := self.checkpoints.load_best(self.steps.step):
            self._print(best)
        save_pretrained(self.engine.module, self.tokenizer, self.output_dir)
        if self.is_main:
            self._mark_finished()
        self.bar.close()
        self._print_results(sample_after)
        return None

    def _check_separation(self) -> None:
        """Raise if packed documents would see each other in this model."""
        arguments = self.arguments
        if any(data is not None and data.has_documents for data in (self.datasets.training, self.datasets.validation)):
            check_separation(
                self.engine, max(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
            )

    def _train(self) -> bool:
        """Take the remaining steps; return False if a signal ended them early."""
        if self.progress.unlogged is not None and not self._end_step(self.progress.unlogged):
            return False
        if self._stop_requested():
            return False
        self.bar.unpause()  # an evaluation before the first step does not count as its time
        self.started_time = time.perf_counter()
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
        """Evaluate, log and save if due; return False if a signal makes this the last step."""
        stopping = self._stop_requested()
        if self._is_due(self.arguments.eval_steps):
            evaluation = None if stopping else self._evaluate()
            if evaluation is None:
                self.progress.unlogged = record
                self.checkpoints.save(self.steps.step, self.steps.position, self.steps.data, last=True)
                return False
            self.progress.evaluation, self.progress.evaluated_step = evaluation, self.steps.step
            record |= evaluation
        self.progress.unlogged = None
        if record:
            self.monitor.log(self.steps.step, record)
            self.logged_time, self.logged_tokens = time.perf_counter(), self.steps.tokens
        if stopping or (self.arguments.save_steps and self._is_due(self.arguments.save_steps)):
            self.checkpoints.save(self.steps.step, self.steps.position, self.steps.data, last=stopping)
        return not stopping

    def _is_due(self, every: int | None) -> bool:
        return self.steps.step == self.steps.total or bool(every and self.steps.step % every == 0)

    def _stop_requested(self) -> bool:
        """Return whether any rank has received a signal; all ranks must call this."""
        requested = torch.tensor(float(self.stop.name is not None), device=self.engine.device)
        return bool(all_reduce_sum(requested, self.engine.seq_data_parallel_group).item())

    def _mark_finished(self) -> None:
        try:
            mark_finished(self.output_dir, self.run_id)
        except OSError as error:
            logger.warning("%s cannot be marked as finished: %s", self.output_dir, error.strerror)

    def _metrics(self, learning_rate: float) -> dict[str, float]:
        progress, norm = self.progress, self.engine.get_global_grad_norm()
        finite = [loss for loss in progress.losses if math.isfinite(loss)]
        progress.losses = []
        tokens_per_second = (self.steps.tokens - self.logged_tokens) / (time.perf_counter() - self.logged_time)
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
        """Show the metrics beside the bar, or in a line of a log file with the time that is left."""
        text = (
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s, "
            f"lr {metrics['learning_rate']:.2g}, norm {metrics['grad_norm']:.2f}"
        )
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            step, total = self.steps.step, self.steps.total
            left = time_left(time.perf_counter() - self.started_time, step - self.started_step, total - step)
            self._print(f"step {step} of {total}, {left} left: {text}")

    def _evaluate(self) -> dict[str, float] | None:
        """Return the held-out loss, empty without a validation text; None if a signal interrupted the evaluation."""
        if self.datasets.validation is None:
            return {}
        batches = evaluation_batches(
            self.datasets.validation, self.arguments.per_device_eval_batch_size, dist.get_rank(), dist.get_world_size()
        )
        loss = evaluate_loss(self.engine, batches, self._stop_requested)
        return None if loss is None else {"eval_loss": loss}

    def _sample(self) -> str | None:
        if self.arguments.sample_prompt is None:
            return None
        sample = answer if self.datasets.has_chats else continue_text
        return sample(self.engine, self.tokenizer, self.arguments.sample_prompt, self.arguments.sample_tokens)

    def _describe(self) -> str:
        arguments, gpus, data = self.arguments, dist.get_world_size(), self.steps.sequences
        sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        numel = sum(zero3.full_shape(parameter).numel() for parameter in self.engine.module.parameters())
        return (
            f"model: {numel / 1e6:.2f}M parameters, all trained, on {gpus} ranks\n"
            f"batch: {arguments.per_device_train_batch_size} sequences x {arguments.gradient_accumulation_steps} "
            f"accumulated = {sequences} per GPU, x {gpus} GPUs = {sequences * gpus} in total; "
            f"{sequences * gpus * data.length} tokens per step at most\n"
            f"steps: {self.steps.total} ({self.steps.per_epoch} per epoch of {len(data)} sequences)"
        )

    def _print_stopped(self) -> None:
        self.bar.close()
        cause = self.stop.name or "a signal to another rank"
        self._print(f"stopped by {cause} after step {self.steps.step}: {self.checkpoints.resume_hint()}")

    def _print_results(self, sample_after: str | None) -> None:
        before, output_dir = self.progress.before, self.output_dir
        after = self.progress.evaluation
        if before and after:
            self._print(
                f"held-out loss: {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after (nats per token)"
            )
        if sample_after is not None:
            sample_before = self.progress.sample_before
            first_line = "" if sample_before is None else f"before: {sample_before!r}\n"
            self._print(f"{first_line}after:  {sample_after!r}")
        self._print(f"model, tokenizer and config.yaml: {output_dir}\nmetrics: {output_dir / 'metrics.jsonl'}")
        for tracker in self.monitor.trackers:
            self._print(tracker.describe())

    def _print(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)
            sys.stdout.flush()  # a log file would show it minutes later


def time_left(seconds: float, taken: int, left: int) -> str:
    """Return the time of the steps that are left, as h:mm:ss, if they take as long as those taken in ``seconds``."""
    return tqdm.format_interval(seconds / taken * left)
