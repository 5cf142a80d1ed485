"""What the training loop needs of an engine; LOMO's has it, and so have those that LOMO is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class TrainingEngine(Protocol):
    """A model under training, split over the ranks; see ``LomoEngine`` for what each of these does."""

    module: Any  # the model, as transformers made it
    device: torch.device
    skipped_steps: int
    seq_data_parallel_group: ProcessGroup

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next step."""

    def train_batch(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tensor:
        """One whole optimizer step; its loss over all ranks and micro-batches, 0-dim."""

    def get_lr(self) -> list[float]:
        """Of the next step, for each parameter group."""

    def get_global_grad_norm(self) -> float | None:
        """Of the last step, before clipping."""

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward."""

    def train(self, mode: bool = True) -> Any:
        """Dropout on, or with ``mode`` False off."""

    def eval(self) -> Any:
        """Dropout off."""

    def destroy(self) -> None:
        """Take every hook off the model; nothing is trained any more."""
