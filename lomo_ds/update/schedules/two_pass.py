"""Two-pass schedule of the paper: the first backward measures gradients, the second recomputes them and updates."""

from torch import Tensor

from lomo_ds.update.schedules.schedule import Schedule, StepPasses
from lomo_ds.update.target import Target


class TwoPass(Schedule):
    """Two passes without stored gradients: at most two parameters' gradients are alive, and clipping is exact."""

    passes = 2
    coefficients: list[float] | None = None  # clip coefficients from the first pass; None during the first pass

    def start(self, scale: float) -> None:
        super().start(scale)
        self.coefficients = None

    def run(self, passes: StepPasses) -> None:
        """Measure the gradients; then, unless the step must be skipped, compute them again and update."""
        if passes.backward(repeatable=True):
            coefficients = passes.reduce_norms()
            if coefficients is not None:
                self.apply(coefficients)
                passes.repeat()

    def offer_gathered_weight(self, target: Target, weight: Tensor) -> None:
        if self.coefficients is not None:
            self.updater.store.offer_gathered_weight(target.name, weight)

    def receive(self, targets: list[Target], gradients: list[Tensor]) -> None:
        if self.coefficients is None:
            self.record_norms(targets, gradients)
        else:
            self.update(targets, gradients, self.coefficients)

    def apply(self, coefficients: list[float]) -> None:
        self.coefficients = coefficients
