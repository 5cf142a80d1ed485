"""The timeline of parameters on NVMe: the drive is never idle where it bounds a step, and nothing is read too soon."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lomo_ds import zero3
from lomo_ds.models import load_config
from lomo_ds.planner import Machine, PlannedModel, Settings, plan_run
from lomo_ds.planner.simulated_step import record_plan
from lomo_ds.simulate import Lane, Operation, Program, run_program
from lomo_ds.simulate.recorder import Recorder
from lomo_ds.simulate.simulated_drive import SimulatedSwapFile, SimulatedTransfer
from lomo_ds.simulate.simulated_gpu import DEVICE, DeviceModule
from lomo_ds.simulate.streams import SimulatedEvent, Streams
from lomo_ds.zero3 import nvme
from lomo_ds.zero3.nvme import SwapSpace
from lomo_ds.zero3.nvme_settings import nvme_settings
from tests.zero3.test_nvme import on_nvme

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


@pytest.mark.parametrize("rate", [3e9, 7e9])
def test_a_drive_that_bounds_is_busy(recorded: Recorded, rate: float) -> None:
    timeline = run_program(recorded.program, Machine(nvme=rate))
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


def test_a_read_waits_until_its_memory_has_been_copied(recorded: Recorded) -> None:
    operations = recorded.program.operations
    for _, read in moved(recorded.program, READ):
        assert {operations[wait.operation].name for wait in read.waits} <= {"copy up", "copy down"}
    waiting = [read for _, read in moved(recorded.program, READ) if read.waits]
    pieces = zero3.default_pieces(itemsize=2)[0]
    assert len(waiting) > len(list(moved(recorded.program, READ))) - pieces


class NotedSwapFile(SimulatedSwapFile):
    """Notes which part of the file each operation moves."""

    def __init__(self, parts: dict[int, int], streams: Streams, *arguments: Any) -> None:
        super().__init__(streams, 1, *arguments)
        self.parts, self.streams = parts, streams

    def start_read(self, memory: Tensor, start: int, after: SimulatedEvent | None) -> SimulatedTransfer:
        self.parts[len(self.streams.program.operations)] = start
        return super().start_read(memory, start, after)

    def start_write(self, memory: Tensor, start: int, after: SimulatedEvent | None) -> SimulatedTransfer:
        self.parts[len(self.streams.program.operations)] = start
        return super().start_write(memory, start, after)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_is_read_and_written_again_only_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    streams, parts, chance = Streams(), dict[int, int](), random.Random(seed)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: DeviceModule(streams))
    monkeypatch.setattr(nvme, "SwapFile", partial(NotedSwapFile, parts, streams))
    settings = nvme_settings(on_nvme(str(tmp_path), buffer_count=16, buffer_size=2**20), itemsize=4)
    with FakeTensorMode(allow_non_fake_inputs=True), Recorder(streams):
        space = SwapSpace(settings, torch.device(DEVICE))
        slots = [space.allocate_slot(3 * 2**20, torch.float32) for _ in range(4)]
        for _ in range(20):
            group = chance.sample(slots, 2)
            space.expect(group)
            for slot in group:
                slot.read(slot.numel, DEVICE)
            for slot in chance.sample(slots, chance.randrange(3)):
                slot.write(torch.empty(slot.numel, device=DEVICE))
        space.finish()
    assert {streams.program.operations[number].name for number in parts} == {READ, WRITE}
    for machine in (Machine(nvme=1e9), Machine(nvme=100e9), Machine(nvme=10e9, pcie=1e9)):
        spans = run_program(streams.program, machine).spans
        for (earlier, start), (later, other) in itertools.combinations(parts.items(), 2):
            if start == other and streams.program.operations[earlier].name == WRITE:
                assert spans[earlier].end <= spans[later].start
