"""Update rules: how a parameter shard and its gradient become the new shard."""

from lomo_ds.rules.base import Rule, Values
from lomo_ds.rules.sgd import Sgd
from lomo_ds.rules.square_sums import SquareSums

__all__ = ["Rule", "Sgd", "SquareSums", "Values"]
