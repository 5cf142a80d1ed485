"""Micro-batches of one optimizer step on this rank, and the weight of each loss in the average over all ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.engine.batches import Batch, as_micro_batches, move_to_device, with_dummy_labels
from lomo_ds.engine.items import (
    NUM_ITEMS_HINT,
    Count,
    LabelObserver,
    ObservedLabels,
    count_items,
    count_labels,
    count_sums,
    parse_num_items,
    total_items,
)
from lomo_ds.engine.loss import extract_loss
from lomo_ds.errors import ConfigError, PeerError
from lomo_ds.models.layered import MicroBatch


class StepBatch:
    """Runs the forward of each micro-batch; loss weights are known after the first one.

    Args:
        batch, num_items: see ``LomoEngine.train_batch``.
        label_observer: the observer of the model that runs the batch.
        device: the compute device.
        process_group: the ranks that take the step together.

    Raises:
        ConfigError: the batch is invalid, or its items cannot be counted.
    """

    def __init__(
        self,
        batch: Batch | Sequence[Batch],
        num_items: int | Sequence[int] | None,
        label_observer: LabelObserver,
        device: torch.device,
        process_group: ProcessGroup,
    ) -> None:
        micro_batches = as_micro_batches(batch)
        # count before the labels are moved from the host: on the device each count would synchronize
        if num_items is not None:
            self.counts = parse_num_items(num_items, len(micro_batches))
        else:
            self.counts = [count_items(micro_batch, label_observer.shifts) for micro_batch in micro_batches]
        self.micro_batches = [
            move_to_device(micro_batch if any(count) else with_dummy_labels(micro_batch), device)
            for micro_batch, count in zip(micro_batches, self.counts, strict=True)
        ]
        self.joined: list[MicroBatch] | None = None  # micro-batches that the only batch consists of, if it was joined
        self.has_num_items = num_items is not None
        self.label_observer = label_observer
        self.device = device
        self.process_group = process_group
        self.label_usage: str | None = None  # how the model uses its labels, if that was observed
        self.share: float | None = None  # weight of one item in the step; 0 if the step must be skipped
        self.skip_reason: str | None = None
        self.counts_as_overflow = False

    def __len__(self) -> int:
        return len(self.micro_batches)

    def forward(self, model: Callable[..., Any], position: int) -> Tensor:
        """Run one micro-batch; after the first one, compute the share of one item in a collective over all ranks.

        Returns:
            The loss of the micro-batch, 0-dim.

        Raises:
            ConfigError: there is no loss, or its weight is unknown.
            PeerError: another rank raised ConfigError for the first micro-batch.
        """
        if self.share is not None:
            return self.forward_loss(model, position)
        output = self._run(model, position)
        config_error: ConfigError | None = None
        try:
            loss = self._extract_loss(output, position)
        except ConfigError as error:
            loss, config_error = torch.full((), torch.nan, device=self.device), error
        self._reduce_share(loss.detach(), config_error)
        return loss

    def forward_loss(self, model: Callable[..., Any], position: int) -> Tensor:
        """Run one micro-batch and return its loss, without a collective; update the item counts from observed labels.

        Raises:
            ConfigError: see ``forward``.
        """
        return self._extract_loss(self._run(model, position), position)

    def weight(self, position: int) -> float:
        """Return the weight of one micro-batch's loss in the loss of the step."""
        assert self.share is not None
        return self.counts[position].items * self.share

    def _run(self, model: Callable[..., Any], position: int) -> Any:
        self.label_observer.observed = None
        return model(**self.micro_batches[position])

    def _extract_loss(self, output: Any, position: int) -> Tensor:
        loss = extract_loss(output)
        if self.share is None:
            self._adopt_observed_counts()
        else:
            self._validate_label_usage(position)
        return loss

    def _adopt_observed_counts(self) -> None:
        """Replace the counts by those of the labels observed in an inner transformers model, if there is one."""
        observed = self.label_observer.observed
        if self.has_num_items or observed is None or observed.labels.is_floating_point():
            return
        self.label_usage = self._classify_labels(observed, 0)
        counts = self._observed_counts(observed)
        for count, before in zip(counts, self.counts, strict=True):
            if any(before) and not count.items:  # its loss is nan, and a weight of 0 would not remove nan from the sum
                raise ConfigError(
                    "a micro-batch has no labels except the first of each row, which the model ignores; leave it out"
                )
        self.counts = counts

    def _observed_counts(self, observed: ObservedLabels) -> list[Count]:
        if self.label_usage != "changed":
            items = [count.alternative if self.label_usage == "shifted" else count.items for count in self.counts]
            return [Count(count, count) for count in items]
        if len(self) > 1:
            raise ConfigError(
                f"the model changes its labels, so the labels of later micro-batches are unknown; {NUM_ITEMS_HINT}"
            )
        return [count_labels(observed.labels, observed.shifts)] if any(self.counts[0]) else self.counts

    def _validate_label_usage(self, position: int) -> None:
        """Raise if the model uses the labels of this micro-batch differently from those of the first one."""
        if self.label_usage is None:
            return
        observed = self.label_observer.observed
        if observed is None or self._classify_labels(observed, position) != self.label_usage:
            raise ConfigError(
                f"the model passes on the labels of some micro-batches, but not of others; {NUM_ITEMS_HINT}"
            )

    def _classify_labels(self, observed: ObservedLabels, position: int) -> str:
        batch = self.micro_batches[position]
        if not any(_is_same_tensor(observed.labels, batch.get(name)) for name in ("labels", "shift_labels")):
            return "changed"
        return "shifted" if observed.shifts else "unshifted"

    def _reduce_share(self, loss: Tensor, error: ConfigError | None) -> None:
        """Set ``share`` to 1 / items of the step over all ranks, or to 0 if the step must be skipped."""
        local_counts = torch.tensor([error is not None, *count_sums(self.counts)], dtype=torch.float64).to(self.device)
        is_non_finite = (~loss.isfinite()).double().view(1)
        totals = all_reduce_sum(torch.cat([is_non_finite, local_counts]), self.process_group)
        non_finite_losses, rejecting_ranks, *sums = totals.tolist()
        if error is not None:
            error.on_some_ranks = True
            raise error
        if rejecting_ranks:
            raise PeerError("another rank cannot use the output of its model")
        items = total_items(sums)
        if non_finite_losses:
            self.skip_reason, self.counts_as_overflow = "a loss was not finite", True
        elif not items:
            self.skip_reason = "the step has no labelled items"
        self.share = 0.0 if self.skip_reason else 1.0 / items


def _is_same_tensor(labels: Tensor, value: Any) -> bool:
    """Return whether ``labels`` views all of ``value``; DeepSpeed's hooks pass positional arguments as views."""
    return isinstance(value, Tensor) and labels.is_set_to(value)
