"""Rounding and norms against independent arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lomo_ds.numerics import CHUNK_NUMEL, chunks, squared_norm, stochastic_round

HALF_DTYPES = [torch.bfloat16, torch.float16]
SAMPLES = 10_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest value of ``dtype`` not above ``value`` and the smallest not below, by search over all of them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()]
    return float(every[every <= value].max()), float(every[every >= value].min())


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


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_squared_norm(dtype: torch.dtype) -> None:
    values = torch.randn(10_001, generator=generator()).to(dtype)
    assert float(squared_norm(values)) == pytest.approx(float(values.double().square().sum()), rel=1e-5)
    assert float(squared_norm(values[:0])) == 0.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_squared_norm_shows_what_is_not_finite(bad: float) -> None:
    assert not squared_norm(torch.tensor([1.0, bad, 2.0])).isfinite()


def test_chunks_are_views_that_cover_everything() -> None:
    one, other = torch.zeros(2 * CHUNK_NUMEL + 3), torch.ones(2 * CHUNK_NUMEL + 3)
    sizes = []
    for part, values in chunks(one, other):
        part.copy_(values)
        sizes.append(part.numel())
    assert sizes == [CHUNK_NUMEL, CHUNK_NUMEL, 3]
    assert torch.equal(one, other)
