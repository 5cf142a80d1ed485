"""SGD steps of many shards at once, and updaters for tests of schedules."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lomo_ds.numerics.apply import Scalar, Update, apply
from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.rounding_noise import RoundingNoise
from lomo_ds.numerics.square_sums import SquareSums
from lomo_ds.update.rules import Rule, Sgd
from lomo_ds.update.target import Target
from lomo_ds.update.updater import Updater


def sgd_step(
    shards: Sequence[Values],
    gradients: Sequence[Tensor],
    coefficient: Scalar,
    lr: float,
    weight_decay: float,
    limit: float | None = None,
    squares: SquareSums | None = None,
    noise: RoundingNoise | None = None,
) -> None:
    """Apply one step of SGD to every shard; see ``Update`` and ``apply`` for the arguments."""
    decay = 1 - lr * weight_decay
    updates = [Update(gradient, lr, decay, coefficient, limit) for gradient in gradients]
    apply(list(zip(shards, updates, strict=True)), noise, squares)


def noise_of(generator: torch.Generator | None) -> RoundingNoise | None:
    return None if generator is None else RoundingNoise(generator)


class OneRank:
    """Process group of one rank, for code that only asks for its size."""

    def size(self) -> int:
        return 1


def updater_of(targets: list[Target], store: Any, rule: Rule | None = None) -> Updater:
    """Return an updater on one rank that rounds to nearest; by default with SGD."""
    rules = dict.fromkeys((target.name for target in targets), rule or Sgd())
    group: Any = OneRank()
    return Updater(targets, rules, store, None, group, torch.device("cpu"))
