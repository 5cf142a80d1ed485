"""Tests of loading a Hugging Face folder into ZeRO-3 shards and exporting it again."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from lomo_ds import zero3
from lomo_ds.data.fingerprint import fingerprint
from lomo_ds.errors import ModelError
from lomo_ds.models import (
    export,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    presets,
    random_weights,
    save_pretrained,
    verify_export,
)
from lomo_ds.models.meta_model import meta_model
from tests.data.datasets import source
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
    """Return the logits of the loaded model, and of the trained model before it is saved."""
    model = load_model(folder, load_config(folder), DS_CONFIG, dtype)
    engine = make_engine(model, bf16={"enabled": dtype == torch.bfloat16})
    ids = torch.arange(16).view(1, 16)

    def logits() -> Tensor:
        engine.eval()
        with torch.no_grad():
            logits = engine(input_ids=ids).logits.clone()
        engine.train()
        return logits

    before = logits()
    engine.train_batch({"input_ids": ids, "labels": ids})
    after = logits()
    save_pretrained(engine.module, load_tokenizer(tokenizer), Path(out))
    return before, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "shards"), [(False, False), (True, True)])
def test_load_train_and_export(
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


def refused(folder: str) -> str:
    with pytest.raises(ModelError) as refusal:
        load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
    return str(refusal.value)


def test_the_error_names_mismatched_tensors(ranks: GroupOf, tmp_path: Path) -> None:
    folder = saved_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["extra"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(25)
    for name in [name for name in weights if "layers.1" in name] + ["lm_head.weight", "model.embed_tokens.weight"]:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for message in ranks(2).run(refused, str(folder)):
        assert "model.embed_tokens.weight, model.layers.1.self_attn.q_proj.weight" in message
        assert "11 missing: " in message
        assert "and 1 more; 1 unexpected: extra; " in message
        assert "1 of another shape: model.norm.weight (25,) for (24,)" in message


def test_obsolete_buffers_of_older_checkpoints(ranks: GroupOf, tmp_path: Path) -> None:
    folder = saved_llama(tmp_path, tied=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert ranks(2).run(left_whole, str(folder)) == [0, 0]


def save_watched(folder: str, out: str) -> list[int]:
    """Export in parts, and return the bytes of live host tensors at each write of a part."""
    model = load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
    engine = make_engine(model, threshold=0)
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []
    write = export.Export.write

    def watched(self: export.Export, file: str, values: dict[str, Tensor]) -> None:
        seen.extend(weakref.ref(tensor) for tensor in values.values())
        alive.append(sum(tensor.nbytes for ref in seen if (tensor := ref()) is not None))
        write(self, file, values)

    export.Export.write = watched  # type: ignore[method-assign]
    try:
        save_pretrained(engine.module, None, Path(out), max_shard_size="5KB")
    finally:
        export.Export.write = write  # type: ignore[method-assign]
    return alive


def save_with_chat_templates(folder: str, out: str, tokenizer: str) -> None:
    model = load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
    engine = make_engine(model)
    speaker = load_tokenizer(tokenizer)
    speaker.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for _ in range(2):  # over itself, too
        save_pretrained(engine.module, speaker, Path(out))


def test_a_tokenizer_with_a_subfolder(ranks: GroupOf, tmp_path: Path, demo: Path) -> None:
    ranks(1).run(
        save_with_chat_templates, str(saved_llama(tmp_path / "in")), str(tmp_path / "out"), str(demo / "model")
    )
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {"default", "tool_use"}
    verify_export(str(tmp_path / "out"))


def test_equal_weights_give_equal_bytes(ranks: GroupOf, tmp_path: Path) -> None:
    folder = str(saved_llama(tmp_path / "in"))
    for number in range(6):
        ranks(2).run(save_watched, folder, str(tmp_path / str(number)))
    parts = {file.name for file in (tmp_path / "0").iterdir()}
    assert len(parts) > 6
    for name in parts:
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(6)}) == 1, name


def test_export_holds_one_output_file_at_a_time(ranks: GroupOf, tmp_path: Path) -> None:
    folder = str(saved_llama(tmp_path / "in"))
    alive, none = ranks(2).run(save_watched, folder, str(tmp_path / "out"))
    assert len(alive) > 4
    largest = 61 * 24 * 4  # the embedding's bytes, more than the 5 KB of a file
    assert max(alive) <= largest
    assert none == [], "only rank 0 writes"
    assert torch.equal(logits_of(str(tmp_path / "out"), torch.float32), logits_of(folder, torch.float32))


def test_a_second_save_removes_files_of_the_first(ranks: GroupOf, tmp_path: Path, demo: Path) -> None:
    saved_llama(tmp_path / "out", shards=True)
    folder = str(saved_llama(tmp_path / "in"))
    arguments = folder, str(tmp_path / "out"), str(demo / "model"), torch.float32
    _, after = ranks(2).run(load_train_and_save, *arguments)[0]
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert torch.equal(after, logits_of(arguments[1], torch.float32))


def test_the_error_names_a_truncated_file(ranks: GroupOf, tmp_path: Path) -> None:
    file = saved_llama(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for message in ranks(2).run(refused, str(tmp_path)):
        assert f"{file} is not a whole safetensors file" in message


def test_a_part_that_the_index_names_is_missing(ranks: GroupOf, tmp_path: Path) -> None:
    next(saved_llama(tmp_path, shards=True).glob("model-00002*")).unlink()
    assert "model.safetensors.index.json names model-00002" in ranks(1).run(refused, str(tmp_path))[0]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "is not an index of weight files" in ranks(1).run(refused, str(tmp_path))[0]


# weights in torch's format


def saved_bin(folder: Path) -> Path:
    """Build a folder like those of older models: pytorch_model.bin in two parts."""
    weights = load_file(saved_llama(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {
        "pytorch_model-00001-of-00002.bin": list(weights)[:5],
        "pytorch_model-00002-of-00002.bin": list(weights)[5:],
    }
    for part, names in parts.items():
        torch.save({name: weights[name] for name in names}, folder / part)
    weight_map = {name: part for part, names in parts.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_bin_files_are_read_without_code(ranks: GroupOf, tmp_path: Path, demo: Path) -> None:
    folder, out = str(saved_bin(tmp_path / "in")), tmp_path / "out"
    before, _ = ranks(2).run(load_train_and_save, folder, str(out), str(demo / "model"), torch.float32)[0]
    assert torch.equal(before, logits_of(folder, torch.float32))


class Burglar:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_malicious_pickle_does_not_run(ranks: GroupOf, tmp_path: Path) -> None:
    folder = saved_bin(tmp_path / "in")
    torch.save({"lm_head.weight": Burglar(tmp_path / "trace")}, folder / "pytorch_model-00001-of-00002.bin")
    assert "must hold only tensors, other pickled objects are not loaded" in ranks(1).run(refused, str(folder))[0]
    torch.save({"model": {"lm_head.weight": torch.zeros(1)}}, folder / "pytorch_model-00001-of-00002.bin")
    assert "it is not a dictionary of tensors" in ranks(1).run(refused, str(folder))[0]
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80 no zip")
    assert "AutoModelForCausalLM as M; M.from_pretrained(" in ranks(1).run(refused, str(folder))[0]
    assert not (tmp_path / "trace").exists()


# names that are no folder


def preset_shards() -> dict[str, tuple[int, Tensor]]:
    """Return the start and the values of each of this rank's shards of a small preset."""
    presets._SHAPES["tiny"] = (24, 37, 2, 2, 1)
    presets.PRESETS = (*presets.PRESETS, "tiny")
    random_weights.CHUNK_NUMEL = 1000
    config = load_config("tiny")
    model = load_model("tiny", config, DS_CONFIG, torch.float32, seed=7)
    return {shard.name: (shard.start, shard.data.clone()) for shard in zero3.shards(model)}


def test_a_preset_is_equal_for_any_world_size(ranks: GroupOf) -> None:
    whole = {name: values for name, (_, values) in ranks(1).run(preset_shards)[0].items()}
    for shards in ranks(3).run(preset_shards):
        for name, (start, values) in shards.items():
            assert torch.equal(values, whole[name][start : start + len(values)]), name
    assert float(whole["model.embed_tokens.weight"].std()) == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(
        whole["model.layers.0.self_attn.q_proj.weight"], whole["model.layers.1.self_attn.q_proj.weight"]
    )
    assert torch.equal(whole["model.norm.weight"], torch.ones(24))


@pytest.mark.parametrize(("name", "billions"), [("7b", 6.74), ("13b", 13.02), ("30b", 32.53), ("65b", 65.29)])
def test_presets_have_the_sizes_of_the_paper(name: str, billions: float) -> None:
    model = meta_model(load_config(name), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the hub's local cache suffices, and that there is an error message without it and without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--someone--a-llama/snapshots/abc"
    saved_llama(snapshot)
    (tmp_path / "models--someone--a-llama/refs").mkdir()
    (tmp_path / "models--someone--a-llama/refs/main").write_text("abc")
    assert Path(find_model("someone/a-llama", download=False)) == snapshot
    with pytest.raises(ModelError, match="someone/else is not a local folder, and cannot be loaded from"):
        find_model("someone/else")
    with pytest.raises(ModelError, match=r"or one of .*, got /nowhere"):
        find_model("/nowhere/a/model")


def test_custom_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    )
    with pytest.raises(ModelError, match="is not a model configuration"):
        load_config(str(tmp_path))
    assert not (tmp_path / "trace").exists()


def test_a_folder_without_config_or_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds a config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(ModelError, match="is not a model configuration"):
        load_config(str(tmp_path))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def kept_tokens_name(file: str, folder: str) -> str:
    return fingerprint(source(Path(file)), load_tokenizer(folder), {})


def test_all_ranks_use_the_same_token_cache(ranks: GroupOf, demo: Path, assets: Path) -> None:
    """Check that the cache's name is equal in all processes, unlike Python's hashes."""
    for folder in (demo / "model", assets / "llama_tokenizer"):
        assert len(set(ranks(2).run(kept_tokens_name, str(demo / "train.txt"), str(folder)))) == 1


def left_whole(folder: str) -> int:
    model = load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
    make_engine(model, threshold=0)
    return sum(parameter.numel() for parameter in model.parameters())


def test_no_full_tensor_remains_after_loading(ranks: GroupOf, tmp_path: Path) -> None:
    assert ranks(2).run(left_whole, str(saved_llama(tmp_path))) == [0, 0]
