"""Tests of every model family: save with transformers, load on two ranks, train, export, load with transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lomo_ds.models import load_config, load_model, save_pretrained
from tests.engines import largest_difference, make_engine, my_part, weights_of
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

GroupOf = Callable[..., Ranks]
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
IDS = 3 + (torch.arange(32) * 7 % 58).view(2, 16)  # none of the special tokens below

# what configurations call their sizes; each family takes those that it has
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_embd": 32, "n_head": 4, "n_layer": 2,
    "n_positions": 64, "n_inner": 48, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "ffn_dim": 48,
    "expansion_ratio": 2, "word_embed_proj_dim": 32, "rotary_dim": 4, "num_heads": 4, "num_layers": 2,
    "attention_heads": 4, "state_size": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2,
    "shared_expert_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama 1": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "llama 2 70b": ("llama", {}),  # grouped queries
    "llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama 3.2": ("llama", {"tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "falcon": ("falcon", {"head_dim": None}),
} | {
    name: (name, {})
    for name in (
        "afmoe", "arcee", "biogpt", "bloom", "codegen", "cohere", "cohere2", "doge", "dots1", "ernie4_5",
        "ernie4_5_moe", "exaone4", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2",
        "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "jetmoe", "llama4_text",
        "mamba", "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi",
        "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
        "xglm",
    )
}  # fmt: skip


def tiny_config(model_type: str, changes: dict[str, object]) -> PretrainedConfig:
    """Build a tiny model of a family without dropout, whose random numbers differ between world sizes."""
    defaults = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in SIZES.items() if hasattr(defaults, name)} | changes
    config = AutoConfig.for_model(model_type, **{name: size for name, size in sizes.items() if size is not None})
    for name, value in vars(config).items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def logits_of(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.clone()
    model.train()
    return logits


def load_train_and_save(folder: str, out: str, reference: PreTrainedModel) -> tuple[Tensor, float, Tensor]:
    """Return the logits after loading, a step's difference from the reference, and the logits before the export."""
    engine = make_engine(load_model(folder, load_config(folder), DS_CONFIG, torch.float32), lr=0.1)
    before = logits_of(engine)
    engine.train_batch(my_part({"input_ids": IDS, "labels": IDS}))
    difference = largest_difference(weights_of(engine), reference)
    save_pretrained(engine.module, None, Path(out))
    after = logits_of(engine)
    engine.destroy()
    return before, difference, after


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_training_and_export_equal_transformers(
    ranks: GroupOf, tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type, changes)).save_pretrained(tmp_path / "in")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32).train()
    loaded = logits_of(reference)
    reference(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for before, difference, after in ranks(2).run(
        load_train_and_save, str(tmp_path / "in"), str(tmp_path / "out"), reference
    ):
        assert torch.equal(before, loaded)
        assert difference < 1e-6
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(after, logits_of(exported))
    assert stored_names(tmp_path / "out") == stored_names(tmp_path / "in")
