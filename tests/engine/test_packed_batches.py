"""Packed rows: loss and gradients equal those of the documents on their own, for every way to compute attention."""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from lomo_ds.engine.packed_rows import PackedRows
from lomo_ds.models import recompute_activations, tile_logits
from lomo_ds.train.evaluate import evaluate_loss
from tests.engine.test_baseline import make_baseline
from tests.engines import make_engine
from tests.flash_attention import replaced_flash_attention
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
VOCABULARY = 61
LENGTHS = [[7, 1, 5, 3], [4, 12]]  # documents of each row
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends."
EXACT = 1e-6
EXACT_IN_FIVE_LAYERS = 5e-6  # of real weights; the documents' own gradients are 1.3e-6 from those in float64


def documents(rows: int, folder: str | None = None) -> list[list[Tensor]]:
    """Return the documents of each row: random tokens, or parts of a story for the tokenizer in a folder."""
    tokens = torch.randint(VOCABULARY, (32,), generator=torch.Generator().manual_seed(0))
    if folder is not None:
        tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(STORY).input_ids[:32])
    row_tokens = zip(tokens.view(2, 16)[:rows], LENGTHS, strict=False)
    return [list(row.split(lengths)) for row, lengths in row_tokens]


def packed(rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Pack each row's documents; the first token of each has no label."""
    position_ids = torch.stack([torch.cat([torch.arange(len(document)) for document in row]) for row in rows])
    input_ids = torch.stack([torch.cat(row) for row in rows])
    labels = input_ids.masked_fill(position_ids == 0, -100)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def separate_loss(model: Module, rows: list[list[Tensor]]) -> Tensor:
    """Return the loss over all labels, with a forward for each document."""
    predicted = [document[None] for row in rows for document in row if len(document) > 1]
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.numel() - 1) for ids in predicted]
    return torch.stack(losses).sum() / sum(ids.numel() - 1 for ids in predicted)


def tiny_llama(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def real_model(folder: str, attention: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).train()


def flash(attention: str) -> contextlib.AbstractContextManager[None]:
    return replaced_flash_attention() if attention.startswith("flash") else contextlib.nullcontext()


class Wrapper(Module):
    """A user's module around a transformers model."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        return self.inner(input_ids, **more)


def step_differences(
    attention: str,
    rows: int,
    tiled: bool = False,
    recomputed: bool = False,
    folder: str | None = None,
    layered: bool = False,
    wrap: Callable[[PreTrainedModel], Module] = lambda model: model,
    **more: Any,
) -> tuple[float, float]:
    """Return how far the loss of a packed batch is from its documents' own, and the relative error of the gradient."""
    with flash(attention):
        model = tiny_llama(attention) if folder is None else real_model(folder, attention)
        reference = wrap(copy.deepcopy(model))
        if tiled:
            tile_logits(model, tile_bytes=1200)
        if recomputed:
            recompute_activations(model)
        texts = documents(rows, folder)
        shorter = [[texts[0][1], texts[0][0]]]  # for a second micro-batch
        engine = make_engine(
            wrap(model), accumulation=1 + layered, params={"accumulation": "layered"} if layered else None
        )
        gradients: dict[str, Tensor] = {}
        for name, parameter in engine.module.named_parameters():
            parameter.register_hook(partial(add_gradient, gradients, name))
        batch = packed(texts) | more
        loss = float(engine.train_batch([batch, packed(shorter)] if layered else batch))
        expected = separate_loss(reference, texts + shorter if layered else texts)
        expected.backward()
    return abs(loss - float(expected.detach())), gradient_error(gradients, reference)


def add_gradient(gradients: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    gradients[name] = gradients[name] + gradient if name in gradients else gradient


def gradient_error(gradients: dict[str, Tensor], reference: Module) -> float:
    """Return the norm of the difference of all gradients, as a part of their norm."""
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == expected.keys()
    difference, norm = (
        torch.cat([tensor.flatten().double() for tensor in tensors]).norm()
        for tensors in ([gradients[name] - expected[name] for name in expected], expected.values())
    )
    return float(difference / norm)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tiled", [False, True], ids=["logits", "tiled"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_loss_and_gradients_equal_those_of_the_documents(
    ranks: GroupOf, attention: str, rows: int, tiled: bool, recomputed: bool
) -> None:
    (differences,) = ranks(1).run(step_differences, attention, rows, tiled, recomputed)
    assert max(differences) < EXACT


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_loss_and_gradients_of_layered_accumulation(ranks: GroupOf, attention: str, rows: int) -> None:
    (differences,) = ranks(1).run(step_differences, attention, rows, False, False, None, True)
    assert max(differences) < EXACT


@pytest.mark.parametrize("tiled", [False, True], ids=["logits", "tiled"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_loss_and_gradients_of_real_weights(
    ranks: GroupOf, assets: Path, attention: str, rows: int, tiled: bool
) -> None:
    ((loss, gradient),) = ranks(1).run(step_differences, attention, rows, tiled, False, str(assets / "stories260K"))
    assert loss < EXACT
    assert gradient < EXACT_IN_FIVE_LAYERS


def test_gradients_of_real_weights_in_float64(assets: Path) -> None:
    folder = str(assets / "stories260K")
    model = real_model(folder, "sdpa").double()
    reference, texts = copy.deepcopy(model), documents(2, folder)
    separate_loss(reference, texts).backward()
    hooks = PackedRows(model)
    model(**packed(texts)).loss.backward()
    hooks.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradient_error(gradients, reference) < 1e-12


def wrapped_models() -> list[float]:
    return [*step_differences("sdpa", 2, wrap=Wrapper), *step_differences("flash_attention_2", 2, wrap=Wrapper)]


def test_wrapped_models(ranks: GroupOf) -> None:
    (differences,) = ranks(1).run(wrapped_models)
    assert max(differences) < EXACT


def with_a_cache() -> tuple[float, float]:
    return step_differences("sdpa", 2, use_cache=True)


def test_documents_see_each_other_with_a_cache(ranks: GroupOf) -> None:
    """The caller's own ``use_cache`` holds; this is what the tests above would find without the engine's."""
    (differences,) = ranks(1).run(with_a_cache)
    assert min(differences) > 1e-2


def other_forwards() -> dict[str, float]:
    """Return how far the losses of an evaluation and of the engine's forward are from those of the documents."""
    model, texts = tiny_llama("sdpa"), documents(2)
    expected = float(separate_loss(model, texts).detach())
    baseline, engine = make_baseline(copy.deepcopy(model), "sgd"), make_engine(model)
    evaluated = evaluate_loss(engine, [packed(texts)])
    assert evaluated is not None
    losses = {
        "evaluation": evaluated,
        "forward": engine(**packed(texts)).loss,
        "baseline": baseline(**packed(texts)).loss,
    }
    return {name: abs(float(loss) - expected) for name, loss in losses.items()}


def test_evaluation_and_forward(ranks: GroupOf) -> None:
    (differences,) = ranks(1).run(other_forwards)
    assert max(differences.values()) < EXACT


def caches_of_a_model() -> dict[str, Any]:
    model = tiny_llama("sdpa")
    ids = documents(1)[0][0][None]
    kept = copy.deepcopy(model)
    engine = make_engine(model)
    lengths = []
    embedding = engine.module.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    continued = engine.module.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    handle.remove()
    asked, default = engine(input_ids=ids, use_cache=True), engine(input_ids=ids)
    engine.destroy()
    return {
        "lengths": lengths,
        "same": torch.equal(continued, kept.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)),
        "asked": asked.past_key_values is not None,
        "default": default.past_key_values is not None,
        "destroyed": engine.module(input_ids=ids).past_key_values is not None,
        "config": engine.module.config.use_cache,
    }


def test_generation_and_explicit_calls_keep_their_cache(ranks: GroupOf) -> None:
    (caches,) = ranks(1).run(caches_of_a_model)
    assert caches["lengths"] == [7, 1, 1, 1], "one token at a time after the prompt"
    assert caches == {
        "lengths": caches["lengths"], "same": True, "asked": True, "default": False, "destroyed": True, "config": True,
    }  # fmt: skip


def on_a_gpu(rows: int) -> float:
    """Return the relative error of the gradient with flash-attn in bf16."""
    model, texts = tiny_llama("flash_attention_2").bfloat16(), documents(rows)
    reference = tiny_llama("eager").cuda()
    engine = make_engine(model, bf16={"enabled": True})
    gradients: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        parameter.register_hook(partial(gradients.__setitem__, name))
    engine.train_batch(packed(texts))
    separate_loss(reference, [[document.cuda() for document in row] for row in texts]).backward()
    return gradient_error(gradients, reference)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 2])
def test_flash_attention_on_a_gpu(ranks: GroupOf, rows: int) -> None:
    pytest.importorskip("flash_attn")
    assert ranks(1, "cuda").run(on_a_gpu, rows)[0] < 0.05, "of bf16; documents that see each other are above 0.3"
