"""Base of LomoEngine and BaselineEngine: an optimizer step that averages the loss over the tokens of all ranks."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.engine.batches import Batch
from lomo_ds.engine.client_arguments import validate_built_scheduler
from lomo_ds.engine.items import LabelObserver
from lomo_ds.engine.lr_schedulers import build_scheduler
from lomo_ds.engine.packed_rows import PackedRows
from lomo_ds.engine.step_batch import StepBatch

logger = logging.getLogger(__name__)


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Suspend a surrounding ``deepspeed.zero.Init``, as ``deepspeed.initialize`` does while it builds an engine."""
    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


class TokenAveragingEngine(DeepSpeedEngine):
    """A ``DeepSpeedEngine`` with ``train_batch``: one step on the batches of all ranks and micro-batches together.

    The loss of the step is the mean over its labelled tokens, wherever they are, and not a mean of means. Documents
    that are packed into a row do not attend to each other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed_rows = PackedRows(self.module)

    def train_batch(self, batch: Batch | Sequence[Batch], num_items: int | Sequence[int] | None = None) -> Tensor:
        """Run one complete optimizer step.

        The result equals the step of plain PyTorch on the batches of all ranks together.

        Args:
            batch: the keyword arguments of the model's forward, or a list of such dicts, one per micro-batch of this
                rank. The number of labelled tokens (labels other than -100) may differ between ranks and
                micro-batches. The number of micro-batches must be the same on every rank, unless they are accumulated
                inside the layers and ``gradient_accumulation_steps`` is more than 1.
            num_items: the number of items that the loss of each micro-batch is averaged over; None counts them, see
                ``items``.

        Returns:
            The model's loss averaged over the labelled tokens of all ranks and micro-batches; 0-dim, float32. It is
            not finite if the step was skipped because of a non-finite loss.

        Raises:
            ConfigError: the engine cannot run this step now; the batch has no argument names; the model returns no
                loss; or the weights of the micro-batch losses are unknown.
            PeerError: the model returns no loss on another rank.
        """
        self._validate_train_batch()
        step_batch = self._build_step_batch(batch, num_items)
        try:
            loss = self._take_step(step_batch)
        except BaseException:
            self._abort_step()
            raise
        finally:
            self._is_gradient_accumulation_boundary = None
        return torch.tensor(loss, dtype=torch.float32, device=self.device)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Run ``DeepSpeedEngine.step``, and log a warning if the step was skipped."""
        skipped = self.skipped_steps
        super().step(lr_kwargs)
        if self.skipped_steps > skipped:
            self._log_skipped_step(self._skip_reason)

    def destroy(self) -> None:
        """Remove every hook from the model."""
        super().destroy()
        for name in ("_label_observer", "_packed_rows"):
            if name in vars(self):
                vars(self)[name].remove()

    def _build_step_batch(self, batch: Batch | Sequence[Batch], num_items: int | Sequence[int] | None) -> StepBatch:
        """Return the batches of a step, which are run forward and backward one after the other."""
        return StepBatch(batch, num_items, self._label_observer, self.device, self._data_parallel_group)

    def _validate_train_batch(self) -> None:
        """Raise if the engine cannot run a step now."""

    @abstractmethod
    def _take_step(self, step_batch: StepBatch) -> float:
        """Run the step, and return its loss over all ranks."""

    @abstractmethod
    def _abort_step(self) -> None:
        """Discard the gradients of a step that an exception has interrupted."""

    @property
    @abstractmethod
    def _skip_reason(self) -> str | None:
        """Why the last step was skipped."""

    def backward_all(self, step_batch: StepBatch) -> Tensor:
        """Run forward and backward for each micro-batch, with its loss weighted by its share of the step's labels.

        It stops where ``step_batch.skip_reason`` says that the step must be skipped.

        Returns:
            This rank's part of the step's loss; 0-dim, float64.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for position in range(len(step_batch)):
            loss = step_batch.forward(self, position)
            if step_batch.skip_reason is not None:
                break
            weight = step_batch.weight(position)
            total += loss.detach().double() * weight
            self.set_gradient_accumulation_boundary(position == len(step_batch) - 1)
            # gradients are averaged over the ranks, so multiply by the world size to sum the weighted losses
            self.backward(loss * (weight * self._data_parallel_size), scale_wrt_gas=False)
        return total

    @torch.no_grad()
    def forward_all(self, step_batch: StepBatch) -> Tensor:
        """Run forward for each micro-batch; see ``backward_all``."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for position in range(len(step_batch)):
            loss = step_batch.forward(self, position)
            if step_batch.skip_reason is not None:
                break
            total += loss.double() * step_batch.weight(position)
        return total

    def _finish_step(self) -> None:
        """Run ``step``, which counts one micro-step, for a step that had all of them."""
        self.set_gradient_accumulation_boundary(True)
        self.step()
        self.micro_steps += self.gradient_accumulation_steps() - 1

    def _log_skipped_step(self, reason: str | None) -> None:
        if self.global_rank == 0:
            logger.warning(
                "step %d skipped, no weight was changed: %s (%d skipped so far, next loss scale %g)",
                self.global_steps, reason, self.skipped_steps, self.cur_scale,
            )  # fmt: skip

    @property
    @abstractmethod
    def cur_scale(self) -> float:
        """Loss scale of the next step; 1 unless training in fp16."""

    @cached_property
    def _label_observer(self) -> LabelObserver:
        return LabelObserver(self.module)

    @property
    def _data_parallel_group(self) -> ProcessGroup:
        return self.seq_data_parallel_group

    @property
    def _data_parallel_size(self) -> int:
        return torch.distributed.get_world_size(self._data_parallel_group)

    def _scheduler_from_config(self, optimizer: Any) -> Any:
        name = self.scheduler_name()
        return name and build_scheduler(name, self.scheduler_params(), self.basic_optimizer)

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        if self.client_lr_scheduler is not None:
            validate_built_scheduler(self.lr_scheduler, (self.basic_optimizer, self.optimizer))
