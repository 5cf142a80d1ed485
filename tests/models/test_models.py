"""A Hugging Face folder into ZeRO-3 shards and back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen3Config

from lomo_ds.errors import ModelError
from lomo_ds.models import load_config, load_model, load_tokenizer, save_pretrained
from tests.engines import make_engine
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 12,
}  # fmt: skip
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def saved_llama(folder: Path, tied: bool = False, shards: bool = False) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    model.save_pretrained(folder, max_shard_size="5KB" if shards else "1GB")
    assert bool(list(folder.glob("*.index.json"))) == shards
    return folder


def logits_of(folder: str, dtype: torch.dtype) -> Tensor:
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(input_ids=ids).logits


def load_train_and_save(folder: str, out: str, tokenizer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of the loaded model, and of the trained one that is then saved."""
    model = load_model(folder, load_config(folder), DS_CONFIG, dtype)
    engine = make_engine(model, bf16={"enabled": dtype == torch.bfloat16})
    ids = torch.arange(16).view(1, 16)

    def logits() -> Tensor:
        engine.eval()
        with torch.no_grad():
            found = engine(input_ids=ids).logits.clone()
        engine.train()
        return found

    before = logits()
    engine.train_batch({"input_ids": ids, "labels": ids})
    after = logits()
    save_pretrained(engine.module, load_tokenizer(tokenizer), Path(out))
    return before, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "shards"), [(False, False), (True, True)])
def test_through_training_and_back(
    ranks: GroupOf, tmp_path: Path, demo: Path, tied: bool, shards: bool, dtype: torch.dtype
) -> None:
    folder = str(saved_llama(tmp_path / "in", tied, shards))
    out = tmp_path / "out"
    out.mkdir()
    for before, after in ranks(2).run(load_train_and_save, folder, str(out), str(demo / "model"), dtype):
        assert torch.equal(before, logits_of(folder, dtype))
        assert torch.equal(after, logits_of(str(out), dtype))
        assert not torch.equal(before, after)
    assert AutoTokenizer.from_pretrained(out)("the fox").input_ids
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("config", [MistralConfig(**SHAPE), Qwen3Config(**SHAPE)], ids=lambda c: c.model_type)
def test_other_dense_families(ranks: GroupOf, tmp_path: Path, demo: Path, config: LlamaConfig) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    arguments = str(tmp_path / "in"), str(tmp_path / "out"), str(demo / "model"), torch.float32
    before, after = ranks(2).run(load_train_and_save, *arguments)[0]
    assert torch.equal(before, logits_of(arguments[0], torch.float32))
    assert torch.equal(after, logits_of(arguments[1], torch.float32))


def refused(folder: str) -> str:
    with pytest.raises(ModelError) as refusal:
        load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
    return str(refusal.value)


def test_tensors_that_do_not_fit_are_named(ranks: GroupOf, tmp_path: Path) -> None:
    folder = saved_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["extra"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(25)
    for name in [name for name in weights if "layers.1" in name] + ["lm_head.weight", "model.embed_tokens.weight"]:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for sentence in ranks(2).run(refused, str(folder)):
        assert "model.embed_tokens.weight, model.layers.1.self_attn.q_proj.weight" in sentence
        assert "and 1 more are missing" in sentence
        assert "extra are unexpected" in sentence
        assert "model.norm.weight (25,) for (24,) have another shape" in sentence


def test_what_older_checkpoints_hold_beside_the_weights(ranks: GroupOf, tmp_path: Path) -> None:
    folder = saved_llama(tmp_path, tied=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert ranks(1).run(left_whole, str(folder)) == [0]


def test_a_second_save_leaves_nothing_of_the_first(ranks: GroupOf, tmp_path: Path, demo: Path) -> None:
    saved_llama(tmp_path / "out", shards=True)
    folder = str(saved_llama(tmp_path / "in"))
    arguments = folder, str(tmp_path / "out"), str(demo / "model"), torch.float32
    _, after = ranks(2).run(load_train_and_save, *arguments)[0]
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert torch.equal(after, logits_of(arguments[1], torch.float32))


def test_a_truncated_file_is_named(ranks: GroupOf, tmp_path: Path) -> None:
    file = saved_llama(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for sentence in ranks(2).run(refused, str(tmp_path)):
        assert f"{file} is not a whole safetensors file" in sentence


def test_pickled_weights_are_not_opened(ranks: GroupOf, tmp_path: Path) -> None:
    file = saved_llama(tmp_path) / "model.safetensors"
    file.rename(tmp_path / "pytorch_model.bin")
    assert "convert its .bin files" in ranks(1).run(refused, str(tmp_path))[0]


def test_a_folder_without_config_or_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"that holds a config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(ModelError, match="is not a model configuration"):
        load_config(str(tmp_path))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def left_whole(folder: str) -> int:
    model = load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
    make_engine(model, threshold=0)
    return sum(parameter.numel() for parameter in model.parameters())


def test_nothing_whole_is_left_after_loading(ranks: GroupOf, tmp_path: Path) -> None:
    assert ranks(2).run(left_whole, str(saved_llama(tmp_path))) == [0, 0]
