"""Reference implementation for tests: plain PyTorch, one process, the full batch, no DeepSpeed."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 61


class OddForCausalLM(LlamaForCausalLM):
    """LLaMA with hard cases for sharding: sizes that do not divide evenly, tiny, frozen and unused parameters."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gain = Parameter(torch.ones(1))
        self.shift = Parameter(torch.zeros(2, 1))
        self.unused = Parameter(torch.ones(7))
        self.model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> CausalLMOutput:
        logits = super().forward(input_ids=input_ids, **kwargs).logits
        logits = logits * self.gain + self.shift.sum() * logits.sin()
        return CausalLMOutput(loss=self.loss_function(logits, labels, VOCABULARY), logits=logits)


def tiny_config(tied: bool = False, dropout: float = 0.0) -> LlamaConfig:
    """Return sizes that do not divide evenly."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        initializer_range=0.2,
    )


def tiny_model(tied: bool = False, dropout: float = 0.0, seed: int = 0) -> OddForCausalLM:
    torch.manual_seed(seed)
    return OddForCausalLM(tiny_config(tied, dropout)).train()


def whole_batch(step: int, rows: int, length: int = 12) -> dict[str, Tensor]:
    """Return ``rows`` sequences with different numbers of valid labels; one row has none."""
    generator = torch.Generator().manual_seed(1000 + step)
    input_ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = input_ids.clone()
    for row in range(rows):
        ignored = length if row == 1 else (row * 5 + step) % length
        labels[row, :ignored] = -100
    return {"input_ids": input_ids, "labels": labels}


def even_batch(step: int, rows: int) -> dict[str, Tensor]:
    """Return rows with equally many labels, so that the mean over ranks equals the mean over the batch."""
    batch = whole_batch(step, rows)
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}


def part(batch: dict[str, Tensor], index: int, parts: int) -> dict[str, Tensor]:
    """Return part ``index`` of a batch that is divided into ``parts``."""
    return {name: value.chunk(parts)[index] for name, value in batch.items()}


class DecoupledSGD(torch.optim.SGD):
    """torch.optim.SGD with decoupled weight decay."""

    def __init__(self, params: Iterable[Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.decoupled_decay = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * self.decoupled_decay)
        super().step()


class PlainTraining:
    """Optimizers of PyTorch on one model, with independent implementations of the clipping methods of lomo_ds.

    An optimizer may have a method ``clipped(parameter)``, which returns what is clipped in the place of the parameter.
    """

    def __init__(
        self,
        model: Module,
        optimizers: Sequence[Optimizer],
        value: float | None = None,
        group_norm: float | None = None,
        global_norm: float | None = None,
    ) -> None:
        self.model, self.optimizers = model, optimizers
        self.value, self.group_norm, self.global_norm = value, group_norm, global_norm

    def step(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """Run one step; return the loss and the gradient norm before clipping."""
        self.model.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        clipped = self._clipped()
        norm = torch.nn.utils.clip_grad_norm_(clipped.values(), self.global_norm or float("inf"))
        if self.value is not None:
            torch.nn.utils.clip_grad_value_(clipped.values(), self.value)
        if self.group_norm is not None:
            for group in _layers_and_the_rest(clipped):
                torch.nn.utils.clip_grad_norm_(group, self.group_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach()), float(norm)

    def _clipped(self) -> dict[str, Parameter]:
        """Return the parameters whose gradients are clipped, by name."""
        optimizer_of = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if hasattr(optimizer, "clipped")
        }
        return {
            name: optimizer_of[parameter].clipped(parameter) if parameter in optimizer_of else parameter
            for name, parameter in self.model.named_parameters()
        }


class PlainSGD(PlainTraining):
    """Plain SGD with decoupled weight decay, see ``PlainTraining`` for the limits."""

    def __init__(self, model: Module, lr: float, weight_decay: float = 0.0, **limits: float | None) -> None:
        super().__init__(model, [DecoupledSGD(trained_parameters(model).values(), lr, weight_decay)], **limits)


def trained_parameters(model: Module) -> dict[str, Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _layers_and_the_rest(parameters: dict[str, Parameter]) -> Iterator[list[Parameter]]:
    groups: dict[str, list[Parameter]] = {}
    for name, parameter in parameters.items():
        layer = re.match(r"model\.layers\.\d+", name)
        groups.setdefault(layer.group() if layer else name.rpartition(".")[0], []).append(parameter)
    yield from groups.values()
