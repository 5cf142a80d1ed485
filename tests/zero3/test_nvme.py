"""offload_param nvme: the steps of plain SGD, exact resume and export, from files that go with the model."""

import copy
import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.comm as dist
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.swap_tensor import partitioned_param_swapper
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lomo_ds
from lomo_ds import zero3
from lomo_ds.checkpoint import weights
from lomo_ds.config.validation import validate_ds_config
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.errors import CheckpointError, ConfigError, OffloadError
from lomo_ds.models import load_config, load_model, save_pretrained
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.zero3.nvme import SwapSpace
from lomo_ds.zero3.nvme_settings import PAGE_BYTES, nvme_settings
from tests.engines import identical, largest_difference, make_engine, weights_of
from tests.limits import HUNG
from tests.ranks import Ranks
from tests.reference import VOCABULARY, OddForCausalLM, PlainSGD, part, whole_batch
from tests.update.test_equivalence import CLIPS

GroupOf = Callable[..., Ranks]
STEPS = 4
AIO = {"block_size": 4096}  # of which size a shard goes to a file: four ranks have both kinds


def model_of_all_sizes(tied: bool = False, dropout: float = 0.0, layers: int = 2) -> OddForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=161,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        initializer_range=0.1,
    )
    return OddForCausalLM(config).train()


def on_nvme(folder: str, threshold: int = 0, **offload: Any) -> dict[str, Any]:
    """Sections of a ds_config."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return {
        "aio": AIO,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": threshold,
            "offload_param": {"device": "nvme", "nvme_path": folder, **offload},
        },
    }


def files_of(engine: lomo_ds.LomoEngine) -> list[bool]:
    """Return for each parameter whether it is in a file."""
    return [shard.slot is not None for shard in zero3.shards(engine.module)]


# the steps of plain SGD

COMBINATIONS = [
    # schedule, clip, accumulation, granularity, tied, persistence threshold, offload_param
    ("immediate", "no clip", 1, "layer", False, 0, {}),
    ("immediate", "group norm", 1, "module", True, 20_000, {"buffer_count": 2, "buffer_size": 1024}),
    ("two_pass", "global norm", 1, "layer", True, 0, {"buffer_count": 2}),
    ("two_pass", "value", 1, "module", False, 0, {"pin_memory": False, "buffer_size": 2048}),
    ("stash", "global norm", 2, "module", False, 100, {}),
    ("stash", "value", 1, "layer", True, 100_000, {"buffer_count": 3, "buffer_size": 1024}),
]


def train_both(folder: str, combination: tuple[Any, ...]) -> tuple[float, list[bool]]:
    """Train the same model in an engine and in plain PyTorch; the largest difference of any weight, what was a file."""
    schedule, clip, accumulation, granularity, tied, threshold, offload = combination
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = model_of_all_sizes(tied)
    limits = CLIPS[clip]
    reference = PlainSGD(copy.deepcopy(model), lr=0.3, weight_decay=0.1, **limits)
    params = {
        "weight_decay": 0.1,
        "clip_grad_value": limits.get("value"),
        "clip_group_norm": limits.get("group_norm"),
        "gather_granularity": granularity,
    }
    engine = make_engine(
        model,
        schedule,
        accumulation=accumulation,
        global_norm=limits.get("global_norm"),
        params=params,
        **on_nvme(folder, threshold, **offload),
    )
    for step in range(STEPS):
        batch = whole_batch(step, rows=world_size * accumulation)
        loss, norm = reference.step(batch)
        own = part(batch, rank, world_size)
        micro_batches = [part(own, index, accumulation) for index in range(accumulation)]
        assert float(engine.train_batch(micro_batches)) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
        if step == 1:  # between two steps, another order of the modules
            with torch.no_grad():
                evaluated = engine.module(**whole_batch(99, rows=2)).loss
                assert float(evaluated) == pytest.approx(
                    float(reference.model(**whole_batch(99, rows=2)).loss), abs=1e-5
                )
    difference = largest_difference(weights_of(engine), reference.model)
    filed = files_of(engine)
    engine.destroy()
    return difference, filed


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda combination: "-".join(map(str, combination[:4])))
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_steps_of_plain_sgd(ranks: GroupOf, tmp_path: Path, world_size: int, combination: tuple[Any, ...]) -> None:
    for difference, filed in ranks(world_size).run(train_both, str(tmp_path), combination):
        assert difference < 1e-6
        assert any(filed)
        assert not all(filed)


@pytest.mark.parametrize("combination", COMBINATIONS[1::3], ids=lambda combination: "-".join(map(str, combination[:4])))
def test_the_steps_of_plain_sgd_on_four_ranks(ranks: GroupOf, tmp_path: Path, combination: tuple[Any, ...]) -> None:
    test_the_steps_of_plain_sgd(ranks, tmp_path, 4, combination)


# whole runs: saved, resumed, exported

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}},
}


def make(folder: str, precision: str, schedule: str = "stash") -> lomo_ds.LomoEngine:
    """An engine with all that has a state: dropout, stochastic rounding, a loss scale, a learning-rate schedule."""
    get_accelerator().is_fp16_supported = lambda: True
    return make_engine(
        model_of_all_sizes(dropout=0.3),
        schedule=schedule,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        **on_nvme(f"{folder}/nvme", buffer_count=3, buffer_size=4096),
        **PRECISIONS[precision],
    )


def step(engine: lomo_ds.LomoEngine, number: int) -> tuple[float, float, float]:
    """Train on this rank's part of a batch; what a log line tells."""
    own = part(whole_batch(number, rows=2 * dist.get_world_size()), dist.get_rank(), dist.get_world_size())
    return float(engine.train_batch(own)), engine.get_global_grad_norm(), engine.cur_scale


def interrupted_and_not(folder: str, precision: str, schedule: str, in_background: bool) -> None:
    """A run that is saved, thrown away and resumed ends as one that never stopped, and says the same on the way."""
    weights.FILE_BYTES = 30_000  # several files a rank
    torch.manual_seed(5)
    whole = make(folder, precision, schedule)
    expected = [step(whole, number) for number in range(6)]

    torch.manual_seed(5)
    stopped = make(folder, precision, schedule)
    for number in range(3):
        step(stopped, number)
    stopped.save_checkpoint(folder, in_background=in_background)
    step(stopped, 3)  # while the shards are being written, perhaps
    stopped.saver.wait()

    torch.manual_seed(99)
    resumed = make(folder, precision, schedule)
    resumed.load_checkpoint(folder)
    assert str([step(resumed, number) for number in range(3, 6)]) == str(expected[3:])
    assert identical(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize(
    ("world_size", "precision", "schedule", "in_background"),
    [(1, "bf16", "immediate", True), (2, "bf16", "stash", True), (2, "fp16", "two_pass", False)],
)
def test_resuming_is_bit_exact(
    ranks: GroupOf, tmp_path: Path, world_size: int, precision: str, schedule: str, in_background: bool
) -> None:
    ranks(world_size).run(interrupted_and_not, str(tmp_path), precision, schedule, in_background)


def save_where_no_copy_fits(folder: str) -> str:
    """One rank's drive has no room for a second copy of its shards; what a save in the background says."""
    engine = make(folder, "fp32")
    step(engine, 0)
    fallocate = os.posix_fallocate
    if dist.get_rank() == 1:
        os.posix_fallocate = lambda *_: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    try:
        with pytest.raises(CheckpointError) as caught:
            engine.save_checkpoint(folder, in_background=True)
    finally:
        os.posix_fallocate = fallocate
    step(engine, 1)
    engine.save_checkpoint(folder)  # which needs no copy
    return str(caught.value)


def _raise(error: Exception) -> None:
    raise error


def test_a_copy_that_does_not_fit_is_told_on_all_ranks(ranks: GroupOf, tmp_path: Path) -> None:
    for output in ranks(2).run(save_where_no_copy_fits, str(tmp_path)):
        assert "cannot hold a shard of" in output
        assert output.endswith("No space left on device; make room, or use more ranks or another path (rank 1)")


def save_trained(folder: str) -> dict[str, Tensor]:
    engine = make(folder, "bf16")
    step(engine, 0)
    engine.save_checkpoint(folder)
    return weights_of(engine)


def load_trained(folder: str) -> dict[str, Tensor]:
    engine = make(folder, "bf16")
    engine.load_checkpoint(folder)
    return weights_of(engine)


def test_any_number_of_ranks_goes_on_with_the_same_bits(ranks: GroupOf, tmp_path: Path) -> None:
    saved = ranks(4).run(save_trained, str(tmp_path))[0]
    for world_size in (2, 1):
        assert all(identical(loaded, saved) for loaded in ranks(world_size).run(load_trained, str(tmp_path)))


def load_train_and_export(folder: str) -> list[bool]:
    """From a folder to shards and to a folder again, trained in between."""
    config = {"train_micro_batch_size_per_gpu": 1} | on_nvme(f"{folder}/nvme")
    config["optimizer"] = {"type": "LOMO", "params": {"lr": 0.1}}
    model = load_model(f"{folder}/model", load_config(f"{folder}/model"), config, torch.float32)
    engine = lomo_ds.initialize(model=model, config=config)[0]
    loaded = weights_of(engine)
    assert identical(loaded, dict(LlamaForCausalLM.from_pretrained(f"{folder}/model").named_parameters()))
    step(engine, 0)
    trained = weights_of(engine)
    assert not identical(trained, loaded)
    save_pretrained(engine.module, None, Path(folder) / "trained")
    dist.barrier()
    assert identical(trained, dict(LlamaForCausalLM.from_pretrained(f"{folder}/trained").named_parameters()))
    return files_of(engine)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_is_loaded_trained_and_exported(ranks: GroupOf, tmp_path: Path, world_size: int) -> None:
    LlamaForCausalLM(model_of_all_sizes().config).save_pretrained(tmp_path / "model")
    assert all(any(filed) for filed in ranks(world_size).run(load_train_and_export, str(tmp_path)))


# what else is done to a parameter


class PlainFiles:
    """A replacement for DeepSpeed's async_io, which takes minutes to compile."""

    def __init__(self, **_: Any) -> None:
        self.done = 0

    def new_cpu_locked_tensor(self, numel: int, like: Tensor) -> Tensor:
        return torch.empty(numel, dtype=like.dtype)

    def is_pinned(self, buffer: Tensor) -> bool:
        return True

    def async_pwrite(self, buffer: Tensor, path: str, start: int) -> int:
        assert start == 0
        Path(path).write_bytes(buffer.numpy().tobytes())
        self.done += 1
        return 0

    def async_pread(self, buffer: Tensor, path: str, start: int) -> int:
        assert start == 0
        buffer.copy_(torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=buffer.dtype)[: buffer.numel()])
        self.done += 1
        return 0

    def wait(self) -> int:
        done, self.done = self.done, 0
        return done


def hand_over(folder: str) -> None:
    """Parameters that others have split or change: deepspeed.zero.Init, GatheredParameters, another ds_config."""
    partitioned_param_swapper.MIN_AIO_BYTES = 4096
    AsyncIOBuilder.load = lambda *_, **__: SimpleNamespace(aio_handle=PlainFiles)
    config = {"train_micro_batch_size_per_gpu": 1} | on_nvme(f"{folder}/nvme", buffer_count=4, buffer_size=20_000)
    truth = dict(model_of_all_sizes().named_parameters())
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = model_of_all_sizes()
    assert any(parameter.ds_tensor.final_location for parameter in model.parameters()), "DeepSpeed swaps by itself"
    engine = make_engine(model, **on_nvme(f"{folder}/nvme"))
    assert any(files_of(engine))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        if dist.get_rank() == 0:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(truth[name] + 1)
    expected = {name: parameter.detach() + 1 for name, parameter in truth.items()}
    assert identical(weights_of(engine), expected)
    engine.destroy()
    in_memory = make_engine(model, zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}})
    assert not any(files_of(in_memory))
    assert identical(weights_of(in_memory), expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_others_do_to_parameters(ranks: GroupOf, tmp_path: Path, world_size: int) -> None:
    ranks(world_size).run(hand_over, str(tmp_path))


def bytes_taken(folder: str) -> tuple[list[int], list[str]]:
    """Host memory of all buffers, and what can be seen in nvme_path."""
    engine = make_engine(model_of_all_sizes(), **on_nvme(f"{folder}/nvme", buffer_count=2, buffer_size=1024))
    step(engine, 0)
    shards = zero3.shards(engine.module)
    in_memory = sum(shard.data.nbytes for shard in shards if shard.slot is None)
    (space,) = {shard.slot.space for shard in shards if shard.slot is not None}
    buffers = [buffer.memory.nbytes for buffer in space.buffers]
    assert in_memory < 4096 * len(shards)
    assert space.end == sum(ceil_div(shard.data.nbytes, 4096) * 4096 for shard in shards if shard.slot is not None)
    for shard in [shard.copy() for shard in shards] + [shard.copy() for shard in shards]:
        assert torch.equal(shard.read(), dict(zip((s.name for s in shards), shards, strict=True))[shard.name].read())
    end = space.end
    del shard
    copies = [shard.copy() for shard in shards]
    assert space.end == end, "the places of copies are used again"
    del copies
    return buffers, [entry.name for entry in Path(folder, "nvme").iterdir()]


def test_few_buffers_are_all_the_host_memory_and_no_file_is_left(ranks: GroupOf, tmp_path: Path) -> None:
    assert ranks(1).run(bytes_taken, str(tmp_path)) == [([4096, 4096], [])]


def test_what_is_gathered_next_is_read_ahead_and_never_stale(tmp_path: Path) -> None:
    settings = nvme_settings(on_nvme(str(tmp_path), buffer_count=2, buffer_size=2048) | {"aio": AIO}, itemsize=4)
    space = SwapSpace(settings, torch.device("cpu"))
    first, second, third = (space.allocate_slot(2000, torch.float32) for _ in range(3))
    values = {place: torch.full((2000,), float(number)) for number, place in enumerate((first, second, third))}
    for place, value in values.items():
        place.write(value)
    forward, backward = [[first], [second], [third]], [[second], [first]]
    for _ in range(2):
        for group in [*forward, *backward]:
            space.expect(group)
            assert all(torch.equal(place.read(2000), values[place]) for place in group)
    assert list(space.ahead) == [(first, 0)], "the next forward"
    first.write(values[first] + 1)
    assert torch.equal(first.read(2000), values[first] + 1)
    for group, expected in (([first], second), ([second], third), ([third], second), ([second], first)):
        space.expect(group)
        group[0].read(2000)
        assert list(space.ahead) == [(expected, 0)], "forward and backward are told apart"


def test_a_request_that_the_kernel_does_in_parts_is_done_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "pwritev"):
        whole = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda file, blocks, start, whole=whole: whole(file, [blocks[0][:PAGE_BYTES]], start)
        )
    space = SwapSpace(nvme_settings(on_nvme(str(tmp_path)) | {"aio": {}}, itemsize=4), torch.device("cpu"))
    place = space.allocate_slot(500_000, torch.float32)
    values = torch.randn(500_000)
    place.write(values)
    assert torch.equal(place.read(500_000), values)


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_an_error_of_the_drive_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    space = SwapSpace(nvme_settings(on_nvme(str(tmp_path)) | {"aio": AIO}, itemsize=4), torch.device("cpu"))
    place = space.allocate_slot(2000, torch.float32)
    monkeypatch.setattr(os, call, lambda *_: _raise(OSError(errno.EIO, os.strerror(errno.EIO))))
    place.write(torch.zeros(2000))
    with pytest.raises(OffloadError, match=f"{tmp_path} cannot be read or written: .*Input/output error; look at"):
        place.read(2000)  # the write is waited for first


def test_parallel_requests_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aio = AIO | {"queue_depth": 3, "intra_op_parallelism": 2}
    space = SwapSpace(nvme_settings(on_nvme(str(tmp_path)) | {"aio": aio}, itemsize=4), torch.device("cpu"))
    place = space.allocate_slot(20_000, torch.float32)
    place.write(torch.zeros(20_000))
    space.finish()
    meet = threading.Barrier(6)  # none returns before six are under way
    read, started = os.preadv, []

    def read_together(*arguments: Any) -> int:
        started.append(threading.active_count())
        if len(started) <= 6:
            meet.wait(HUNG)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", read_together)
    place.read(20_000)
    assert len(started) == 20  # blocks of a page
    assert sum(thread.name.startswith("lomo_ds-nvme") for thread in threading.enumerate()) >= 6


def test_a_space_is_freed_without_waiting_for_its_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may run in a thread that holds locks, such as one that starts."""
    space = SwapSpace(nvme_settings(on_nvme(str(tmp_path)) | {"aio": AIO}, itemsize=4), torch.device("cpu"))
    descriptor, requests = space.file.opened.descriptor, weakref.ref(space.file.requests)
    under_way, proceed, write, written = threading.Event(), threading.Event(), os.pwritev, []

    def wait_and_write(*arguments: Any) -> int:
        under_way.set()
        proceed.wait(HUNG)
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(os, "pwritev", wait_and_write)
    space.allocate_slot(2000, torch.float32).write(torch.zeros(2000))
    under_way.wait(HUNG)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("lomo_ds-nvme")]
    del space
    gc.collect()
    assert requests() is None
    assert os.fstat(descriptor).st_nlink == 0, "open until the requests have ended"
    proceed.set()
    for thread in threads:
        thread.join(HUNG)
    assert sum(written) == 2 * PAGE_BYTES
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# what is refused


def refuse(folder: str, aio: dict[str, Any], offload: dict[str, Any], precision: str = "fp32") -> None:
    config = on_nvme(folder) | {"train_micro_batch_size_per_gpu": 1, **PRECISIONS[precision]}
    config["optimizer"] = {"type": "LOMO", "params": {"lr": 0.1}}
    config["aio"] = AIO | aio
    config["zero_optimization"]["offload_param"] |= offload
    validate_ds_config(config)
    parse_ds_config(config)


@pytest.mark.parametrize(
    ("aio", "offload", "output"),
    [
        ({}, {"nvme_path": None}, "needs a folder for the parameters"),
        ({}, {"nvme_path": "/proc/none"}, "must be a folder on an NVMe drive, got /proc/none, which is not a folder"),
        ({}, {"nvme_path": "/proc"}, "nvme_path /proc cannot be used: "),
        ({}, {"buffer_count": 1}, "offload_param.buffer_count must be at least 2 for nvme, got 1"),
        ({}, {"buffer_size": 1000}, "offload_param.buffer_size must be at least 1024 elements"),
        ({"block_size": 5000}, {}, "aio.block_size must be a multiple of 4096, got 5000"),
        ({"queue_depth": 0}, {}, "aio.queue_depth must be a whole number of at least 1, got 0"),
        ({"intra_op_parallelism": "2"}, {}, "aio.intra_op_parallelism must be a whole number of at least 1, got '2'"),
    ],
)
def test_refused(tmp_path: Path, aio: dict[str, Any], offload: dict[str, Any], output: str) -> None:
    with pytest.raises(ConfigError, match=output):
        refuse(str(tmp_path), aio, offload)


def test_what_works_is_not_refused(tmp_path: Path) -> None:
    refuse(str(tmp_path), {}, {"buffer_size": 2048, "buffer_count": 2}, "bf16")
    assert not list(tmp_path.iterdir())
