"""Tests of RoPE scaling and of the longest sequence that it allows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from lomo_ds.errors import ConfigError
from lomo_ds.models import load_config, load_model, scale_rope
from lomo_ds.models.rope import max_positions
from tests.engines import make_engine
from tests.launching import demo_arguments, run_main
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
POSITIONS = 32
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config_with(rope: dict[str, Any] | None = None, most: int = POSITIONS) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=most, rope_scaling=rope
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "most", "allowed"),
    [
        (None, 128, 128),
        ({"rope_type": "linear", "factor": 4.0}, 128, 512),
        ({"type": "linear", "factor": 4}, 128, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 128, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 128, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 128, 512),
        (LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}, 131_072, 131_072),
    ],
)
def test_max_positions(rope: dict[str, Any] | None, most: int, allowed: int) -> None:
    assert max_positions(config_with(rope, most)) == allowed


def test_max_positions_of_layers_with_different_rope() -> None:
    layers = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    config = AutoConfig.for_model("gemma3_text", rope_parameters=layers, max_position_embeddings=131_072)
    assert max_positions(config) == 131_072
    with pytest.raises(ConfigError, match="different ones in its layers"):
        scale_rope(config, "yarn", 262_144)


def loaded_logits(folder: str, scaling: str, ids: Tensor) -> tuple[PretrainedConfig, Tensor]:
    config = load_config(folder)
    scale_rope(config, scaling, ids.shape[1])
    engine = make_engine(load_model(folder, config, DS_CONFIG, torch.float32))
    engine.eval()
    with torch.no_grad():
        return config, engine(input_ids=ids).logits.clone()


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn", "llama3", "yarn:8"])
def test_scaling_equals_transformers(ranks: GroupOf, tmp_path: Path, scaling: str) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(config_with()).save_pretrained(tmp_path)
    ids = torch.randint(61, (1, 4 * POSITIONS))
    kind, _, factor = scaling.partition(":")
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": float(factor or 4)} | (LLAMA3 if kind == "llama3" else {})
    more: dict[str, Any] = {}
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = POSITIONS
        more = {"max_position_embeddings": int(POSITIONS * float(factor or 4))}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope, **more).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, unscaled = (model(input_ids=ids).logits for model in (reference, plain))
    assert not torch.allclose(expected, unscaled, atol=1e-4)
    config, logits = ranks(1).run(loaded_logits, str(tmp_path), scaling, ids)[0]
    assert torch.allclose(logits, expected, atol=1e-6)
    assert max_positions(config) == POSITIONS * float(factor or 4)
    assert config.max_position_embeddings == reference.config.max_position_embeddings


def test_a_fractional_factor_gives_the_exact_length() -> None:
    for kind in ("linear", "yarn"):
        for length in range(33, 400, 7):
            config = config_with(most=31)
            scale_rope(config, kind, length)
            assert max_positions(config) == length


def test_a_model_with_the_same_scaling_is_unchanged() -> None:
    config = config_with()
    scale_rope(config, "yarn", 4 * POSITIONS)
    before = config.to_dict()
    scale_rope(config, "yarn", 4 * POSITIONS)
    scale_rope(config, "yarn:4", None)
    assert config.to_dict() == before
    with pytest.raises(ConfigError, match=f"has yarn scaling already, for up to {4 * POSITIONS} positions"):
        scale_rope(config, "yarn:8", None)


@pytest.mark.parametrize("scaling", ["", "yarn:", "yarn:x", "yarn:1", "yarn:nan", "yarn:inf", "longrope:2", "4"])
def test_invalid_scaling(scaling: str) -> None:
    with pytest.raises(ConfigError, match=r"must be one of linear, dynamic, yarn, llama3, or .* yarn:4"):
        scale_rope(config_with(), scaling, 64)


@pytest.mark.parametrize("length", [None, POSITIONS])
def test_no_factor_and_no_longer_sequence_length(length: int | None) -> None:
    with pytest.raises(ConfigError, match=f"above the model's {POSITIONS} positions, got {length}; .* yarn:2"):
        scale_rope(config_with(), "yarn", length)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "gptj"])
def test_a_model_without_rope(model_type: str) -> None:
    with pytest.raises(ConfigError, match=f"a {model_type} model has none"):
        scale_rope(AutoConfig.for_model(model_type), "yarn:2", None)


def test_a_model_that_does_not_support_the_type() -> None:
    """Check Phi-3, which turns every scaling type into longrope."""
    with pytest.raises(ConfigError, match="a phi3 model does not support it: "):
        scale_rope(AutoConfig.for_model("phi3", pad_token_id=None), "yarn:2", None)


def test_a_job_trains_and_exports_the_scaled_model(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_seq_length": 512, "max_steps": 1, "per_device_train_batch_size": 1}
    status, _, said = ranks(1).run(run_main, demo_arguments(demo, tmp_path, **more))[0]
    assert status == 2
    assert "longer than the model's 128 positions; use at most 128, or stretch" in said
    status, _, said = ranks(1).run(run_main, demo_arguments(demo, tmp_path, rope_scaling="yarn", **more))[0]
    assert status == 0, said
    exported = AutoConfig.from_pretrained(tmp_path)
    assert exported.rope_parameters["rope_type"] == "yarn"
    assert exported.rope_parameters["factor"] == 4
    assert exported.rope_parameters["original_max_position_embeddings"] == 128
    assert exported.max_position_embeddings == 512
    again = {**more, "model_name_or_path": tmp_path}
    status, _, said = ranks(1).run(run_main, demo_arguments(demo, tmp_path / "../again", **again))[0]
    assert status == 0, said
