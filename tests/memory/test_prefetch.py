"""Tests of prefetching: copies start early, and the results have the same bits for any order of streams."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.memory import host_memory
from lomo_ds.memory.host_memory import Fetch, HostTransfer
from lomo_ds.memory.prefetch import Prefetcher
from lomo_ds.numerics import int8
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.schedules.stash import HostStash, Stash
from lomo_ds.zero3 import Shard
from lomo_ds.zero3.stores import DeviceStore, HostStore
from tests.fake_streams import FakeDevice
from tests.targets import flat_targets
from tests.updates import updater_of

CPU = torch.device("cpu")
NUMELS = [8, 30, 8, 100, 8]
# the buckets of three micro-batches: one brings another order, and two gradients of one parameter; one lacks some
STEP = [[[4], [3, 2], [1], [0]], [[4], [2, 3], [3], [0]], [[4], [3, 2, 2], [1]]]


def shard_of(host_tensor: Tensor, number: int) -> Shard:
    group: Any = None
    return Shard(str(number), host_tensor, 0, torch.Size([host_tensor.numel()]), group, host_tensor)


def schedule_of(kind: type[Stash | HostStash], dtype: torch.dtype | None) -> tuple[Any, list[Tensor]]:
    weights = [torch.ones(numel) for numel in NUMELS]
    store = DeviceStore([shard_of(weight, number) for number, weight in enumerate(weights)])
    return kind(updater_of(flat_targets(NUMELS), store), Clipping(), dtype), weights


def gradient(number: int, index: int) -> Tensor:
    return torch.randn(NUMELS[index], generator=torch.Generator().manual_seed(97 * number + index))


def bring(schedule: Any, start: int = 0) -> None:
    """A step's gradients."""
    for number, buckets in enumerate(STEP, start):
        for bucket in buckets:
            schedule.receive(
                [schedule.targets[index] for index in bucket], [gradient(number, index).mul(1.0) for index in bucket]
            )
        schedule.flush()


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_stash_in_host_memory_accumulates_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(host_memory, "IN_FLIGHT_BYTES", 160)
    in_host, expected = schedule_of(HostStash, dtype), schedule_of(Stash, dtype)
    for step in range(2):
        for schedule, _ in (in_host, expected):
            schedule.start(scale=1.0)
            bring(schedule, 3 * step)
        assert not in_host[0].transfer.offloads
        assert not in_host[0].prefetcher.fetches
        assert torch.equal(in_host[0].squared_norms(), expected[0].squared_norms())
        for schedule, _ in (in_host, expected):
            schedule.apply([0.5])
    assert all(torch.equal(one, other) for one, other in zip(in_host[1], expected[1], strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_a_stash_in_host_memory_accumulates_the_same_bits_for_any_order_of_streams(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    expected = schedule_of(Stash, None)
    bring(expected[0])
    monkeypatch.setattr(host_memory, "IN_FLIGHT_BYTES", 160)
    device = FakeDevice(monkeypatch, seed)
    in_host = schedule_of(HostStash, None)
    for index, numel in enumerate(NUMELS):
        in_host[0].buffers[in_host[0].targets[index]] = torch.empty(numel)
    with device:
        bring(in_host[0])
        in_host[0].apply([0.5])
    assert device.reused
    assert torch.equal(in_host[0].squared_norms(), expected[0].squared_norms())
    expected[0].apply([0.5])
    assert all(torch.equal(one, other) for one, other in zip(in_host[1], expected[1], strict=True))


class RecordingTransfer(HostTransfer):
    """Records when copies start, by the number of their host tensor."""

    def __init__(self, numbers: dict[int, int]) -> None:
        super().__init__(CPU)
        self.numbers = numbers  # by address
        self.log: list[str] = []

    def offload(self, tensor: Tensor, host_tensor: Tensor) -> None:
        self.log.append(f"offload {self.numbers[host_tensor.data_ptr()]}")
        super().offload(tensor, host_tensor)

    def start_fetch(self, host_tensor: Tensor) -> Fetch:
        self.log.append(f"fetch {self.numbers[host_tensor.data_ptr()]}")
        return super().start_fetch(host_tensor)


# two of 100 bytes may be in flight beside the one in use
AHEAD = ["fetch 0", "fetch 1", "fetch 2", "offload 0", "fetch 3", "offload 1", "offload 2", "offload 3"]


def test_the_second_micro_batch_prefetches_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "IN_FLIGHT_BYTES", 200)
    targets = flat_targets([25] * 4)
    stash = HostStash(updater_of(targets, DeviceStore([])), Clipping())
    for target in targets:
        stash.receive([target], [torch.ones(25)])
    stash.flush()
    transfer = RecordingTransfer({stash.buffers[target].data_ptr(): number for number, target in enumerate(targets)})
    stash.transfer = stash.prefetcher.transfer = transfer
    for target in targets:
        stash.receive([target], [torch.ones(25)])
    assert transfer.log == AHEAD


def test_eight_bit_weights_are_prefetched_in_the_order_of_the_previous_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [torch.zeros(int8.quantized_bytes(int8.BLOCK), dtype=torch.int8) for _ in range(4)]
    monkeypatch.setattr(host_memory, "IN_FLIGHT_BYTES", 2 * kept[0].nbytes)
    group: Any = None
    shape = torch.Size([int8.BLOCK])
    codes = [int8.view_blocks(buffer, int8.BLOCK).codes for buffer in kept]
    shards = [Shard(str(n), codes[n], 0, shape, group, buffer) for n, buffer in enumerate(kept)]
    store = HostStore(shards, CPU)

    def update_each() -> list[str]:
        transfer = RecordingTransfer({buffer.data_ptr(): index for index, buffer in enumerate(kept)})
        store.transfer = store.prefetcher.transfer = transfer
        for index in range(4):
            store.announce([str(index)])
            values = store.lend(str(index))
            assert isinstance(values, int8.Blocks)
            values.codes.add_(index)
            store.commit(str(index))
        store.flush()
        return transfer.log

    assert update_each() == [f"{action} {index}" for index in range(4) for action in ("fetch", "offload")]
    assert update_each() == AHEAD
    assert [shard.data.unique().tolist() for shard in shards] == [[0], [2], [4], [6]]


@pytest.mark.parametrize("seed", range(8))
def test_unused_prefetches_are_dropped_without_corrupting_memory(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    hosts = [torch.full((8,), float(number)) for number in range(6)]
    taken: list[tuple[int, Tensor]] = []
    computed: list[Tensor] = []
    with FakeDevice(monkeypatch, seed):
        prefetcher: Prefetcher[int] = Prefetcher(
            HostTransfer(CPU), lambda number: None if number == 3 else hosts[number]
        )
        for _ in range(5):
            for number in chance.sample(range(6), 4):
                prefetcher.announce(number)
                if number != 3:
                    taken.append((number, prefetcher.take(number).mul(2.0)))
            prefetcher.flush()
            computed += [torch.ones(8).mul_(3.0) for _ in range(4)]  # in the memory of what was dropped
    assert all(copy.eq(2.0 * number).all() for number, copy in taken)
    assert all(values.eq(3.0).all() for values in computed), "a copy that nobody waits for has written there"
