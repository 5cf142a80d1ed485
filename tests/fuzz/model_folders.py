"""Fuzz test of model folders: logits are bit-equal to those of transformers, or there is a one-line error message."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from lomo_ds.errors import LomoError
from lomo_ds.models import load_config, load_model
from tests.fuzz.test_inputs import is_one_line
from tests.ranks import GroupOf

DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
MAKE: dict[str, Callable[[bool], PreTrainedModel]] = {
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)),
    "gpt2": lambda tied: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=tied)
    ),
    "mixtral": lambda tied: MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1, tie_word_embeddings=tied)
    ),
}
FIELDS = [
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
    "hidden_act", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "attention_bias", "mlp_bias",
    "attention_dropout", "initializer_range", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "activation_function",
    "layer_norm_epsilon", "num_local_experts", "num_experts_per_tok", "sliding_window", "output_router_logits",
    "quantization_config", "auto_map", "transformers_version", "is_decoder", "pruned_heads", "id2label",
    "num_labels", "output_hidden_states", "return_dict", "text_config", "_name_or_path",
]  # fmt: skip
# small numbers, because accepted configurations are built
numbers = (
    st.none() | st.booleans() | st.integers(-2, 64) | st.sampled_from([0.5, 1e-6, 1e4, float("nan"), float("inf")])
)
words = st.sampled_from(
    ["", "x", "silu", "gelu", "llama", "gpt2", "float16", "bfloat16", "LlamaForCausalLM", "61", "a\nb"]
)
values = numbers | words | st.lists(numbers | words, max_size=2) | st.dictionaries(words, numbers, max_size=2)
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "x"])},
    optional={"factor": numbers, "rope_theta": numbers},
)
DROPPED = "dropped"
settings_changes = st.lists(
    st.tuples(st.sampled_from(FIELDS), st.just(DROPPED) | values)
    | st.tuples(st.sampled_from(["rope_parameters", "rope_scaling"]), ropes),
    max_size=2,
)
WAYS = ["drop", "rename", "cast", "transpose", "cut", "flatten", "prefix all", "strip all", "tie", "integers", "extra"]
tensor_changes = st.lists(
    st.tuples(
        st.sampled_from(WAYS),
        st.integers(0, 40),
        st.sampled_from(["model.", "transformer.", "module.", "base_model.model.", "_orig_mod.", "x."]),
        st.sampled_from([torch.float16, torch.bfloat16, torch.float64]),
    ),
    max_size=2,
)
folders = st.tuples(st.sampled_from(list(MAKE)), st.booleans(), settings_changes, tensor_changes)


def changed(tensors: dict[str, Tensor], changes: list[Any]) -> dict[str, Tensor]:
    """Apply ``changes``, each of which is a way, the number of a tensor, a prefix and a dtype, to ``tensors``."""
    for way, number, prefix, dtype in changes:
        if not tensors:
            return tensors
        name = sorted(tensors)[number % len(tensors)]
        tensor = tensors[name]
        if way in ("drop", "rename"):
            del tensors[name]
        if way in ("rename", "extra"):
            tensors[prefix + name] = tensor.clone()
        elif way == "cast":
            tensors[name] = tensor.to(dtype)
        elif way == "integers":
            tensors[name] = tensor.to(torch.int32)
        elif way == "transpose":
            tensors[name] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        elif way == "cut":
            tensors[name] = tensor[1:].clone()
        elif way == "flatten":
            tensors[name] = tensor.flatten()
        elif way == "prefix all":
            tensors = {prefix + each: value for each, value in tensors.items()}
        elif way == "strip all":
            tensors = {each.partition(".")[2] or each: value for each, value in tensors.items()}
        elif way == "tie":
            tensors.pop("lm_head.weight", None)
    return tensors


def write(folder: Path, kind: str, tied: bool, settings: list[tuple[str, Any]], tensors: list[Any]) -> None:
    torch.manual_seed(0)
    MAKE[kind](tied).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in settings:
        if value == DROPPED:
            config.pop(name, None)
        else:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    save_file(changed(load_file(weights), tensors), weights, {"format": "pt"})


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(16).view(2, 8)).logits.clone()


def plain_logits(folder: str) -> Tensor | None:
    """Return the logits of transformers; None if it fails or initializes missing weights randomly."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        return None if report["missing_keys"] or report["mismatched_keys"] else logits_of(model)
    except Exception:  # any error of transformers and safetensors
        return None


def load_and_compare(*spec: Any) -> str | None:
    """Compare the logits of a folder with those of transformers; return the error message if it is rejected."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), *spec)
        try:
            model = load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
        except LomoError as refusal:
            return str(refusal)
        expected = plain_logits(folder)
    if expected is not None:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=0, equal_nan=True)
    return None


def check_folder(ranks: GroupOf, spec: tuple[Any, ...]) -> bool:
    """Return whether the folder loads like in transformers, and check that otherwise the error message is one line."""
    [refusal] = ranks(1).run(load_and_compare, *spec)
    assert refusal is None or is_one_line(refusal), refusal
    return refusal is None
