"""One optimizer step's micro-batches on this rank, and what the loss of each weighs in the average over all ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.engine.batches import Batch, as_micro_batches, move_to_device, with_dummy_labels
from lomo_ds.engine.items import (
    WAY_OUT,
    Count,
    LabelObserver,
    Seen,
    count_items,
    count_labels,
    count_sums,
    parse_num_items,
    total_items,
)
from lomo_ds.engine.loss import extract_loss
from lomo_ds.errors import ConfigError, PeerError


class StepBatch:
    """Runs micro-batches forward, and knows from the first one on what each loss weighs in the step.

    Args:
        batch, num_items: see ``LomoEngine.train_batch``.
        watch: of the model that will run it.
        device: the one that computes.
        process_group: those that take the step together.

    Raises:
        ConfigError: the batch is none, or cannot be counted.
    """

    def __init__(
        self,
        batch: Batch | Sequence[Batch],
        num_items: int | Sequence[int] | None,
        watch: LabelObserver,
        device: torch.device,
        process_group: ProcessGroup,
    ) -> None:
        micro_batches = as_micro_batches(batch)
        # counted where the labels lie, which is the host: on the device each count would wait for it
        if num_items is not None:
            self.counts = parse_num_items(num_items, len(micro_batches))
        else:
            self.counts = [count_items(micro_batch, watch.shifts) for micro_batch in micro_batches]
        self.micro_batches = [
            move_to_device(micro_batch if any(count) else with_dummy_labels(micro_batch), device)
            for micro_batch, count in zip(micro_batches, self.counts, strict=True)
        ]
        self.is_given = num_items is not None
        self.watch = watch
        self.device = device
        self.process_group = process_group
        self.way: str | None = None  # in which the model treats its labels, where that was seen
        self.share: float | None = None  # of one item in the step; 0 where it must be skipped
        self.skip_reason: str | None = None
        self.counts_as_overflow = False

    def __len__(self) -> int:
        return len(self.micro_batches)

    def forward(self, model: Callable[..., Any], position: int) -> Tensor:
        """Run one micro-batch; behind the first, all ranks agree on the share of one item in the step.

        Returns:
            Its loss, 0-dim.

        Raises:
            ConfigError: there is no loss, or what it weighs is not known.
            PeerError: so it is on another rank, at the first micro-batch.
        """
        if self.share is not None:
            return self.measure(model, position)
        output = self._run(model, position)
        refusal: ConfigError | None = None
        try:
            loss = self._loss_in(output, position)
        except ConfigError as error:
            loss, refusal = torch.full((), torch.nan, device=self.device), error
        self._agree_on_share(loss.detach(), refusal)
        return loss

    def measure(self, model: Callable[..., Any], position: int) -> Tensor:
        """Run one micro-batch, and count its items as its model was seen to count them; no rank waits for another.

        Raises:
            ConfigError: see ``forward``.
        """
        return self._loss_in(self._run(model, position), position)

    def weight(self, position: int) -> float:
        """The share of one micro-batch's loss in the loss of the step."""
        assert self.share is not None
        return self.counts[position].items * self.share

    def _run(self, model: Callable[..., Any], position: int) -> Any:
        self.watch.seen = None
        return model(**self.micro_batches[position])

    def _loss_in(self, output: Any, position: int) -> Tensor:
        loss = extract_loss(output)
        if self.share is None:
            self._count_as_seen()
        else:
            self._refuse_another_way(position)
        return loss

    def _count_as_seen(self) -> None:
        """Let counts be those of the labels that the first micro-batch's model passed on to one that is known."""
        seen = self.watch.seen
        if self.is_given or seen is None or seen.labels.is_floating_point():
            return
        self.way = self._way_of(seen, 0)
        counts = self._counts_of(seen)
        for count, before in zip(counts, self.counts, strict=True):
            if any(before) and not count.items:  # its loss is nan, which no weight takes out of a sum
                raise ConfigError("no label of a micro-batch counts behind the first of each row; leave it out")
        self.counts = counts

    def _counts_of(self, seen: Seen) -> list[Count]:
        if self.way != "changed":
            of_way = [count.otherwise if self.way == "shifted" else count.items for count in self.counts]
            return [Count(count, count) for count in of_way]
        if len(self) > 1:
            raise ConfigError(f"the model changes its labels, so those of later micro-batches are unknown; {WAY_OUT}")
        return [count_labels(seen.labels, seen.shifts)] if any(self.counts[0]) else self.counts

    def _refuse_another_way(self, position: int) -> None:
        """What has been agreed on holds for a model that treats every micro-batch's labels alike."""
        seen = self.watch.seen
        if self.way is not None and (seen is None or self._way_of(seen, position) != self.way):
            raise ConfigError(f"the model passes on the labels of some micro-batches, and not of others; {WAY_OUT}")

    def _way_of(self, seen: Seen, position: int) -> str:
        batch = self.micro_batches[position]
        if not any(_is_same(seen.labels, batch.get(name)) for name in ("labels", "shift_labels")):
            return "changed"
        return "shifted" if seen.shifts else "as they are"

    def _agree_on_share(self, loss: Tensor, refusal: ConfigError | None) -> None:
        """Let ``share`` be one over the items of the whole step, all ranks; 0 where the step must be skipped."""
        counted = torch.tensor([refusal is not None, *count_sums(self.counts)], dtype=torch.float64).to(self.device)
        is_bad = (~loss.isfinite()).double().view(1)
        bad_losses, refusals, *sums = all_reduce_sum(torch.cat([is_bad, counted]), self.process_group).tolist()
        if refusal is not None:
            refusal.on_some_ranks = True
            raise refusal
        if refusals:
            raise PeerError("another rank refuses what its model returned")
        items = total_items(sums)
        if bad_losses:
            self.skip_reason, self.counts_as_overflow = "a loss was not finite", True
        elif not items:
            self.skip_reason = "the step has no labelled items"
        self.share = 0.0 if self.skip_reason else 1.0 / items


def _is_same(labels: Tensor, given: Any) -> bool:
    """Whether ``labels`` is all of the tensor ``given``: of positional arguments, DeepSpeed's hooks pass on a view."""
    return isinstance(given, Tensor) and labels.is_set_to(given)
