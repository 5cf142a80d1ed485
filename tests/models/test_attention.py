"""Tests of --attn_implementation: what is built, trained, planned, exported and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from lomo_ds.errors import ConfigError, ModelError
from lomo_ds.models import attention, meta_model, set_attention, without_flash_attention
from lomo_ds.train import assembly
from tests.flash_attention import replaced_flash_attention
from tests.launching import demo_arguments, run_main
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]


def tiny_config() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_built_with_it_and_its_config_is_written_without(implementation: Any) -> None:
    config = tiny_config()
    before = config.to_dict()
    set_attention(config, implementation, "fp32")
    assert meta_model(config, torch.float32).config._attn_implementation == implementation
    assert config.to_dict() | {"dtype": None} == before | {"dtype": None}


def test_flash_attention_is_set_where_it_is_available() -> None:
    config = tiny_config()
    with mock.patch.dict(attention.FLASH, {"flash_attention_2": (lambda: True, "")}), replaced_flash_attention():
        set_attention(config, "flash_attention_2", "bf16")
        assert meta_model(config, torch.bfloat16).config._attn_implementation == "flash_attention_2"
        with pytest.raises(ConfigError, match="needs weights in bf16 or fp16, got fp32; train in one of them"):
            set_attention(config, "flash_attention_2", "fp32")


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_refused_without_its_package(implementation: Any) -> None:
    unavailable = {implementation: (lambda: False, attention.FLASH[implementation][1])}
    with (
        mock.patch.dict(attention.FLASH, unavailable),
        pytest.raises(ConfigError, match=r"needs its package and a CUDA GPU.*flash-attn.*--attn_implementation sdpa"),
    ):
        set_attention(tiny_config(), implementation, "bf16")


@pytest.mark.parametrize(("model_type", "implementation"), [("bloom", "sdpa"), ("mpt", "flash_attention_2")])
def test_what_an_architecture_does_not_support_is_refused(model_type: str, implementation: Any) -> None:
    with (
        mock.patch.dict(attention.FLASH, {"flash_attention_2": (lambda: True, "")}),
        pytest.raises(ModelError, match=r"got .*ForCausalLM, for which it has not; leave --attn_implementation out"),
    ):
        set_attention(AutoConfig.for_model(model_type), implementation, "bf16")


def train_with_eager_attention(arguments: list[str]) -> tuple[int, str, list[str]]:
    built: list[str] = []

    def build(*given: Any) -> Any:
        model = original(*given)
        built.append(model.config._attn_implementation)
        return model

    original = assembly.load_model
    with mock.patch.object(assembly, "load_model", build):
        status, _, said = run_main(arguments)
    return status, said, built


def test_a_job_trains_with_it_and_exports_a_model_without(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    arguments = demo_arguments(demo, tmp_path, attn_implementation="eager", max_steps=1, save_steps=1)
    ((status, said, built),) = ranks(1).run(train_with_eager_attention, arguments)
    assert status == 0, said
    assert built == ["eager"]
    for folder in (tmp_path, tmp_path / "checkpoint-1" / "model"):
        config = json.loads((folder / "config.json").read_text())
        assert not [name for name in config if "attn" in name or "attention_impl" in name]
        assert config["use_cache"] is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_job_says_that_flash_attention_is_missing(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    if attention.FLASH["flash_attention_2"][0]():
        pytest.skip("flash-attn is installed here")
    arguments = demo_arguments(demo, tmp_path, attn_implementation="flash_attention_2")
    status, _, said = ranks(1).run(run_main, arguments)[0]
    assert status == 2
    assert "pip install flash-attn --no-build-isolation" in said


def test_flash_attention_gives_way_to_sdpa_in_a_copy() -> None:
    config = tiny_config()
    config._attn_implementation = "flash_attention_2"
    assert without_flash_attention(config)._attn_implementation == "sdpa"
    assert config._attn_implementation == "flash_attention_2"
