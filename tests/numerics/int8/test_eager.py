"""Eight-bit weights against numpy, and what rounding at random must keep: the mean, and what has not changed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lomo_ds.numerics import flat
from lomo_ds.numerics.int8 import eager as int8
from lomo_ds.numerics.int8.eager import BLOCK, Noise, block_count, decode, encode, update_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMELS = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK + 3]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=generator(seed))


def requantized(codes: Tensor, scales: Tensor, exact: Tensor, seed: int | None = 0) -> tuple[Tensor, Tensor]:
    written = codes.clone(), scales.clone()
    update_(*written, exact, -1.0, 0.0, None if seed is None else Noise(seed, 0, 0))  # 0 weight + exact
    return written


def bfloat16_up(value: float) -> float:
    """The smallest bfloat16 not below a positive ``value``: 8 bits of mantissa."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.ceil(mantissa * 256), exponent - 8)


def numpy_blocks(values: Tensor) -> list[np.ndarray]:
    return np.split(values.double().numpy(), range(BLOCK, values.numel(), BLOCK))


finite = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32, allow_subnormal=False)
lists_of_values = st.one_of(
    st.lists(finite, min_size=1, max_size=2 * BLOCK + 5),
    st.builds(lambda numel, seed: randn(numel, seed).tolist(), st.integers(1, 3 * BLOCK), st.integers(0, 1000)),
)


@settings(deadline=None)
@given(values=lists_of_values)
def test_encoding_moves_no_value_by_more_than_half_a_scale(values: list[float]) -> None:
    exact = torch.tensor(values)
    codes, scales = encode(exact)
    decoded = decode(codes, scales, torch.float32)
    for block, scale, actual in zip(numpy_blocks(exact), scales.tolist(), numpy_blocks(decoded), strict=True):
        largest = np.abs(block).max()
        assert scale == pytest.approx(max(largest / 127, 2.0**-126), rel=2.0**-8)
        assert np.abs(block - actual).max() <= scale / 2


@settings(deadline=None)
@given(values=lists_of_values)
def test_what_is_decoded_is_encoded_as_it_was(values: list[float]) -> None:
    codes, scales = encode(torch.tensor(values))
    again = encode(decode(codes, scales, torch.float32))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_decoding_is_one_product_rounded_once(numel: int, dtype: torch.dtype) -> None:
    codes, scales = encode(randn(numel).to(dtype))
    assert (codes.dtype, scales.dtype, scales.numel()) == (torch.int8, torch.bfloat16, block_count(numel))
    product = codes.double() * scales.double().repeat_interleave(BLOCK)[:numel]
    assert torch.equal(product.float().double(), product), "exact in fp32"
    assert torch.equal(decode(codes, scales, dtype), product.to(dtype))
    out = torch.empty(numel, dtype=dtype)
    assert decode(codes, scales, dtype, out) is out
    assert torch.equal(out, product.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype: torch.dtype) -> None:
    codes, scales = encode(torch.zeros(BLOCK + 3, dtype=dtype))
    assert not codes.any()
    assert (scales > 0).all(), "to divide by"
    assert torch.equal(decode(codes, scales, dtype), torch.zeros(BLOCK + 3, dtype=dtype))
    codes, scales = requantized(codes, scales, torch.zeros(BLOCK + 3))
    assert not decode(codes, scales, dtype).any()


def test_blocks_do_not_touch_one_another() -> None:
    values = torch.cat([randn(BLOCK), 1e6 * randn(BLOCK, seed=1), 1e-6 * randn(5, seed=2)])
    for start, end in ((0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK + 5)):
        alone = decode(*encode(values[start:end]), torch.float32)
        assert torch.equal(decode(*encode(values), torch.float32)[start:end], alone)


@pytest.mark.parametrize("way", ["encode", "requantize"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
def test_a_block_that_is_not_finite_is_nan_and_only_that(bad: float, way: str) -> None:
    values = randn(2 * BLOCK + 5)
    sound = encode(values)
    values[BLOCK + 7] = bad
    codes, scales = encode(values) if way == "encode" else requantized(*sound, values)
    for dtype in DTYPES:
        actual = decode(codes, scales, dtype)
        assert actual[BLOCK : 2 * BLOCK].isnan().all()
        assert actual[:BLOCK].isfinite().all()
        assert actual[2 * BLOCK :].isfinite().all()
    assert scales.isnan().tolist() == [False, True, False]
    assert not codes[BLOCK : 2 * BLOCK].any(), "the same on every device"
    updated = decode(*requantized(codes, scales, randn(2 * BLOCK + 5)), torch.float32)
    assert updated.isnan().tolist() == decode(codes, scales, torch.float32).isnan().tolist(), "nan stays, as in floats"


def test_a_nan_with_every_bit_set_is_one() -> None:
    every_bit = torch.tensor([-1, 2**31 - 1], dtype=torch.int32).view(torch.float32)  # a GPU's nan
    for value in every_bit:
        codes, scales = requantized(*encode(torch.ones(3)), value.expand(3).contiguous())
        assert decode(codes, scales, torch.float32).isnan().all()


def test_rounding_at_random_is_unbiased_on_a_kept_scale() -> None:
    samples = 20_000
    codes, scales = encode(torch.full((samples,), 127.0))
    assert scales.unique().tolist() == [1.0]
    for wanted in (0.1, 0.5, -0.3, 13.25, -99.9, 126.7, -126.7):
        exact = torch.full((samples,), wanted)
        exact[::BLOCK] = 127.0  # keeps the scale
        actual = requantized(codes, scales, exact)
        assert torch.equal(actual[1], scales)
        drawn = actual[0][exact != 127.0].double()
        assert set(drawn.tolist()) == {math.floor(wanted), math.ceil(wanted)}
        up = wanted - math.floor(wanted)
        assert abs(float(drawn.mean()) - wanted) <= 4 * math.sqrt(up * (1 - up) / drawn.numel())


@pytest.mark.parametrize("factor", [3.7, 1.003, 0.31, 1e-30, 1e30])
def test_rounding_at_random_is_unbiased_on_a_renewed_scale(factor: float) -> None:
    """The largest value too: nothing is clipped to the old scale, nor to the new one."""
    old = randn(BLOCK)
    exact = old * factor
    codes, scales = (each.repeat(1000) for each in encode(old))
    codes, scales = requantized(codes, scales, exact.repeat(1000))
    assert scales.unique().numel() == 1
    scale = float(scales[0])
    mean = decode(codes, scales, torch.float32).double().view(1000, BLOCK).mean(dim=0)
    assert float((mean - exact.double()).abs().max()) < 5 * scale * 0.5 / math.sqrt(1000)


@settings(deadline=None)
@given(values=lists_of_values, seed=st.integers(0, 2**31))
def test_what_has_not_changed_keeps_its_code(values: list[float], seed: int) -> None:
    codes, scales = encode(torch.tensor(values))
    written = requantized(codes, scales, decode(codes, scales, torch.float32), seed)
    assert torch.equal(written[0], codes)
    assert torch.equal(written[1], scales)


def test_not_one_of_very_many_that_have_not_changed_gets_another_code() -> None:
    """Whatever bits are drawn: noise so near to 1 that it rounds to 1 would move one in 2 ** 16."""
    codes = torch.arange(2**21, dtype=torch.int32).remainder_(255).sub_(127).to(torch.int8)
    codes[::BLOCK] = 127  # keeps the scale
    scales = torch.full((block_count(2**21),), 0.3, dtype=torch.bfloat16)
    written = requantized(codes, scales, decode(codes, scales, torch.float32))
    assert torch.equal(written[0], codes)


@settings(deadline=None)
@given(old=lists_of_values, factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_a_scale_is_renewed_where_it_must_and_no_value_passes_a_neighbour(
    old: list[float], factor: float, seed: int
) -> None:
    codes, scales = encode(torch.tensor(old))
    exact = torch.tensor(old) * factor
    written = requantized(codes, scales, exact, seed)
    decoded = decode(*written, torch.float32)
    for before, scale, block, actual in zip(
        scales.tolist(), written[1].tolist(), numpy_blocks(exact), numpy_blocks(decoded), strict=True
    ):
        largest = np.abs(block).max()
        if before * 127 * int8.SHRINK <= largest <= before * 127:
            assert scale == before
        else:
            wanted = max(bfloat16_up(largest / 127), 2.0**-126)
            assert scale == pytest.approx(wanted, rel=2.0**-7)
            assert scale * 127 >= largest * (1 - 2.0**-22)
        assert np.abs(block - actual).max() <= scale


def test_a_scale_has_hysteresis() -> None:
    codes, scales = encode(torch.linspace(-1, 1, BLOCK))
    for _ in range(10):
        for factor in (0.99, 1.0, 0.6):
            now = requantized(codes, scales, torch.linspace(-1, 1, BLOCK) * factor * 0.99)
            assert torch.equal(now[1], scales)
    assert (requantized(codes, scales, torch.linspace(-1, 1, BLOCK) * 0.4)[1] < scales).all()
    assert (requantized(codes, scales, torch.linspace(-1, 1, BLOCK) * 1.02)[1] > scales).all()


def test_without_a_generator_it_rounds_to_nearest() -> None:
    codes, scales = encode(torch.full((BLOCK,), 127.0))
    exact = torch.linspace(-127, 127, BLOCK)
    assert torch.equal(requantized(codes, scales, exact, seed=None)[0], exact.round().to(torch.int8))


@pytest.mark.parametrize("factor", [0.037, torch.tensor(0.037)], ids=["float", "tensor"])
@pytest.mark.parametrize("seed", [0, None], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_is_exact_until_it_is_rounded(dtype: torch.dtype, seed: int | None, factor: float | Tensor) -> None:
    codes, scales = encode(randn(1000))
    gradient = randn(1000, seed=1).to(dtype)
    exact = decode(codes, scales, torch.float32) * 0.97 - gradient.float() * 0.037
    expected = requantized(codes, scales, exact, seed)
    int8.update_(codes, scales, gradient, factor, 0.97, None if seed is None else Noise(seed, 0, 0))
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])


def drawn(noise: Noise, numel: int = 64 * BLOCK) -> Tensor:
    """Return the directions in which values midway between two codes were rounded, as +1 and -1."""
    codes, scales = encode(torch.full((numel,), 127.0))
    exact = torch.full((numel,), 0.5)
    exact[::BLOCK] = 127.0  # keeps the scale
    update_(codes, scales, exact, -1.0, 0.0, noise)
    return codes[exact != 127.0] * 2.0 - 1


def test_rounding_repeats_for_the_same_noise_and_no_other() -> None:
    start = drawn(Noise(1, 2, 3))
    assert torch.equal(start, drawn(Noise(1, 2, 3)))
    for other in (Noise(2, 2, 3), Noise(1, 3, 3), Noise(1, 2, 3 + int8.WINDOW), Noise(2, 1, 3)):
        assert abs(float((start * drawn(other)).mean())) < 4.5 / math.sqrt(start.numel()), "independent"
    assert abs(float((start * start.roll(1)).mean())) < 4.5 / math.sqrt(start.numel()), "of neighbours"


def test_errors_of_one_weight_make_up_for_one_another() -> None:
    """200 updates by 0.13 of a step: drawn anew each time they would end with a standard deviation of 4.8 steps."""
    codes, scales = encode(torch.full((4 * BLOCK,), 127.0))
    kept = torch.arange(4 * BLOCK) % BLOCK == 0
    codes[~kept] = -50
    for step in range(200):
        exact = decode(codes, scales, torch.float32)
        exact[~kept] += 0.13
        update_(codes, scales, exact, -1.0, 0.0, Noise(0, 0, step))
    off = codes[~kept].float() - (-50 + 200 * 0.13)
    assert off.abs().max() < 2.5
    assert abs(float(off.mean())) < 0.2


@pytest.mark.parametrize("numel", [5 * BLOCK, 5 * BLOCK + 7])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    values, exact = randn(numel), randn(numel, seed=1)
    whole = encode(values)
    nearest = requantized(*whole, exact, seed=None)
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", 2 * BLOCK + 1)
    in_pieces = encode(values)
    assert all(map(torch.equal, in_pieces, whole))
    assert torch.equal(decode(*in_pieces, torch.bfloat16), decode(*whole, torch.bfloat16))
    assert all(map(torch.equal, requantized(*in_pieces, exact, seed=None), nearest))
