"""Host synchronization: the number of device values read in a step does not grow with the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engines import make_engine, my_part
from tests.ranks import Ranks
from tests.reference import VOCABULARY, even_batch, whole_batch

GroupOf = Callable[..., Ranks]

CASES = [
    ("immediate", {}, None),
    ("immediate", {"clip_grad_value": 0.01}, None),
    ("immediate", {"clip_group_norm": 0.05}, None),
    ("two_pass", {}, 0.1),
    ("stash", {}, 0.1),
]


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


class ValueReads(TorchDispatchMode):
    """Counts reads of tensor values, which make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def reads_in_a_step(layers: int, schedule: str, params: dict[str, Any], global_norm: float | None) -> int:
    engine = make_engine(model_of(layers), schedule, global_norm=global_norm, params=params, bf16={"enabled": True})
    batch = my_part(whole_batch(0, rows=2 * torch.distributed.get_world_size()))
    for _ in range(3):  # DeepSpeed traces modules in the first steps
        engine.train_batch(batch)
    with ValueReads() as reads:
        engine.train_batch(batch)
    return reads.count


@pytest.mark.parametrize(("schedule", "params", "global_norm"), CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_reads_do_not_grow_with_the_model(
    ranks: GroupOf, world_size: int, schedule: str, params: dict[str, Any], global_norm: float | None
) -> None:
    reads_small = ranks(world_size).run(reads_in_a_step, 1, schedule, params, global_norm)
    reads_large = ranks(world_size).run(reads_in_a_step, 4, schedule, params, global_norm)
    print(f"{schedule} {params}: {reads_small[0]} reads of a tensor's value in a step")
    assert reads_small == reads_large


def backward_in_sync_debug_mode(params: dict[str, Any], section: str) -> None:
    sections: dict[str, Any] = {section: {"enabled": True}}
    engine = make_engine(model_of(4), params=params, **sections)
    batch = {name: value.cuda() for name, value in even_batch(0, 4).items()}
    for _ in range(2):  # the first step allocates, and compiles kernels
        loss = engine(**batch).loss
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.backward(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.step()


@pytest.mark.cuda
@pytest.mark.parametrize("section", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "params",
    [{"update_schedule": "stash", "stash_device": "gpu"}, {"update_schedule": "stash", "stash_device": "cpu"}],
    ids=["gpu", "host"],
)
def test_backward_does_not_synchronize_on_cuda(ranks: GroupOf, params: dict[str, Any], section: str) -> None:
    ranks(1, "cuda").run(backward_in_sync_debug_mode, params, section)
