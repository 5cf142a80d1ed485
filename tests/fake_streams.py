"""A device that runs late: what is asked of its streams is done in any order that events and waits allow.

Enter ``FakeDevice`` and every tensor operation is put into the queue of the current stream instead of being executed.
Between two of them the streams advance at random, as little as not at all, so that a missing wait shows as a wrong
value. Memory is used again as soon as no tensor refers to it, as torch's caching allocator does for the stream that
allocated it; a copy on a side stream that is still to come then reads, or overwrites, what others have put there.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}
READS = {"_local_scalar_dense", "equal"}  # what the host must wait for


class FakeEvent:
    """Has happened when its stream has come to it."""

    def __init__(self, stream: "FakeStream") -> None:
        self.stream = stream
        self.done = False

    def happen(self) -> None:
        self.done = True

    def query(self) -> bool:
        return self.done


class FakeStream:
    """A queue of work, done in order; each piece with the event it waits for, if any."""

    def __init__(self, module: "FakeModule", name: str) -> None:
        self.module = module
        self.name = name
        self.work: deque[tuple[FakeEvent | None, Callable[[], Any]]] = deque()

    def record_event(self) -> FakeEvent:
        event = FakeEvent(self)
        self.work.append((None, event.happen))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.module.waits.append((self.name, event))
        self.work.append((event, lambda: None))

    def wait_stream(self, stream: "FakeStream") -> None:
        self.module.waits.append((self.name, stream.name))
        self.work.append((stream.record_event(), lambda: None))

    @property
    def ready(self) -> bool:
        return bool(self.work) and (self.work[0][0] is None or self.work[0][0].done)


class FakeModule:
    """Stands for ``torch.cuda``, as ``torch.get_device_module`` gives it.

    Attributes:
        waits: which stream was told to wait, and for what: an event, or the name of a stream.
    """

    def __init__(self) -> None:
        self.waits: list[tuple[str, FakeEvent | str]] = []
        self.streams: list[FakeStream] = []
        self.current = self.Stream()

    def is_available(self) -> bool:  # torch.utils.checkpoint asks which device has random states to keep
        return False

    def Stream(self, device: Any = None) -> FakeStream:
        """Named by the order in which they are made: 0 is the one that computes."""
        self.streams.append(FakeStream(self, str(len(self.streams))))
        return self.streams[-1]

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def advance(self, chance: random.Random) -> None:
        """Let some streams go on, as far as they can and chance will have it."""
        while chance.random() < 0.5:
            ready = [stream for stream in self.streams if stream.ready]
            if not ready:
                return
            self._run(chance.choice(ready))

    def synchronize(self) -> None:
        """Do all that was asked."""
        while ready := [stream for stream in self.streams if stream.ready]:
            self._run(ready[0])
        assert not any(stream.work for stream in self.streams), "a stream waits for an event that never happens"

    def _run(self, stream: FakeStream) -> None:
        _, action = stream.work.popleft()
        action()


class FakeDevice(TorchDispatchMode):
    """Defers every operation to a stream of ``module``; at the end, if nothing was raised, all are done.

    Args:
        seed: of the order in which streams advance.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        super().__init__()
        self.module = FakeModule()
        self.chance = random.Random(seed)
        self.blocks: dict[int, tuple[Tensor, StorageWeakRef]] = {}  # all memory by its address, and who has it now
        self.reused = 0
        monkeypatch.setattr(torch, "get_device_module", lambda device=None: self.module)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if kind is None:
            self.module.synchronize()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if func.is_view:
            return func(*args, **kwargs)
        if name in READS:
            self.module.synchronize()
            return func(*args, **kwargs)
        self.module.advance(self.chance)
        meta = tree_map_only(Tensor, _as_meta, (args, {**kwargs, "device": "meta"} if "device" in kwargs else kwargs))
        if name in ALLOCATIONS:
            return self._allocate(func(*meta[0], **{**meta[1], "device": "meta", "pin_memory": None}))
        late_args, late_kwargs = tree_map_only(Tensor, self._memory_of, (args, kwargs))
        if func._schema.is_mutable:
            self._defer(lambda: func(*late_args, **late_kwargs))
            return args[0] if func._schema.returns else None
        results = tree_map_only(Tensor, self._allocate, func(*meta[0], **meta[1]))
        memory = tree_map_only(Tensor, self._memory_of, results)
        self._defer(lambda: _fill(memory, func(*late_args, **late_kwargs)))
        return results

    def _defer(self, action: Callable[[], Any]) -> None:
        self.module.current.work.append((None, action))

    def _allocate(self, meta: Tensor) -> Tensor:
        """Memory for a tensor, its contents anything: of one that nobody refers to any more, where there is one."""
        nbytes = max(meta.untyped_storage().nbytes(), 1)
        free = [memory for memory, owner in self.blocks.values() if owner.expired() and len(memory) == nbytes]
        self.reused += bool(free)
        memory = self.chance.choice(free) if free else torch.full((nbytes,), 0x7F, dtype=torch.uint8)
        view = torch.frombuffer(memory.numpy(), dtype=torch.uint8)  # a storage of its own, so that its end is seen
        self.blocks[memory.data_ptr()] = memory, StorageWeakRef(view.untyped_storage())
        return _cut(view, meta)

    def _memory_of(self, tensor: Tensor) -> Tensor:
        """Return the memory of a tensor as another tensor, which does not keep it allocated."""
        start = tensor.untyped_storage().data_ptr()
        return _cut(self.blocks[start][0], tensor) if start in self.blocks else tensor.detach()


def _as_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _cut(memory: Tensor, like: Tensor) -> Tensor:
    size = memory.numel() // like.itemsize * like.itemsize
    return memory[:size].view(like.dtype).as_strided(like.size(), like.stride(), like.storage_offset())


def _fill(memory: Any, results: Any) -> None:
    pairs = [(memory, results)] if isinstance(memory, Tensor) else zip(memory, results, strict=True)
    for into, result in pairs:
        into.copy_(result)
