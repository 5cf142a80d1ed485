"""`immediate` with an update kernel: one launch per parameter, and no second read of its gradient for the norm."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_ds.numerics import apply
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.schedules.immediate import Immediate
from tests.targets import flat_targets
from tests.updates import updater_of

NUMELS = [3, 8192, 20_000, 0]
GROUPS = [0, 1, 1, 2]


class InMemory:
    """Store of the given shards."""

    in_place = True

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards = shards

    def offer_gathered_weight(self, name: str, weight: Tensor) -> None: ...

    def announce(self, names: Sequence[str]) -> None: ...

    def lend(self, name: str) -> Tensor:
        return self.shards[int(name)]

    def commit(self, name: str) -> None: ...

    def flush(self) -> None: ...


class Kernel:
    """Fake ``float_kernel`` that writes sums of squares and counts launches."""

    def __init__(self) -> None:
        self.launches = 0

    def update(
        self, shard: Tensor, direction: Tensor, factor: float, decay: float, noise: Any, limit: Any, squares: Tensor
    ) -> None:
        self.launches += shard.numel() > 0
        values, sums = (
            direction.numpy().astype("f8"),
            squares.numpy(),
        )  # numpy operations are invisible to dispatch modes
        for program in range(len(sums)):
            sums[program] = (values[program * 8192 : (program + 1) * 8192] ** 2).sum()


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def schedule_of(clipping: Clipping) -> Immediate:
    options = {"lr": 0.1, "weight_decay": 0.0}
    targets = flat_targets(NUMELS, GROUPS, options)
    store = InMemory([torch.zeros(numel) for numel in NUMELS])
    return Immediate(updater_of(targets, store), clipping)


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) for numel in NUMELS]


@pytest.mark.parametrize("clipping", [Clipping(), Clipping(value=0.1)], ids=["no clip", "value"])
def test_only_the_update_reads_a_gradient(monkeypatch: pytest.MonkeyPatch, clipping: Clipping) -> None:
    kernel = Kernel()
    monkeypatch.setattr(apply, "kernel_for", lambda device: kernel)
    schedule = schedule_of(clipping)
    targets = schedule.targets
    for step in range(2):
        schedule.start(scale=1.0)
        arrived = gradients(step)
        kernel.launches = 0
        with Operations() as operations:
            schedule.receive([targets[3], targets[2]], [arrived[3], arrived[2]])
            schedule.receive([targets[1], targets[0]], [arrived[1], arrived[0]])
            schedule.flush()
        assert kernel.launches == 3, "one for each parameter with elements"
        names = {name for name in operations.names if "split" not in name}
        assert names <= {"aten::slice.Tensor", "aten::detach"}, "views alone"
        exact = sum(float(gradient.double().square().sum()) for gradient in arrived)
        assert float(schedule.squared_norms().sum()) == pytest.approx(exact, rel=1e-6)
        assert schedule.squared_norms().shape == (3,)


def test_unused_parameters_do_not_keep_sums_of_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "kernel_for", lambda device: Kernel())
    schedule = schedule_of(Clipping())
    schedule.receive(schedule.targets, gradients(0))
    schedule.start(scale=1.0)
    assert schedule.squared_norms().tolist() == [0.0, 0.0, 0.0]
    (arrived, *_) = gradients(1)
    schedule.receive(schedule.targets[:1], [arrived])
    assert float(schedule.squared_norms().sum()) == pytest.approx(float(arrived.double().square().sum()), rel=1e-6)


def test_group_clipping_computes_norms_before_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "kernel_for", lambda device: Kernel())
    assert schedule_of(Clipping(group_norm=1.0)).squares is None
    monkeypatch.undo()
    assert schedule_of(Clipping()).squares is None, "nor is there a kernel on the CPU"
