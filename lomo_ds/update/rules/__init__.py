"""Update rules: compute the new parameter shard from the shard and its gradient."""

from lomo_ds.update.rules.rule import Rule
from lomo_ds.update.rules.sgd import Sgd

__all__ = ["Rule", "Sgd"]
