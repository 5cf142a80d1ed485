"""Fuzz test of DeepSpeed configs: a step equals one of plain PyTorch, or there is a one-line error message."""

import math
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import lomo_ds
from lomo_ds.errors import LomoError
from tests.config.test_ds_fields import ds_config, fields, zero_fields
from tests.engines import weights_of
from tests.fuzz.test_inputs import is_one_line, replace_fields, replacements
from tests.ranks import GroupOf
from tests.reference import PlainSGD, even_batch, part, tiny_model

LARGEST = 10.0  # a higher learning rate or weight decay overflows, so results cannot be compared
MOST_MICRO_BATCHES = 16  # a step with more micro-batches takes too long
UNCOMPARED = "there is no reference to compare with"
HALF_TOLERANCE = 0.1  # tolerance of a step in bf16 or fp16 compared with fp32

usual_params = st.fixed_dictionaries(
    {"lr": st.floats(0, 1)},
    optional={
        "weight_decay": st.floats(0, 0.5),
        "clip_grad_value": st.none() | st.floats(0.01, 2),
        "clip_group_norm": st.none() | st.floats(0.1, 10),
        "update_schedule": st.sampled_from(["auto", "immediate", "two_pass", "stash"]),
        "stash_device": st.sampled_from(["auto", "cpu"]),
        "rounding": st.sampled_from(["auto", "nearest", "stochastic"]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "gather_granularity": st.sampled_from(["auto", "module", "layer"]),
    },
)
usual_configs = st.builds(
    lambda params, sections, zero: ds_config(params, **sections) | {"zero_optimization": zero},
    usual_params,
    fields | st.just({}),
    zero_fields | st.just({"stage": 3}),
)
configs = st.builds(replace_fields, usual_configs, st.just([]) | replacements)


def check_config(ranks: GroupOf, config: dict[str, Any]) -> bool:
    """Return whether ``config`` trains like plain PyTorch, and check that otherwise the error message is one line."""
    [refusal] = ranks(1).run(train_and_compare, config)
    assume(refusal != UNCOMPARED)
    assert refusal is None or is_one_line(refusal), refusal
    return refusal is None


def train_and_compare(config: dict[str, Any]) -> str | None:
    """Compare a step on one rank with plain PyTorch; return the error message if the config is rejected."""
    try:
        engine = lomo_ds.initialize(model=tiny_model(), config=config)[0]
    except LomoError as refusal:
        return str(refusal)
    accumulation, lr = engine.gradient_accumulation_steps(), engine.get_lr()[0]
    batch = even_batch(0, 2 * min(accumulation, MOST_MICRO_BATCHES))
    try:
        if accumulation > MOST_MICRO_BATCHES:
            return UNCOMPARED
        engine.train_batch([part(batch, index, accumulation) for index in range(accumulation)])
    except LomoError as refusal:
        return str(refusal)
    else:
        return UNCOMPARED if engine.skipped_steps else compare(weights_of(engine), batch, config, lr)
    finally:
        engine.destroy()


def compare(weights: dict[str, Tensor], batch: dict[str, Tensor], config: dict[str, Any], lr: float) -> str | None:
    """Compare ``weights`` with a step of plain PyTorch, with a high tolerance if weights or autocast are in 16 bits."""
    params = config["optimizer"]["params"]
    decay = float(params.get("weight_decay", 0.0))
    if lr > LARGEST or decay > LARGEST:
        return UNCOMPARED
    plain = tiny_model()
    PlainSGD(
        plain,
        lr=lr,
        weight_decay=decay,
        value=params.get("clip_grad_value"),
        group_norm=params.get("clip_group_norm"),
        global_norm=config.get("gradient_clipping") or None,
    ).step(batch)
    single = all(weight.dtype == torch.float32 for weight in weights.values()) and "torch_autocast" not in config
    for name, expected in plain.named_parameters():
        difference = float((weights[name].float() - expected.detach()).abs().max())
        assert math.isfinite(difference), f"{name} is not finite"
        assert difference < (1e-5 if single else HALF_TOLERANCE), f"{name} differs by {difference}"
    return None
