"""deepspeed.utils.safe_get_* and safe_set_*: every weight can be read and set, however it is kept."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
)
from torch.nn.functional import pad

from lomo_ds.errors import ConfigError
from lomo_ds.numerics.flat import ceil_div
from tests.engines import WHOLE_THRESHOLD, make_engine
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

GroupOf = Callable[..., Ranks]

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "int8": {"bf16": {"enabled": True}, "params": {"weights": "int8"}},
}


def sections_of(form: str, offload: str, threshold: int, folder: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    if offload != "none":
        zero["offload_param"] = {"device": offload} | ({"nvme_path": folder} if offload == "nvme" else {})
    return {"zero_optimization": zero} | FORMS[form]


def read_and_set(form: str, offload: str, threshold: int, folder: str, local: bool) -> None:
    """Every parameter is read, then set to twice itself; the loss is that of a plain model with these weights."""
    model = tiny_model()
    plain = copy.deepcopy(model)
    rounding = {"fp32": 1e-7, "bf16": 2**-8, "int8": 2**-6}[form]
    engine = make_engine(model, **sections_of(form, offload, threshold, folder))
    batch = whole_batch(0, rows=2)
    engine.train_batch(batch | {"labels": torch.full_like(batch["labels"], -100)})  # gathers, and changes nothing
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for parameter, expected in zip(engine.module.parameters(), plain.parameters(), strict=True):
        whole = safe_get_full_fp32_param(parameter)
        assert (whole.dtype, whole.shape) == (torch.float32, expected.shape)
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(whole, expected.detach(), rtol=0, atol=rounding * scale + 1e-8)
        length = ceil_div(expected.numel(), world_size)
        own = pad(whole.flatten(), (0, world_size * length - expected.numel()))[rank * length : (rank + 1) * length]
        assert torch.equal(safe_get_local_fp32_param(parameter), own)
        if local:
            safe_set_local_fp32_param(parameter, own * 2)
        else:
            safe_set_full_fp32_param(parameter, whole * 2)
        assert torch.equal(safe_get_full_fp32_param(parameter), whole * 2), "powers of 2 round to themselves"
        expected.data = whole * 2
    with torch.no_grad():
        got = float(engine(**batch).loss)
        assert got == pytest.approx(float(plain(**batch).loss), rel=1e-6 if form == "fp32" else 2e-2)


@pytest.mark.parametrize("local", [False, True], ids=["full", "local"])
@pytest.mark.parametrize("threshold", [0, WHOLE_THRESHOLD], ids=["gathered", "persistent"])
@pytest.mark.parametrize(
    ("form", "offload"),
    [("fp32", "none"), ("bf16", "none"), ("int8", "none"), ("fp32", "cpu"), ("int8", "cpu"), ("bf16", "nvme")],
)
def test_weights_are_read_and_set(
    ranks: GroupOf, tmp_path: Path, form: str, offload: str, threshold: int, local: bool
) -> None:
    ranks(2).run(read_and_set, form, offload, threshold, str(tmp_path), local)


def test_weights_of_one_rank_are_read_and_set(ranks: GroupOf, tmp_path: Path) -> None:
    ranks(1).run(read_and_set, "fp32", "none", 0, str(tmp_path), False)


def set_then_train() -> bool:
    engine = make_engine(tiny_model(), "immediate", threshold=0)
    parameter = engine.module.lm_head.weight
    value = torch.zeros_like(safe_get_full_fp32_param(parameter))
    safe_set_full_fp32_param(parameter, value)
    engine.train_batch(whole_batch(0, rows=2))
    after = safe_get_full_fp32_param(parameter)
    return bool(after.any()) and float(after.abs().max()) < 1.0


def test_training_goes_on_from_what_was_set(ranks: GroupOf) -> None:
    assert ranks(2).run(set_then_train) == [True, True]


def refusals() -> list[str]:
    engine = make_engine(tiny_model(), "stash", threshold=0)
    engine.backward(engine(**whole_batch(0, rows=2)).loss)
    parameter = engine.module.lm_head.weight
    value = torch.zeros(61, 20)
    reasons = []
    for call in (
        lambda: safe_get_full_grad(parameter),
        lambda: safe_set_full_grad(parameter, value),
        lambda: safe_get_local_grad(parameter),
        lambda: safe_set_local_grad(parameter, value),
        lambda: safe_update_full_grad_vectorized([parameter], lambda gradient, _: gradient),
        lambda: safe_get_full_optimizer_state(parameter, "exp_avg"),
        lambda: safe_set_full_optimizer_state(parameter, value, "exp_avg"),
        lambda: safe_get_local_optimizer_state(parameter, "exp_avg"),
        lambda: safe_set_local_optimizer_state(parameter, value, "exp_avg"),
        lambda: safe_set_full_fp32_param(parameter, value[1:]),
        lambda: safe_set_local_fp32_param(parameter, value),
        lambda: safe_set_full_fp32_param(parameter, 0.0),
    ):
        with pytest.raises(ConfigError) as refusal:
            call()
        reasons.append(str(refusal.value))
    return reasons


def test_what_lomo_does_not_keep_is_refused(ranks: GroupOf) -> None:
    reasons = ranks(2).run(refusals)[0]
    assert all("no gradient is kept after backward" in reason for reason in reasons[:5])
    assert all("the optimizer state 'exp_avg' cannot be read or set" in reason for reason in reasons[5:9])
    assert "must have 1220 elements, got shape [60, 20]" in reasons[9]
    assert "must have 610 elements, got shape [61, 20]" in reasons[10]
    assert "must be a tensor of real numbers, got a float" in reasons[11]
