"""Tests of real-world model folders: they compute the same as in transformers, or they are rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lomo_ds.errors import ModelError
from lomo_ds.models import load_config, load_model, save_pretrained
from lomo_ds.models.meta_model import meta_model
from tests.engines import make_engine
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

GroupOf = Callable[..., Ranks]
Weights = dict[str, Tensor]
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
IDS = torch.arange(3, 19).view(1, 16)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json, or remove those whose value is ``...``."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not ...}))


def edit_weights(folder: Path, edit: Callable[[Weights], Weights]) -> None:
    weights = edit(load_file(folder / "model.safetensors"))
    copies = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def logits_as_loaded(folder: str, out: str | None = None, trust_remote_code: bool = False) -> Tensor:
    """Return the engine's logits, and export the model if there is an ``out``."""
    config = load_config(folder, trust_remote_code)
    model = load_model(folder, config, DS_CONFIG, torch.float32, trust_remote_code=trust_remote_code)
    engine = make_engine(model)
    engine.eval()
    with torch.no_grad():
        logits: Tensor = engine(input_ids=IDS).logits.clone()
    if out:
        save_pretrained(engine.module, None, Path(out))
    engine.destroy()
    return logits


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_loading_equals_transformers(ranks: GroupOf, tmp_path: Path) -> None:
    folder = tmp_path / "in"

    def check() -> None:
        loaded = ranks(1).run(logits_as_loaded, str(folder), str(tmp_path / "out"))[0]
        assert torch.equal(loaded, logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))
        assert torch.equal(loaded, logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))

    llama(folder, tie_word_embeddings=True).model.save_pretrained(folder)  # names without "model."
    check()
    llama(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda w: {n.replace("model.embed_tokens", "lm_head"): tensor for n, tensor in w.items()})
    assert "model.embed_tokens.weight" not in load_file(folder / "model.safetensors")
    check()
    llama(folder)
    edit_config(folder, tie_word_embeddings=True)  # and two embeddings that differ
    check()
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_head=4, n_layer=2, n_positions=64)).save_pretrained(folder)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.ones(())}
    edit_weights(folder, lambda w: {n.removeprefix("transformer."): tensor for n, tensor in w.items()} | masks)
    check()


def gemma3() -> PreTrainedModel:
    text = SHAPE | {"head_dim": 8}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4))


def mistral3() -> PreTrainedModel:
    text = SHAPE | {"model_type": "mistral", "head_dim": 8}
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def llava() -> PreTrainedModel:
    text, vision = SHAPE | {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    ("build", "text_type"),
    [(gemma3, "gemma3_text"), (mistral3, "mistral"), (llava, "llama")],
    ids=["gemma3", "mistral3", "llava"],
)
def test_text_model_of_a_multimodal_model(
    ranks: GroupOf, tmp_path: Path, build: Callable[[], PreTrainedModel], text_type: str
) -> None:
    whole = build()
    whole.save_pretrained(tmp_path / "in")
    loaded = ranks(1).run(logits_as_loaded, str(tmp_path / "in"), str(tmp_path / "out"))[0]
    assert torch.equal(loaded, logits_of(whole))
    assert torch.equal(loaded, logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == text_type


def test_plain_weights_with_a_quantization_config(ranks: GroupOf, tmp_path: Path) -> None:
    model = llama(tmp_path / "in")
    edit_config(tmp_path / "in", quantization_config={"quant_method": "gptq", "bits": 4})
    loaded = ranks(1).run(logits_as_loaded, str(tmp_path / "in"), str(tmp_path / "out"))[0]
    assert torch.equal(loaded, logits_of(model))
    assert torch.equal(loaded, logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def gptq(weights: Weights) -> Weights:
    for name in [name for name in weights if "proj.weight" in name]:
        rows, columns = weights.pop(name).shape
        module = name.removesuffix("weight")
        weights[module + "qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        weights[module + "scales"] = torch.ones(1, rows)
    return weights


def bitsandbytes(weights: Weights) -> Weights:
    for name in [name for name in weights if "proj.weight" in name]:
        weights[name + ".absmax"] = torch.ones(3)
        weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
    return weights


def fp8(weights: Weights) -> Weights:
    for name in [name for name in weights if "proj.weight" in name]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[name + "_scale_inv"] = torch.ones(1, 1)
    return weights


def codes(weights: Weights) -> Weights:
    return {name: tensor.to(torch.int8) if "proj" in name else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("quantize", "method", "named"),
    [
        (gptq, "gptq", "gptq"),
        (gptq, None, "model.layers.0.mlp.down_proj.qweight"),
        (bitsandbytes, "bitsandbytes", "bitsandbytes"),
        (fp8, "fp8", "fp8"),
        (fp8, None, "float8_e4m3fn"),
        (codes, None, "int8"),
    ],
)
def test_quantized_weights(
    ranks: GroupOf, tmp_path: Path, quantize: Callable[[Weights], Weights], method: str | None, named: str
) -> None:
    llama(tmp_path)
    edit_weights(tmp_path, quantize)
    if method:
        edit_config(tmp_path, quantization_config={"quant_method": method})
    message = ranks(1).run(refusal, str(tmp_path))[0]
    assert "is quantized (" in message
    assert named in message
    assert message.endswith("full fine-tuning needs its original weights")


def refusal(folder: str) -> str:
    with pytest.raises(ModelError) as refused:
        load_model(folder, load_config(folder), DS_CONFIG, torch.float32)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_other_model_types_are_rejected(tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"only causal language models can be trained, got .*, a t5 model"):
        load_config(str(tmp_path))
    BertConfig(vocab_size=61).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="attends both ways; set is_decoder to true"):
        load_config(str(tmp_path))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it holds a LoRA adapter: merge it into its model first" in refusal(str(tmp_path))
    (tmp_path / "config.json").unlink()
    assert "it holds a LoRA adapter: merge it into its model first" in refusal(str(tmp_path))


WRONG: dict[str, Any] = {
    "num_attention_heads": 5,
    "num_key_value_heads": 3,
    "head_dim": 0,
    "layer_types": ["full_attention"] * 7,
    "tie_word_embeddings": None,
    "max_position_embeddings": 512.0,
    "hidden_size": "32",
    "hidden_act": "gelu_newest",
    "num_hidden_layers": None,
    "vocab_size": -5,
    "rms_norm_eps": "1e-6",
    "use_cache": "yes",
    "model_type": "nothing",
    "dtype": "float7",
    "attn_implementation": "flash_attention_9",
    "quantization_config": "gptq",
    "rope_parameters": {"rope_type": "magic", "rope_theta": 1e4},
}


@pytest.mark.parametrize(("name", "value"), WRONG.items(), ids=WRONG)
def test_a_wrong_value_in_a_configuration(tmp_path: Path, name: str, value: Any) -> None:
    llama(tmp_path)
    edit_config(tmp_path, **{name: value})
    assert str(tmp_path) in refusal(str(tmp_path))


def test_an_incomplete_configuration(tmp_path: Path) -> None:
    llama(tmp_path)
    edit_config(tmp_path, rope_parameters=..., rope_scaling={"type": "linear", "factor": None})
    assert str(tmp_path) in refusal(str(tmp_path))
    for text in ("[]", '{"model_type": "llama", "vocab', "version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "config.json").write_text(text)
        assert "config.json is not a model configuration" in refusal(str(tmp_path))


# code that comes with a model

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
{imported}

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, size=16, vocab_size=61, **kwargs):
        self.size, self.vocab_size = size, vocab_size
        super().__init__(**kwargs)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.size)
        self.head = nn.Linear(config.size, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", 1.0 / 10 ** torch.arange(config.size), persistent=False)
        self.offset = torch.linspace(0.0, 1.0, config.size)  # no buffer at all
        self.depth = torch.linspace(0.0, 0.5, 3)[1].item()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.embed(input_ids) * self.inv_freq + self.offset * self.depth
        logits = self.head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
"""


def own_model(folder: Path, imported: str = "") -> None:
    code = CODE.replace("{imported}", imported)
    (folder / "own.py").write_text(code)
    namespace: dict[str, Any] = {"__name__": "own"}
    if not imported:
        exec(code, namespace)
        config = namespace["OwnConfig"](
            auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        )
        model = namespace["OwnForCausalLM"](config)
        config.save_pretrained(folder)
        save_file(dict(model.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(logits_of(model), folder / "logits.pt")


def test_custom_code_that_computes_constants_in_init(ranks: GroupOf, tmp_path: Path) -> None:
    own_model(tmp_path)
    loaded = ranks(1).run(logits_as_loaded, str(tmp_path), None, True)[0]
    assert torch.equal(loaded, torch.load(tmp_path / "logits.pt"))


def test_custom_code_that_needs_a_missing_package(tmp_path: Path) -> None:
    own_model(tmp_path)
    own_model(tmp_path, imported="import a_package_that_is_not_here")
    with pytest.raises(ModelError, match="a_package_that_is_not_here"):
        meta_model(load_config(str(tmp_path), True), torch.float32, True)
