"""Tests of copies between host and device: each waits for the right earlier copies."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.memory import host_memory
from lomo_ds.memory.host_memory import HostTransfer
from lomo_ds.update.clipping import Clipping
from lomo_ds.update.schedules.immediate import Immediate
from lomo_ds.zero3 import Shard
from lomo_ds.zero3.stores import HostStore, host_store
from tests.fake_streams import FakeDevice, FakeModule
from tests.targets import flat_targets
from tests.updates import updater_of

CPU = torch.device("cpu")
COMPUTING, UPWARD = "0", "2"  # in the order in which they are made


def shard_of(host_tensor: Tensor, number: int) -> Shard:
    group: Any = None
    return Shard(str(number), host_tensor, 0, torch.Size([host_tensor.numel()]), group, host_tensor)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    """Streams that note waits, in front of a device that does everything at once."""
    module = FakeModule()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
    monkeypatch.setattr(host_memory, "IN_FLIGHT_BYTES", 400)
    monkeypatch.setattr(host_store, "IN_FLIGHT_BYTES", 400)
    return module


@pytest.mark.parametrize(
    ("numels", "waited_for"),
    [
        ([20] * 5, []),
        ([20] * 8, [0, 1, 2]),
        ([101] * 4, [0, 1, 2]),  # each larger than may be in flight: of two, the earlier
        ([20, 101, 20, 20, 20, 101], [0, 1, 2, 3, 4]),
    ],
)
def test_backward_waits_only_to_bound_the_bytes_in_flight(
    streams: FakeModule, numels: list[int], waited_for: list[int]
) -> None:
    """Under ``immediate`` with parameters in host memory: from gathered copies, by the whole way of a gradient."""
    store = HostStore([shard_of(torch.ones(numel), number) for number, numel in enumerate(numels)], CPU)
    targets = flat_targets(numels)
    schedule = Immediate(updater_of(targets, store), Clipping())
    streams.waits.clear()
    copied = []
    for target in targets:
        schedule.offer_gathered_weight(target, torch.ones(target.numel))
        schedule.receive([target], [torch.ones(target.numel)])
        copied.append(store.transfer.offloads[-1].copied)
    waits = [target for stream, target in streams.waits if stream == COMPUTING]
    assert waits == [copied[index] for index in waited_for]
    assert not [target for stream, target in streams.waits if stream == UPWARD]
    schedule.flush()
    assert not store.transfer.offloads
    assert all(shard.data.eq(0.5).all() for shard in store.shards.values())


def test_an_empty_fetch_uses_no_stream(streams: FakeModule) -> None:
    transfer = HostTransfer(CPU)
    transfer.offload(torch.ones(2), torch.zeros(2))
    before = len(streams.waits)
    assert not list(transfer.fetch([]))
    assert len(streams.waits) == before


def test_a_fetch_waits_only_for_the_last_offload_into_the_same_memory(streams: FakeModule) -> None:
    transfer = HostTransfer(CPU)
    host = torch.zeros(4)
    for host_tensor in (host, host, torch.zeros(4)):
        transfer.offload(torch.ones(4), host_tensor)
    copied = [offload.copied for offload in transfer.offloads]
    for host_tensor, expected in [(torch.zeros(4), [COMPUTING]), (host[2:], [COMPUTING, copied[1]])]:
        streams.waits.clear()
        next(transfer.fetch([host_tensor]))
        assert [target for stream, target in streams.waits if stream == UPWARD] == expected
        (arrived,) = [target for stream, target in streams.waits if stream == COMPUTING]
        assert arrived not in copied


def test_the_next_tensor_is_in_flight_while_one_is_used(streams: FakeModule) -> None:
    transfer = HostTransfer(CPU)
    started = 0

    def host_tensors() -> Any:
        nonlocal started
        for _ in range(4):
            started += 1
            yield torch.zeros(200)  # two are more than may be in flight

    assert [started for _ in transfer.fetch(host_tensors())] == [2, 3, 4, 4]


@pytest.mark.parametrize("seed", range(15))
def test_a_fetch_returns_what_was_offloaded_for_any_order_of_streams(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(host_memory, "IN_FLIGHT_BYTES", 160)
    chance = random.Random(seed)
    values = [torch.zeros(size) for size in (8, 8, 32, 8, 64)]  # as the host should hold them
    hosts = [value.clone() for value in values]
    pairs: list[tuple[Tensor, Tensor]] = []
    device = FakeDevice(monkeypatch, seed)
    with device:
        transfer = HostTransfer(CPU)
        for number in range(40):
            index = chance.randrange(len(hosts))
            action = chance.choice(["offload", "offload", "fetch", "leave", "compute", "flush"])
            if action == "offload":
                transfer.offload(torch.ones(len(hosts[index])).mul_(number), hosts[index])
                values[index] = torch.full((len(hosts[index]),), float(number))
            elif action == "fetch":
                chosen = chance.sample(range(len(hosts)), 3)
                arriving = transfer.fetch(hosts[other][: len(hosts[other]) // 2] for other in chosen)
                for other, tensor in zip(chosen, arriving, strict=True):
                    pairs.append((tensor.mul(2.0), values[other]))
            elif action == "leave":  # what was begun ahead is never asked for
                next(transfer.fetch(hosts))
            elif action == "compute":
                torch.ones(len(hosts[index])).mul_(-1)  # in memory that has just become free
            else:
                transfer.flush()
        transfer.flush()
    assert device.reused, "memory was never used again"
    for actual, value in pairs:
        assert actual.tolist() == (2 * value[: len(actual)]).tolist()
    assert [host.tolist() for host in hosts] == [value.tolist() for value in values]
