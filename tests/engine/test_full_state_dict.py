"""The full state dict that transformers and accelerate save: every weight on rank 0, nothing on the other ranks."""

from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import pytest
import torch

from tests.engines import make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
SETTINGS: dict[str, dict[str, Any]] = {
    "persistent": {},
    "partitioned": {"threshold": 0},
    "int8": {"params": {"weights": "int8"}, "threshold": 0},
    "offload": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
}


def gather_state_dict(setting: str) -> tuple[bool, int]:
    """Check the state dict on rank 0; return whether this rank has one, and how many names share a tensor."""
    model = tiny_model(tied=True)
    model.register_buffer("kept", torch.arange(3.0))
    model.register_buffer("left_out", torch.zeros(1), persistent=False)
    engine = make_engine(model, **SETTINGS[setting])
    assert engine.zero_gather_16bit_weights_on_model_save()
    state, trained = (engine._zero3_consolidated_16bit_state_dict(frozen) for frozen in (False, True))
    weights = weights_of(engine)
    engine.train_batch(whole_batch(0, rows=4))  # does not change what was gathered
    if dist.get_rank() != 0:
        return state is not None or trained is not None, 0
    assert state is not None
    assert trained is not None
    assert state.keys() == {*weights, "lm_head.weight", "kept"}
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert state["kept"].tolist() == [0, 1, 2]
    assert state.keys() - trained.keys() == {"model.layers.0.mlp.up_proj.weight"}
    return True, len(state) - len({id(tensor) for tensor in state.values()})


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_rank_0_has_a_copy_of_every_weight(ranks: GroupOf, world_size: int, setting: str) -> None:
    results = ranks(world_size).run(gather_state_dict, setting)
    assert results == [(True, 1), (False, 0)][:world_size]
