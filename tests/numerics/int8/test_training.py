"""Training with weights in eight bits, and with gathers in eight bits, against plain PyTorch doing the same."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import pytest
import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lomo_ds
from lomo_ds import zero3
from lomo_ds.checkpoint import MODEL
from lomo_ds.checkpoint.state import check_same_blocks
from lomo_ds.errors import CheckpointError, LomoError
from lomo_ds.models import load_tokenizer
from lomo_ds.numerics.int8 import eager
from lomo_ds.train.export_checkpoint import export_checkpoint
from tests.checkpoint.test_engine_checkpoints import step as checkpoint_step
from tests.determinism import deterministic_algorithms
from tests.engines import identical, make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
LR = 0.3
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
SMALL = LlamaConfig(
    vocab_size=61, hidden_size=20, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


def int8_engine(model: Module, schedule: str, offload: str, **options: Any) -> lomo_ds.LomoEngine:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 25, "offload_param": {"device": offload}}
    params = {"weights": "int8", "rounding": "nearest", **options.pop("params", {})}
    return make_engine(model, schedule, lr=LR, params=params, zero_optimization=zero, **options)


class PlainInt8:
    """Whole weights in one process: codes and scales of each rank's part, decoded for forward, updated from fp32."""

    def __init__(self, model: Module, parts: int) -> None:
        self.model = model
        self.kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                self.kept[name] = [eager.encode(chunk) for chunk in parameter.detach().flatten().chunk(parts)]
        self._decode()

    def step(self, batch: dict[str, Tensor]) -> float:
        self.model.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            if name not in self.kept:
                parameter.data -= LR * gradient
                continue
            for (codes, scales), chunk in zip(
                self.kept[name], gradient.flatten().chunk(len(self.kept[name])), strict=True
            ):
                exact = eager.decode(codes, scales, torch.float32) - LR * chunk
                eager.update_(codes, scales, exact, -1.0, 0.0, None)
        self._decode()
        return float(loss.detach())

    def _decode(self) -> None:
        for name, parts in self.kept.items():
            parameter = self.model.get_parameter(name)
            flat = torch.cat([eager.decode(codes, scales, torch.float32) for codes, scales in parts])
            parameter.data.copy_(flat.view(parameter.shape))


@deterministic_algorithms()  # whatever nobody writes to is nan, as what lies behind a shard's end
def train_in_eight_bits(schedule: str, offload: str, granularity: str) -> float:
    """The largest share of a matrix's weights that are not bit for bit those of plain PyTorch after three steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = tiny_model()
    reference = PlainInt8(copy.deepcopy(model), world_size)
    engine = int8_engine(model, schedule, offload, params={"gather_granularity": granularity})
    for number in range(3):
        batch = whole_batch(number, rows=2 * world_size)
        assert float(engine.train_batch(part(batch, rank, world_size))) == pytest.approx(
            reference.step(batch), abs=1e-3
        )
    worst = 0.0
    for name, weight in ((name, weight.cpu()) for name, weight in weights_of(engine).items()):
        plain = reference.model.get_parameter(name).detach()
        # sums over ranks differ in their last bits, whereupon a value between two codes may go to either
        assert float((weight - plain).abs().max()) <= 1.01 * float(plain.abs().max()) / 127 + 1e-7
        matrix = name in reference.kept and name != "shift"  # whose gradient is nothing but rounding errors
        worst = max(worst, float((weight != plain).float().mean()) if matrix else 0.0)
    return worst


@pytest.mark.parametrize(
    ("schedule", "granularity"), [("immediate", "module"), ("two_pass", "layer"), ("stash", "layer")]
)
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("world_size", [1, 2, 3])  # three divide no matrix of it
def test_equals_plain_pytorch(ranks: GroupOf, world_size: int, offload: str, schedule: str, granularity: str) -> None:
    for different in ranks(world_size).run(train_in_eight_bits, schedule, offload, granularity):
        assert different < 0.02


def bytes_kept(offload: str) -> tuple[int, int]:
    """Return the bytes of this rank's matrices, and the bytes that they would have in bf16."""
    engine = int8_engine(torch.nn.Linear(300, 200), "immediate", offload, bf16={"enabled": True})
    matrices = [s for s in zero3.shards(engine.module) if s.data.dtype == torch.int8]
    return sum(shard.storage.nbytes for shard in matrices), 2 * sum(shard.data.numel() for shard in matrices)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_shards_take_half_of_the_bytes(ranks: GroupOf, offload: str) -> None:
    for kept, of_bf16 in ranks(2).run(bytes_kept, offload):
        assert 0.5 * of_bf16 < kept < 0.52 * of_bf16


def resumed_and_not(folder: str, offload: str) -> None:
    """A run saved, thrown away and resumed has the same codes and scales as one that never stopped."""
    sections: dict[str, Any] = {
        "params": {"rounding": "auto"},
        "bf16": {"enabled": True},
        "accumulation": 2,
        "global_norm": 1.0,
    }
    whole = int8_engine(tiny_model(), "stash", offload, **copy.deepcopy(sections))
    expected = [checkpoint_step(whole, number) for number in range(6)]
    stopped = int8_engine(tiny_model(), "stash", offload, **copy.deepcopy(sections))
    for number in range(4):
        checkpoint_step(stopped, number)
    stopped.save_checkpoint(folder, in_background=True)
    checkpoint_step(stopped, 4)  # while the shards are being written
    stopped.saver.wait()
    resumed = int8_engine(tiny_model(seed=7), "stash", offload, **copy.deepcopy(sections))
    resumed.load_checkpoint(folder)
    assert [checkpoint_step(resumed, number) for number in range(4, 6)] == expected[4:]
    resumed_shards, whole_shards = (
        {s.name: s.data for s in zero3.shards(engine.module)} for engine in (resumed, whole)
    )
    assert identical(resumed_shards, whole_shards)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_is_bit_exact(ranks: GroupOf, tmp_path: Path, world_size: int, offload: str) -> None:
    ranks(world_size).run(resumed_and_not, str(tmp_path), offload)


def saved(folder: str, dtype: str, tokenizer: str) -> dict[str, Tensor]:
    engine = int8_engine(LlamaForCausalLM(SMALL), "immediate", "none", **PRECISIONS[dtype])
    assert {s.name for s in zero3.shards(engine.module) if s.data.dtype == torch.int8} == {
        name for name, parameter in LlamaForCausalLM(SMALL).named_parameters() if parameter.dim() == 2
    }
    ids = torch.arange(24).view(2, 12) % 61
    engine.train_batch({"input_ids": ids, "labels": ids})

    def add_files(folder: Path) -> None:
        (folder / MODEL).mkdir()
        SMALL.save_pretrained(folder / MODEL)
        load_tokenizer(tokenizer).save_pretrained(folder / MODEL)

    engine.save_checkpoint(folder, add_files=add_files)
    return weights_of(engine)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_checkpoint_becomes_a_model(ranks: GroupOf, tmp_path: Path, demo: Path, dtype: str) -> None:
    (expected, _, _) = ranks(3).run(saved, str(tmp_path / "run"), dtype, str(demo / "model"))
    export_checkpoint(tmp_path / "run/checkpoint-1", tmp_path / "model", "5GB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == next(iter(expected.values())).dtype
    assert identical(dict(model.named_parameters()), expected)


def resumed_on_another_number(folder: str) -> str:
    engine = int8_engine(LlamaForCausalLM(SMALL), "immediate", "none")
    try:
        engine.load_checkpoint(folder)
    except LomoError as error:
        return str(error)
    return "resumed"


def test_blocks_that_begin_elsewhere_are_refused(ranks: GroupOf, tmp_path: Path, demo: Path) -> None:
    ranks(3).run(saved, str(tmp_path), "fp32", str(demo / "model"))
    assert "resume on 3" in ranks(2).run(resumed_on_another_number, str(tmp_path))[0]
    record = {
        "world_size": 4,
        "tensors": {"w": [[64, 64], "int8"], f"w{zero3.SCALES}": [[64], "bfloat16"]},
        "rule_state": {},
    }
    check_same_blocks(tmp_path, record, 2)  # 64 blocks, which both cut between
    with pytest.raises(CheckpointError, match="differ on 3 ranks; resume on 4"):
        check_same_blocks(tmp_path, record, 3)


def test_buffers_are_not_put_into_eight_bits() -> None:
    whole = {"weight": torch.empty(8, 8, device="meta"), "decay": torch.empty(8, 8, device="meta")}
    kept = zero3.stored_tensors(whole, {"weight"}, 2)
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "weight": torch.int8, f"weight{zero3.SCALES}": torch.bfloat16, "decay": torch.float32,
    }  # fmt: skip


def started_again() -> None:
    """An engine over a model that has been split already, and has been gathered otherwise."""
    model = tiny_model()
    quantized = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_quantized_weights": True}
    first = make_engine(model, "immediate", lr=0.0, zero_optimization=quantized)
    before = weights_of(first)
    first.destroy()
    plain = make_engine(model, "immediate", lr=0.0)
    seen: dict[str, Tensor] = {}
    plain.module.lm_head.register_forward_hook(lambda m, i, o: seen.update(weight=m.weight.detach().clone()))
    plain.train_batch(part(whole_batch(0, rows=2), dist.get_rank(), dist.get_world_size()))
    assert torch.equal(seen["weight"], before["lm_head.weight"]), "the old engine's gathering is gone"
    plain.destroy()
    int8_engine(model, "immediate", "cpu").destroy()
    assert any(shard.data.dtype == torch.int8 for shard in zero3.shards(model)), "what was split before is converted"
    with pytest.raises(LomoError, match=r"set optimizer\.params\.weights to int8"):
        make_engine(model, "immediate")


def test_an_engine_takes_over_a_model_from_another(ranks: GroupOf) -> None:
    ranks(1).run(started_again_alone)
    ranks(2).run(started_again)


def started_again_alone() -> None:
    model = tiny_model()
    make_engine(model, "immediate").destroy()
    int8_engine(model, "immediate", "none")
    assert any(shard.data.dtype == torch.int8 for shard in zero3.shards(model))


def written_by_a_user() -> None:
    engine = int8_engine(tiny_model(), "immediate", "none")
    module, seen = engine.module.model.layers[0].mlp.down_proj, []
    module.register_forward_hook(lambda module, i, o: seen.append(module.weight.detach().clone().flatten()))
    weight = module.weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if dist.get_rank() == 0:
            weight.data.copy_(torch.arange(weight.numel()).view(weight.shape) % 128 / 127.0)
    whole = torch.arange(20 * 33) % 128 / 127.0
    assert torch.allclose(weights_of(engine)["model.layers.0.mlp.down_proj.weight"].flatten(), whole, atol=0.005)
    engine.train_batch(part(whole_batch(0, rows=2), dist.get_rank(), dist.get_world_size()))
    assert torch.allclose(seen[0], whole, atol=0.005), "and it is what modules compute with"


def test_what_a_user_writes_is_put_into_eight_bits(ranks: GroupOf) -> None:
    ranks(2).run(written_by_a_user)


def untouched_by_a_step(offload: str) -> None:
    """With a learning rate of 0 nothing changes, though modules have seen rounded copies."""
    zero = {"stage": 3, "zero_quantized_weights": True, "offload_param": {"device": offload}}
    engine = make_engine(tiny_model(), "immediate", lr=0.0, zero_optimization=zero)
    before = {shard.name: shard.data.clone() for shard in zero3.shards(engine.module)}
    engine.train_batch(part(whole_batch(0, rows=2), dist.get_rank(), dist.get_world_size()))
    assert identical({shard.name: shard.data for shard in zero3.shards(engine.module)}, before)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_rounding_on_the_wire_stays_there(ranks: GroupOf, offload: str) -> None:
    ranks(2).run(untouched_by_a_step, offload)


@deterministic_algorithms()  # whatever nobody writes to is nan, as what lies behind a shard's end
def gathered_in_eight_bits(threshold: int) -> float:
    """The largest error of what modules see, over what rounding to the nearest of 127 steps allows."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold, "zero_quantized_weights": True}
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = make_engine(model, "immediate", lr=0.0, zero_optimization=zero)
    seen: dict[str, Tensor] = {}
    for name in ("model.embed_tokens", "lm_head"):
        module = engine.module.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, n=f"{name}.weight": seen.update({n: m.weight.detach().clone()}))
    for number in range(2):
        engine.train_batch(part(whole_batch(number, rows=3), dist.get_rank(), dist.get_world_size()))
    assert identical(weights_of(engine), before), "what is read of the model, to be exported, has not been rounded"
    return max(float((seen[n] - before[n]).abs().max() / (before[n].abs().max() / 254)) for n in seen)


@pytest.mark.parametrize("threshold", [0, 100_000])
def test_what_modules_see_has_travelled_in_eight_bits(ranks: GroupOf, threshold: int) -> None:
    for error in ranks(3).run(gathered_in_eight_bits, threshold):
        assert 0.5 < error <= 1.01
