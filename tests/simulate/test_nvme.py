"""The timeline of parameters on NVMe: the drive is never idle where it bounds a step, and nothing is read too soon."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from lomo_ds.models import load_config
from lomo_ds.planner import Machine, PlannedModel, Settings, plan_run
from lomo_ds.planner.simulated_step import record_plan
from lomo_ds.simulate import Lane, Operation, Program, run_program

LAYERS = 6
READ, WRITE = "nvme read", "nvme write"


@dataclass(frozen=True)
class Recorded:
    """A step of 7B that is cut to a few layers, none of which stays on the GPU after forward."""

    program: Program
    model_bytes: int


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    config = load_config("7b")
    config.num_hidden_layers = LAYERS
    model = PlannedModel(config)
    settings = Settings(
        gradient_clipping=0.0,
        gradient_checkpointing=True,
        batch=1,
        offload_param="nvme",
        max_live_parameters=0,
        max_reuse_distance=0,
    )
    plan = plan_run(model, settings, Machine(nvme=3e9))
    return Recorded(record_plan(plan, model), 2 * plan.numel)


def moved(program: Program, name: str) -> Iterator[tuple[int, Operation]]:
    """Yield the operations of a name with their numbers."""
    return ((number, operation) for number, operation in enumerate(program.operations) if operation.name == name)


def total(program: Program, name: str) -> int:
    return sum(operation.work.disk for _, operation in moved(program, name) if operation.work)


@pytest.mark.parametrize("nvme", [3e9, 7e9])
def test_a_drive_that_bounds_is_busy(recorded: Recorded, nvme: float) -> None:
    timeline = run_program(recorded.program, Machine(nvme=nvme))
    assert timeline.busy_share(Lane.DISK) >= 0.95


def test_weights_are_read_twice_and_written_once(recorded: Recorded) -> None:
    assert total(recorded.program, WRITE) == pytest.approx(recorded.model_bytes, rel=0.01)
    assert total(recorded.program, READ) == pytest.approx(2 * recorded.model_bytes, rel=0.02)


def test_every_write_waits_for_its_copy(recorded: Recorded) -> None:
    operations = recorded.program.operations
    for _, write in moved(recorded.program, WRITE):
        copies = [operations[wait.operation] for wait in write.waits]
        assert [copy.name for copy in copies] == ["copy down"]
        assert copies[0].work is not None
        assert write.work is not None
        assert copies[0].work.down <= write.work.disk
