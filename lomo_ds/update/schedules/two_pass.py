"""The paper's schedule: a first backward measures the gradients, a second computes them again and updates."""

from torch import Tensor

from lomo_ds.update.schedules.schedule import Schedule


class TwoPass(Schedule):
    """Two passes, nothing kept: no more than two parameters' gradients are alive, and clipping is exact."""

    passes = 2
    coefficients: list[float] | None = None  # of the clipping groups, from the first pass; None while measuring

    def start(self, scale: float) -> None:
        super().start(scale)
        self.coefficients = None

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        if self.coefficients is not None:
            self.store.offer_gathered_weight(index, whole)

    def take(self, indices: list[int], gradients: list[Tensor]) -> None:
        if self.coefficients is None:
            self.note_norms(indices, gradients)
        else:
            self.update(indices, gradients, self.coefficients)

    def apply(self, coefficients: list[float]) -> None:
        self.coefficients = coefficients
