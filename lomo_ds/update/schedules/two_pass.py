"""Two-pass schedule of the paper: the first backward measures gradients, the second recomputes them and updates."""

from torch import Tensor

from lomo_ds.update.schedules.schedule import Schedule


class TwoPass(Schedule):
    """Two passes without stored gradients: at most two parameters' gradients are alive, and clipping is exact."""

    passes = 2
    coefficients: list[float] | None = None  # clip coefficients from the first pass; None during the first pass

    def start(self, scale: float) -> None:
        super().start(scale)
        self.coefficients = None

    def offer_gathered_weight(self, index: int, whole: Tensor) -> None:
        if self.coefficients is not None:
            self.store.offer_gathered_weight(index, whole)

    def receive(self, indices: list[int], gradients: list[Tensor]) -> None:
        if self.coefficients is None:
            self.record_norms(indices, gradients)
        else:
            self.update(indices, gradients, self.coefficients)

    def apply(self, coefficients: list[float]) -> None:
        self.coefficients = coefficients
