"""Update rules: how a parameter shard and its gradient become the new shard."""

from lomo_ds.update.rules.rule import Rule
from lomo_ds.update.rules.sgd import Sgd

__all__ = ["Rule", "Sgd"]
