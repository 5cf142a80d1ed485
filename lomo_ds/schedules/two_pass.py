"""The paper's schedule: a first backward measures the gradients, a second computes them again and updates."""

from torch import Tensor

from lomo_ds.schedules.base import Schedule


class TwoPass(Schedule):
    """Two passes, nothing kept: one parameter's gradient is alive at a time, and clipping is exact."""

    passes = 2
    coefficients: list[float] | None = None  # of the clipping groups, from the first pass; None while measuring

    def start(self, scale: float) -> None:
        super().start(scale)
        self.coefficients = None

    def take(self, index: int, gradient: Tensor) -> None:
        if self.coefficients is None:
            self.add_to_norm(index, gradient)
        else:
            self.update(index, gradient, self.coefficients[self.targets[index].group])

    def apply(self, coefficients: list[float]) -> None:
        self.coefficients = coefficients
