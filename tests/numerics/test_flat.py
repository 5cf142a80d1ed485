"""Tests of rounding and norms against independent arithmetic."""

import bisect
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lomo_ds.numerics import flat
from lomo_ds.numerics.flat import norms, pieces
from lomo_ds.numerics.rounding import stochastic_round

HALF_DTYPES = [torch.bfloat16, torch.float16]
SAMPLES = 10_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def finite_values(dtype: torch.dtype) -> list[float]:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return sorted(every[every.isfinite()].tolist())


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest value of ``dtype`` not above ``value`` and the smallest not below, by search over all of them."""
    every = finite_values(dtype)
    return every[bisect.bisect_right(every, value) - 1], every[bisect.bisect_left(every, value)]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("magnitude", [1.001, 0.3333, 7.77e-3, 123.456, 2.0**-14 * 0.7, 3.3e-6, 2.0**-24 * 0.4, 1e-8])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, sign: float, magnitude: float) -> None:
    value = torch.tensor(sign * magnitude)
    rounded = stochastic_round(value.expand(SAMPLES).contiguous(), dtype, generator()).double()
    below, above = neighbours(float(value), dtype)
    assert set(rounded.tolist()) <= {below, above}
    up = (float(value) - below) / (above - below)
    standard_error = (above - below) * math.sqrt(up * (1 - up) / SAMPLES)
    assert abs(float(rounded.mean()) - float(value)) <= 4 * standard_error


def test_stochastic_rounding_is_unbiased_for_subnormal_bfloat16() -> None:
    value = torch.tensor(2.0**-133 * 5.3)  # bfloat16's smallest is 2 ** -133
    rounded = stochastic_round(value.expand(SAMPLES).contiguous(), torch.bfloat16, generator()).double() / 2.0**-133
    assert set(rounded.tolist()) == {5.0, 6.0}
    fraction = float(value.double() / 2.0**-133) - 5
    assert abs(float(rounded.mean()) - 5 - fraction) < 4 * math.sqrt(fraction * (1 - fraction) / SAMPLES)


@settings(deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_never_passes_a_neighbour(dtype: torch.dtype, values: list[float]) -> None:
    limit = torch.finfo(dtype).max
    within = [value for value in values if abs(value) <= limit] or [0.0]
    rounded = stochastic_round(torch.tensor(within), dtype, generator())
    for value, got in zip(within, rounded.double().tolist(), strict=True):
        assert neighbours(value, dtype)[0] <= got <= neighbours(value, dtype)[1]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_keeps_what_is_representable(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = stochastic_round(every.float(), dtype, generator())
    assert torch.equal(rounded.isnan(), every.isnan())
    assert torch.equal(rounded[~every.isnan()], every[~every.isnan()])  # inf among them


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_keeps_every_nan(dtype: torch.dtype) -> None:
    low_payload = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)  # cut off: inf
    assert stochastic_round(low_payload, dtype, generator()).isnan().all()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_repeats_for_the_same_seed(dtype: torch.dtype) -> None:
    def rounded(seed: int) -> Tensor:
        return stochastic_round(torch.linspace(-3, 3, 1001), dtype, generator(seed))

    assert torch.equal(rounded(1), rounded(1))
    assert not torch.equal(rounded(1), rounded(2))


def test_stochastic_rounding_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 and float16, got torch\.float32"):
        stochastic_round(torch.ones(1), torch.float32, generator())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_shows_what_is_not_finite(bad: float) -> None:
    (norm,) = norms([torch.tensor([1.0, bad, 2.0])])
    assert not norm.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_norms(dtype: torch.dtype) -> None:
    values = [torch.randn(numel, generator=generator()).to(dtype) for numel in (10_001, 1, 0)]
    actual = norms(values)
    assert [(norm.dtype, norm.dim()) for norm in actual] == [(torch.float32, 0)] * 3
    for norm, of in zip(actual, values, strict=True):
        assert float(norm) == pytest.approx(float(of.double().square().sum().sqrt()), rel=1e-5)
    assert norms([]) == []


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_norms_show_what_is_not_finite(bad: float) -> None:
    sound, poisoned = norms([torch.ones(3), torch.tensor([1.0, bad, 2.0])])
    assert sound.isfinite()
    assert not poisoned.isfinite()


def test_norms_of_half_precision_do_not_overflow() -> None:
    assert float(norms([torch.full((100,), 6e4, dtype=torch.float16)])[0]) == pytest.approx(6e5, rel=1e-3)


def test_pieces_are_views_that_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", 10)
    numels = [3, 4, 4, 0, 25, 10, 1, 0]
    firsts, others = ([torch.full((numel,), value) for numel in numels] for value in (0.0, 1.0))
    lengths = []
    for parts, values in pieces(firsts, others):
        lengths.append([part.numel() for part in parts])
        for part, value in zip(parts, values, strict=True):
            part.copy_(value)
    assert lengths == [[3, 4], [4, 0], [10], [10], [5], [10], [1, 0]]
    assert all(map(torch.equal, firsts, others))


def test_there_are_no_pieces_of_nothing() -> None:
    assert list(pieces([], [])) == []
