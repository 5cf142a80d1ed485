"""Train the same model from shards on the device and from shards in host memory: not a bit may differ."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engines import identical, make_engine, weights_of


def large_model(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).train()


def train_from(offload: str, hidden: int, layers: int, schedule: str) -> dict[str, Tensor]:
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "offload_param": {"device": offload},
    }
    engine = make_engine(large_model(hidden, layers), schedule, lr=0.01, zero_optimization=zero, bf16={"enabled": True})
    for number in range(6):
        ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(number))
        engine.train_batch({"input_ids": ids, "labels": ids})
    return {name: weight.cpu() for name, weight in weights_of(engine).items()}


def same_from_host_memory(hidden: int, layers: int, schedule: str) -> None:
    """Return whether weights in host memory are the same; they differ where a pending copy was not waited for."""
    params = hidden, layers, schedule
    assert identical(train_from("cpu", *params), train_from("none", *params))
