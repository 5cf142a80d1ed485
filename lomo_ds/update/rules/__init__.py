"""Update rules: each turns a gradient shard into the update of its parameter shard."""

from collections.abc import Callable

from lomo_ds.update.rules.adalomo import AdaLomo
from lomo_ds.update.rules.rule import Gradient, Rule, State, StateSpec, SumsOverRanks
from lomo_ds.update.rules.sgd import Sgd

# the rule of each optimizer that ``config.lomo_config.OPTIMIZERS`` names
RULES: dict[str, Callable[[], Rule]] = {"lomo": Sgd, "adalomo": AdaLomo}

__all__ = ["RULES", "AdaLomo", "Gradient", "Rule", "Sgd", "State", "StateSpec", "SumsOverRanks"]
