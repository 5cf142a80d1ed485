"""Update rules: how a parameter shard and its gradient become the new shard."""

from lomo_ds.rules.base import Rule, Values
from lomo_ds.rules.sgd import Sgd

__all__ = ["Rule", "Sgd", "Values"]
