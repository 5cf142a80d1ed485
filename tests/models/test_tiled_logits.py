"""Tests that a model with tiled logits has the same loss, gradients, steps and files as without."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Linear
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lomo_ds.errors import ModelError
from lomo_ds.models import can_tile_logits, load_config, load_model, save_pretrained, tile_logits
from lomo_ds.train import assembly
from tests.engines import WHOLE_THRESHOLD, largest_difference, make_engine, my_part, weights_of
from tests.largest import Largest
from tests.launching import demo_arguments, run_main
from tests.models.test_models import DS_CONFIG
from tests.ranks import Ranks
from tests.reference import VOCABULARY, PlainSGD, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
    "phi": PhiConfig(**SHAPE),  # its head has a bias
}
TILE = 4 * 300  # bytes: 4 blocks of 16 words by runs of 18 tokens, neither of which divide


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def both(config: Any, tile_bytes: int = TILE) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Build a model, and a copy with tiled logits."""
    plain = model_of(config)
    tiled = copy.deepcopy(plain)
    tile_logits(tiled, tile_bytes)
    return plain, tiled


def gradients(model: PreTrainedModel, **inputs: Any) -> list[Tensor]:
    """Return the loss, and the gradients of a multiple of it."""
    model.zero_grad()
    loss = model(**inputs).loss
    (loss * 3.0).backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_loss_and_gradients_are_equal(config: Any) -> None:
    plain, tiled = both(config)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in tiled.named_parameters()]
    batch = whole_batch(0, rows=3)
    mask = torch.ones_like(batch["input_ids"])
    mask[2, 7:] = 0
    for actual, expected in zip(
        *(gradients(model, **batch, attention_mask=mask) for model in (tiled, plain)), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)
    assert tiled(**batch).logits is None
    ids = batch["input_ids"]
    assert torch.equal(tiled(ids).logits, plain(ids).logits)
    assert torch.equal(tiled(ids, logits_to_keep=2).logits, plain(ids, logits_to_keep=2).logits)
    length = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(tiled.generate(ids, **length), plain.generate(ids, **length))


LABELS = whole_batch(0, rows=3)["labels"]


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"shift_labels": LABELS.roll(-1, dims=1)},
        {"ignore_index": 7},
        {"labels": torch.full_like(LABELS, -100)},
        {"labels": LABELS[:, -3:], "logits_to_keep": 3},
    ],
    ids=str,
)
def test_loss_arguments_of_transformers(more: dict[str, Any]) -> None:
    plain, tiled = both(FAMILIES["llama"])
    inputs = whole_batch(0, rows=3) | more
    if "ignore_index" in more:
        inputs["labels"] = inputs["input_ids"]
    torch.testing.assert_close(tiled(**inputs).loss, plain(**inputs).loss, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(tiled(**inputs).loss, plain(**inputs).loss, equal_nan=True)


def test_no_tensor_in_a_step_is_as_large_as_the_logits() -> None:
    batch = whole_batch(0, rows=16, length=32)
    numel = []
    for model in both(LlamaConfig(**SHAPE | {"vocab_size": 1000}), tile_bytes=2**16):
        with Largest() as largest:
            gradients(model, **batch)
        numel.append(largest.numel)
    whole_logits = 16 * 32 * 1000
    assert numel[0] == whole_logits
    assert numel[1] < whole_logits / 10


def test_other_outputs_of_the_model() -> None:
    plain, tiled = both(FAMILIES["llama"])
    inputs = whole_batch(0, rows=3) | {"output_hidden_states": True}
    assert len(tiled(**inputs).hidden_states) == len(plain(**inputs).hidden_states) == 3
    loss, *_ = tiled(**inputs, return_dict=False)
    assert torch.equal(loss, tiled(**inputs).loss)
    assert copy.deepcopy(tiled).forward.__self__ is not tiled


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_frozen_halves_and_checkpointed_layers(frozen: str, reentrant: bool | None) -> None:
    plain, tiled = both(FAMILIES["llama"])
    for model in (plain, tiled):
        model.get_submodule(frozen).requires_grad_(False)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
    batch = whole_batch(0, rows=3)
    results = [gradients(model, **batch) for model in (tiled, plain)]
    assert len(results[0]) == 2 if frozen == "model" else 10
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


class Quiet(LlamaForCausalLM):
    """A LLaMA with another class name."""


def test_models_with_another_loss_are_rejected() -> None:
    def error_message(model: PreTrainedModel) -> str:
        assert not can_tile_logits(model)
        with pytest.raises(ModelError) as refusal:
            tile_logits(model)
        return str(refusal.value)

    assert can_tile_logits(Quiet(FAMILIES["llama"]))
    assert "got OddForCausalLM, which has a forward of its own; train it without" in error_message(tiny_model())
    gpt = model_of(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1))
    assert "got GPT2LMHeadModel, which has a forward of its own" in error_message(gpt)
    gemma = model_of(Gemma2Config(**SHAPE, head_dim=12))  # caps its logits
    assert "got Gemma2ForCausalLM, which has a forward of its own" in error_message(gemma)
    model = model_of(FAMILIES["llama"])
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert "whose loss_function is <lambda>" in error_message(model)
    model = model_of(FAMILIES["llama"])
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert "whose lm_head is a Sequential and not a torch.nn.Linear" in error_message(model)
    tile_logits(model := model_of(FAMILIES["llama"]))
    assert "which has a forward of its own" in error_message(model), "it is tiled already"


# on ranks


@dataclass(frozen=True)
class Surroundings:
    """Settings that must not change the result."""

    tied: bool
    threshold: int
    reentrant: bool | None  # kind of activation checkpointing


SURROUNDINGS = [
    Surroundings(tied=False, threshold=0, reentrant=None),
    Surroundings(tied=True, threshold=0, reentrant=True),
    Surroundings(tied=True, threshold=WHOLE_THRESHOLD, reentrant=None),
    Surroundings(tied=False, threshold=WHOLE_THRESHOLD, reentrant=True),
    Surroundings(tied=True, threshold=0, reentrant=False),
    Surroundings(tied=False, threshold=0, reentrant=False),
]


def train_tiled(schedule: str, around: Surroundings) -> float:
    """Train an engine with tiled logits and plain PyTorch without, and return the largest difference of weights."""
    accumulation = 2 if schedule == "stash" else 1
    clip = None if schedule == "immediate" else 0.1
    model = model_of(FAMILIES["llama, tied" if around.tied else "llama"])
    reference = PlainSGD(copy.deepcopy(model), lr=0.3, global_norm=clip)
    tile_logits(model, TILE)
    if around.reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": around.reentrant})
    engine = make_engine(model, schedule, around.threshold, accumulation, global_norm=clip)
    for step in range(4):
        batch = whole_batch(step, rows=2 * accumulation * dist.get_world_size())
        loss, norm = reference.step(batch)
        own = my_part(batch)
        micro_batches = [{k: v.chunk(accumulation)[i] for k, v in own.items()} for i in range(accumulation)]
        assert float(engine.train_batch(micro_batches)) == pytest.approx(loss, abs=1e-5)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
    difference = largest_difference(weights_of(engine), reference.model)
    engine.destroy()
    return difference


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("schedule", ["immediate", "two_pass", "stash"])
def test_equals_plain_sgd(ranks: GroupOf, world_size: int, schedule: str) -> None:
    for around in SURROUNDINGS if world_size == 2 else SURROUNDINGS[1:3]:
        difference = max(ranks(world_size).run(train_tiled, schedule, around))
        print(f"{world_size} ranks, {schedule}, {around}: {difference:.1e}")
        assert difference < 1e-6, around


def is_head_held_behind_forward() -> bool:
    """Return whether the head's gathered weight is still referenced after forward."""
    model = model_of(FAMILIES["llama"])
    tile_logits(model, TILE)
    engine = make_engine(model, "stash", threshold=0)
    held: list[StorageWeakRef] = []

    def remember(head: Linear, *_: Any) -> None:
        assert head.weight.numel(), "it is gathered still"
        held.append(StorageWeakRef(head.weight.untyped_storage()))

    model.lm_head.register_forward_hook(remember, prepend=True)
    loss = engine(**whole_batch(0, rows=2)).loss
    deadline = time.monotonic() + 10.0
    while not held[0].expired() and time.monotonic() < deadline:
        time.sleep(0.01)  # gloo's own thread may be slow to let go of what it has gathered
    alive = not held[0].expired()
    engine.backward(loss)
    engine.step()
    return alive


def test_the_gathered_weight_is_not_held_for_backward(ranks: GroupOf) -> None:
    assert ranks(2).run(is_head_held_behind_forward) == [False, False]


def saved(folder: str, source: str, tiled: bool) -> None:
    model = load_model(source, load_config(source), DS_CONFIG, torch.float32)
    if tiled:
        tile_logits(model)
    save_pretrained(make_engine(model).module, None, Path(folder), max_shard_size="5KB")


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_an_export_has_equal_bytes(ranks: GroupOf, tmp_path: Path, name: str) -> None:
    model_of(FAMILIES[name]).save_pretrained(tmp_path / "in")
    for tiled in (False, True):
        ranks(2).run(saved, str(tmp_path / str(tiled)), str(tmp_path / "in"), tiled)
    files = {file.name for file in (tmp_path / "True").iterdir()}
    assert len(files) > 5
    assert files == {file.name for file in (tmp_path / "False").iterdir()}
    for file in files:
        assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes(), file


# a job


def run_job(ranks: Ranks, demo: Path, out: Path, **more: Any) -> tuple[str, list[dict[str, float]]]:
    """Return the output of rank 0 and the lines of the metrics log."""
    arguments = demo_arguments(
        demo, out, **{"max_steps": 4, "logging_steps": 1, "learning_rate": 0.5, "max_seq_length": 16} | more
    )
    results = ranks.run(run_main, arguments)
    assert [status for status, _, _ in results] == [0] * ranks.world_size, results
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return results[0][1] + results[0][2], records


def assert_same_losses(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for line, other_line in zip(one, other, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & other_line.keys():
            assert line[name] == pytest.approx(other_line[name], abs=1e-5)


def test_a_job_has_equal_losses_and_resumes_from_checkpoints_without_tiling(
    ranks: GroupOf, demo: Path, tmp_path: Path
) -> None:
    (tmp_path / "validation.txt").write_text("\n".join((demo / "validation.txt").read_text().splitlines()[:20]))
    more: dict[str, Any] = {"validation_file": tmp_path / "validation.txt"}
    _, tiled = run_job(ranks(2), demo, tmp_path / "tiled", tiled_logits="true", save_steps=2, **more)
    _, plain = run_job(ranks(2), demo, tmp_path / "plain", tiled_logits="false", **more)
    assert plain[-1].keys() >= {"loss", "eval_loss", "grad_norm"}
    assert_same_losses(tiled, plain)
    checkpoint = tmp_path / "tiled/checkpoint-2"
    more |= {"tiled_logits": "false", "resume_from_checkpoint": checkpoint}
    said, resumed = run_job(ranks(2), demo, tmp_path / "resumed", **more)
    assert "resumed after step 2 of 4" in said
    assert_same_losses(resumed, plain[-len(resumed) :])


@pytest.fixture(scope="module")
def gpt2(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a model with the demo's vocabulary whose logits cannot be tiled."""
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = json.loads((demo / "model/config.json").read_text())["vocab_size"]
    model_of(GPT2Config(vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=1, n_positions=32)).save_pretrained(folder)
    return folder


def test_unsupported_tiling_has_an_error_message(ranks: GroupOf, demo: Path, gpt2: Path, tmp_path: Path) -> None:
    more = {"model_name_or_path": gpt2, "tokenizer_name": demo / "model", "tiled_logits": "true"}
    status, _, said = ranks(1).run(run_main, demo_arguments(demo, tmp_path, **more))[0]
    assert status == 2
    assert "got GPT2LMHeadModel, which has a forward of its own; train it without" in said
    assert "Traceback" not in said


def count_tiled(argv: list[str]) -> tuple[int, int]:
    """Return the exit status of a job, and the number of models whose logits it tiled."""
    with mock.patch.object(assembly, "tile_logits") as tiled:
        return run_main(argv)[0], tiled.call_count


def test_a_job_tiles_supported_models_by_default(ranks: GroupOf, demo: Path, gpt2: Path, tmp_path: Path) -> None:
    def run(**more: Any) -> tuple[int, int]:
        arguments = demo_arguments(demo, tmp_path, **{"max_steps": 1, "overwrite_output_dir": True} | more)
        return ranks(1).run(count_tiled, arguments)[0]

    assert run() == (0, 1)
    assert run(tiled_logits="false") == (0, 0)
    assert run(model_name_or_path=gpt2, tokenizer_name=demo / "model") == (0, 0)
