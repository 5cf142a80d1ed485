"""SGD, the rule of LOMO: p <- (1 - lr weight_decay) p - lr g (arXiv 2306.09782, equation 1)."""

from lomo_ds.numerics.apply import Update
from lomo_ds.numerics.int8 import Values
from lomo_ds.update.rules.rule import Gradient, Rule, State
from lomo_ds.update.target import Target


class Sgd(Rule):
    """Plain SGD with decoupled weight decay (arXiv 1711.05101), without state."""

    follows_gradient = True

    def update(self, target: Target, weight: Values, gradient: Gradient, state: State, step: int) -> Update:
        """Implement ``Rule.update``."""
        lr = target.options["lr"]
        decay = 1 - lr * target.options["weight_decay"]
        return Update(gradient.values, lr, decay, gradient.scale, gradient.limit)
