"""Models and steps for tests of layered accumulation."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.reference import VOCABULARY, tiny_config

LENGTHS = (12, 7, 12, 10)  # tokens of each row of a micro-batch


def layered_model(
    tied: bool = False, frozen: tuple[str, ...] = (), dropout: float = 0.0, layers: int = 2, **options: Any
) -> LlamaForCausalLM:
    """Return a tiny LLaMA; parameters whose name contains one of ``frozen`` are not trained."""
    torch.manual_seed(0)
    config = tiny_config(tied, dropout)
    config.num_hidden_layers = layers
    model = LlamaForCausalLM._from_config(config, **options).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    return model


def micro_batches(step: int, count: int, rows: int = 2, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Tensor]]:
    """Return micro-batches of unequal lengths, whose rows have different numbers of labels; one row has none."""
    generator = torch.Generator().manual_seed(1000 + step)
    batches = []
    for number in range(count):
        length = lengths[number % len(lengths)]
        input_ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        labels = input_ids.clone()
        labels[0, : (5 * number + step) % length] = -100
        labels[-1, : length if number == 1 else 0] = -100
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


def padded(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return one batch of all rows; a causal model sees no padding at the end of a row."""
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def pad(value: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(value, (0, length - value.shape[1]), value=fill)

    fills = {"input_ids": 0, "labels": -100}
    return {name: torch.cat([pad(batch[name], fill) for batch in batches]) for name, fill in fills.items()}
