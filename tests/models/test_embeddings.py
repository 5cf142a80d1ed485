"""Tests of adding embedding rows for new tokens: equal to transformers, trained, saved and exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from lomo_ds.models import load_config, load_model, save_pretrained, set_vocab_size
from lomo_ds.models.embeddings import PIECE_BYTES, MeanRows
from lomo_ds.models.sources import Stored
from tests.engines import largest_difference, make_engine, my_part, weights_of
from tests.launching import demo_arguments, run_main
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

GroupOf = Callable[..., Ranks]
STORED, ROWS = 61, 68
IDS = (torch.arange(6 * 8).view(6, 8) * 7) % ROWS
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
SIZES: dict[str, Any] = {
    "vocab_size": STORED, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "untied": AutoConfig.for_model("llama", **SIZES),
    "tied": AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True),
    "head with a bias": AutoConfig.for_model("phi", **SIZES),
    "other names": AutoConfig.for_model(
        "gpt2", vocab_size=STORED, n_embd=24, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip


def resized_by_transformers(folder: Path) -> PreTrainedModel:
    """Set the new rows of embeddings and biases to the mean of the stored rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in module.parameters():
                parameter[STORED:] = parameter[:STORED].double().mean(0).float()
    return model


def load_resized(folder: str, **more: Any) -> PreTrainedModel:
    config = load_config(folder)
    set_vocab_size(config, ROWS)
    return load_model(folder, config, DS_CONFIG, torch.float32, stored_rows=STORED, **more)


def load_train_and_save(folder: str, out: str, before: PreTrainedModel, after: PreTrainedModel) -> tuple[float, float]:
    """Return the largest differences of the weights from the reference's after loading and after a step."""
    engine = make_engine(load_resized(folder), lr=0.1)
    loaded = largest_difference(weights_of(engine), before)
    engine.train_batch(my_part({"input_ids": IDS, "labels": IDS}))
    trained = largest_difference(weights_of(engine), after)
    save_pretrained(engine.module, None, Path(out))
    engine.destroy()
    return loaded, trained


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_resizing_equals_transformers(
    ranks: GroupOf, tmp_path: Path, config: PretrainedConfig, world_size: int
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    before, after = (resized_by_transformers(tmp_path / "in") for _ in range(2))
    after(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(after.parameters(), lr=0.1).step()
    results = ranks(world_size).run(load_train_and_save, str(tmp_path / "in"), str(tmp_path / "out"), before, after)
    for loaded, trained in results:
        assert loaded == 0
        assert trained < 1e-6
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert exported.config.vocab_size == ROWS
    assert exported.get_input_embeddings().weight.shape[0] == exported.get_output_embeddings().weight.shape[0] == ROWS
    assert largest_difference(dict(exported.named_parameters()), after) < 1e-6


def normal_rows(folder: str) -> tuple[Tensor, Tensor]:
    model = load_resized(folder, new_rows="normal", seed=3)
    weights = weights_of(make_engine(model))
    return weights["model.embed_tokens.weight"], weights["lm_head.weight"]


def test_normal_rows_are_equal_for_any_world_size(ranks: GroupOf, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MODELS["untied"])
    model.save_pretrained(tmp_path)
    stored = model.get_input_embeddings().weight
    (one, head), *others = ranks(1).run(normal_rows, str(tmp_path)) + ranks(3).run(normal_rows, str(tmp_path))
    assert torch.equal(one[:STORED], stored)
    assert 0.01 < one[STORED:].std() < 0.03
    assert not torch.equal(one[STORED:], head[STORED:])
    assert all(torch.equal(one, other) and torch.equal(head, others_head) for other, others_head in others)


def test_the_mean_is_read_in_pieces() -> None:
    rows = torch.randn(3 * PIECE_BYTES // 4 // 1024, 1024)
    read: list[int] = []

    def copy_piece(start: int, out: Tensor) -> None:
        read.append(out.numel())
        out.copy_(rows.view(-1)[start : start + out.numel()])

    mean = MeanRows(torch.Size([2, 1024]), torch.float32, Stored(rows.shape, torch.float32, "rows", copy_piece))
    out = torch.empty(1024)
    mean.copy_flat(512, out)
    assert torch.equal(out, rows.double().mean(0).float().roll(512))
    assert max(read) * 4 <= PIECE_BYTES
    assert sum(read) == rows.numel(), "once"


# a job

CHAT = {"pad_token": "<pad>", "new_special_tokens": "<|user|>, <|assistant|>"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text(json.dumps({"text": "<|user|>Who is the fox?<|assistant|>A friend of the hen."}) + "\n")
    return file


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_chat_model_from_a_base_model(ranks: GroupOf, demo: Path, chats: Path, tmp_path: Path, weights: str) -> None:
    """Check it across a checkpoint: the resumed run ends with the same bytes."""

    def run(out: Path, **more: Any) -> None:
        more = {"train_file": chats, "max_seq_length": 8, "max_steps": 4, "learning_rate": 0.5} | CHAT | more
        arguments = demo_arguments(demo, out, resize_embeddings="mean", weights=weights, **more)
        results = ranks(2).run(run_main, arguments)
        assert [status for status, *_ in results] == [0, 0], results

    run(tmp_path / "whole", save_steps=2)
    run(tmp_path / "resumed", resume_from_checkpoint=tmp_path / "whole/checkpoint-2")
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "resumed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "resumed")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer)
    pad, user, assistant = tokenizer.convert_tokens_to_ids(["<pad>", "<|user|>", "<|assistant|>"])
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == pad
    ids = tokenizer("<|user|>fox<|assistant|>", add_special_tokens=False).input_ids
    assert (ids[0], ids[-1]) == (user, assistant)
    assert "<|user|>" not in tokenizer.decode([user], skip_special_tokens=True)
    rows = model.get_input_embeddings().weight
    assert not torch.equal(rows[user], rows[assistant]), "they are the mean no more"


def test_a_text_with_new_tokens_needs_new_rows(ranks: GroupOf, demo: Path, chats: Path, tmp_path: Path) -> None:
    status, _, said = ranks(1).run(run_main, demo_arguments(demo, tmp_path, train_file=chats, **CHAT))[0]
    assert status == 2
    assert "has the token '<|user|>'" in said
    assert "add rows with --resize_embeddings" in said


def test_a_new_token_that_no_text_has_needs_no_row(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    status, _, said = ranks(1).run(run_main, demo_arguments(demo, tmp_path, max_steps=1, pad_token="<pad>"))[0]
    assert status == 0, said
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<pad>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.pad_token_id is None
