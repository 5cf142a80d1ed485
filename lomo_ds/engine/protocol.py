"""Protocol of the engines that the training loop can run: ``LomoEngine`` and the baselines."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class TrainingEngine(Protocol):
    """A model in training, partitioned over the ranks; see ``LomoEngine`` for the details of each member."""

    module: Any  # the transformers model
    device: torch.device
    skipped_steps: int
    seq_data_parallel_group: ProcessGroup

    @property
    def cur_scale(self) -> float:
        """Loss scale of the next step."""

    def train_batch(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tensor:
        """Run one complete optimizer step and return its loss over all ranks and micro-batches, 0-dim."""

    def get_lr(self) -> list[float]:
        """Return the learning rate of the next step for each param group."""

    def get_global_grad_norm(self) -> float | None:
        """Return the global gradient norm of the last step, before clipping."""

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run the model's forward."""

    def train(self, mode: bool = True) -> Any:
        """Set the model to training mode, or to evaluation mode if ``mode`` is False."""

    def eval(self) -> Any:
        """Set the model to evaluation mode."""

    def destroy(self) -> None:
        """Remove every hook from the model; it cannot be trained afterwards."""
