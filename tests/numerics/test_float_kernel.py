"""The Triton kernel without a GPU: its results in Triton's interpreter, and its compiled code."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lomo_ds.numerics.apply import Scalar, Update, apply
from lomo_ds.numerics.flat import clamp_
from lomo_ds.numerics.float_eager import update_half, update_single
from lomo_ds.numerics.rounding_noise import RoundingNoise
from tests.numerics import philox
from tests.updates import sgd_step

pytest.importorskip("triton")
HALF_DTYPES = [torch.bfloat16, torch.float16]
NUMELS = [1000, 8192, 8192 + 37]  # a program has 8192 elements
Interpreted = Callable[..., None]


def randn(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def updated(shard: Tensor, gradient: Tensor, factor: Scalar, decay: Scalar, noise: Any = None) -> Tensor:
    from lomo_ds.numerics import float_kernel

    written = shard.clone()
    float_kernel.update(written, gradient, factor, decay, noise)
    return written


def equals_eager(dtype: torch.dtype, gradient_dtype: torch.dtype, factor: Scalar, decay: Scalar) -> None:
    for numel in NUMELS:
        shard, gradient = randn(numel, dtype), randn(numel, gradient_dtype, seed=1)
        expected = shard.clone()
        update_half([expected], [gradient.clone()], factor, decay, generator=None)
        assert torch.equal(updated(shard, gradient, factor, decay), expected)


@pytest.mark.parametrize("decay", [0.97, torch.tensor(0.97)], ids=["float decay", "tensor decay"])
@pytest.mark.parametrize("factor", [0.037, torch.tensor(0.037)], ids=["float factor", "tensor factor"])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_nearest_equals_eager_bit_for_bit(
    interpreted: Interpreted, dtype: torch.dtype, gradient_dtype: torch.dtype, factor: Scalar, decay: Scalar
) -> None:
    interpreted(equals_eager, dtype, gradient_dtype, factor, decay)


def scalars_in_memory_draw_the_same_noise(dtype: torch.dtype) -> None:
    for numel in NUMELS:
        shard, gradient = randn(numel, dtype), randn(numel, seed=1)
        expected = updated(shard, gradient, 0.037, 0.97, noise=(3, 5))
        memory = torch.tensor([7.0, 0.97, 0.037])  # views that 16 bytes do not divide
        assert torch.equal(updated(shard, gradient, memory[2], memory[1], noise=(3, 5)), expected)
        assert memory.tolist() == torch.tensor([7.0, 0.97, 0.037]).tolist()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_scalars_in_memory_draw_the_same_noise(interpreted: Interpreted, dtype: torch.dtype) -> None:
    interpreted(scalars_in_memory_draw_the_same_noise, dtype)


def apply_hands_over_scalars(factor: Scalar, decay: Scalar, scale: Scalar) -> None:
    from lomo_ds.numerics import float_kernel

    def applied() -> Tensor:
        weights = randn(1000, torch.bfloat16)
        apply([(weights, Update(randn(1000, seed=1), factor, decay, scale))], None)
        return weights

    expected = applied()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lomo_ds.numerics.apply.kernel_for", lambda device: float_kernel)
        assert torch.equal(applied(), expected)


@pytest.mark.parametrize(
    "scalars",
    [
        (torch.tensor(0.037), torch.tensor(0.97), 1.0),
        (torch.tensor(0.037), torch.tensor(0.97), 0.25),
        (torch.tensor(0.037), 0.97, torch.tensor(0.25)),
        (0.037, torch.tensor(0.97), torch.tensor(0.25, dtype=torch.float64)),
        (torch.tensor(0.037, dtype=torch.float64), torch.tensor(0.97, dtype=torch.float64), 1.0),
    ],
    ids=["tensors", "a scale", "a tensor scale", "a float64 scale", "float64"],
)
def test_scalars_reach_the_kernel_as_fp32(interpreted: Interpreted, scalars: tuple[Scalar, ...]) -> None:
    interpreted(apply_hands_over_scalars, *scalars)


def measured(shard: Tensor, gradient: Tensor, limit: float | None = None, factor: float = 0.037) -> tuple[Tensor, ...]:
    """Return the new shard, and the sums of squares that an update writes into the middle of a buffer."""
    from lomo_ds.numerics import float_kernel

    programs = -(-shard.numel() // 8192)
    written, buffer = shard.clone(), torch.full((programs + 2,), -1.0)
    float_kernel.update(written, gradient, factor, 0.97, None, limit, buffer[1:-1])
    assert buffer[0] == buffer[-1] == -1
    return written, buffer[1:-1]


def check_sums_of_squares(dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    for numel in (1, 1000, 8192, 2 * 8192 + 37):
        shard, gradient = randn(numel, dtype), randn(numel, gradient_dtype, seed=1)
        for limit in (None, 0.1):
            sums = measured(shard, gradient, limit)[1]
            exact = [(part.double().numpy() ** 2).sum() for part in gradient.split(8192)]
            np.testing.assert_allclose(sums.numpy(), exact, rtol=1e-6)
        assert torch.equal(measured(shard, gradient)[1], measured(shard, gradient)[1])
        if dtype != torch.float32:
            assert torch.equal(measured(shard, gradient)[0], updated(shard, gradient, 0.037, 0.97))


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_an_update_computes_sums_of_squares(
    interpreted: Interpreted, dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    interpreted(check_sums_of_squares, dtype, gradient_dtype)


def shows_what_is_not_finite() -> None:
    for bad in (math.inf, -math.inf, math.nan):
        gradient = randn(3 * 8192, torch.bfloat16)
        gradient[8192 + 5] = bad
        sums = measured(torch.zeros(3 * 8192, dtype=torch.bfloat16), gradient, limit=1.0)[1]
        assert sums.isfinite().tolist() == [True, False, True]
        assert bool(sums.isnan()[1]) == math.isnan(bad)


def test_inf_and_nan_propagate_to_the_sums(interpreted: Interpreted) -> None:
    interpreted(shows_what_is_not_finite)


def clamps_as_eager(dtype: torch.dtype, gradient_dtype: torch.dtype, limit: float) -> None:
    shard, gradient = randn(8192 + 37, dtype), randn(8192 + 37, gradient_dtype, seed=1)
    gradient[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    factor = 2.0**-5  # so that products are exact in fp32: Triton's interpreter may round a fused multiply-add twice
    actual, expected, clamped = measured(shard, gradient, limit, factor)[0], shard.clone(), gradient.clone()
    clamp_(clamped, limit)
    if dtype == torch.float32:
        update_single([expected], [clamped], factor, 0.97)
    else:
        update_half([expected], [clamped], factor, 0.97, None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("limit", [0.1, 1e30, 1e300])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamping_equals_eager_bit_for_bit(
    interpreted: Interpreted, dtype: torch.dtype, gradient_dtype: torch.dtype, limit: float
) -> None:
    interpreted(clamps_as_eager, dtype, gradient_dtype, limit)


def keeps_to_its_shard() -> None:
    memory = randn(3000, torch.bfloat16)
    before = memory.clone()
    from lomo_ds.numerics import float_kernel

    float_kernel.update(memory[500:2500], randn(2000, seed=1), 1.0, 1.0, (0, 0))
    changed = memory != before
    assert changed[500:2500].any()
    assert not changed[:500].any()
    assert not changed[2500:].any()


def test_only_the_shard_is_written(interpreted: Interpreted) -> None:
    interpreted(keeps_to_its_shard)


def test_the_reference_is_philox() -> None:
    """Compare with known answers of Random123, the authors' own implementation."""
    zeros, ones = (
        [int(word[0]) for word in philox.philox([np.array([value], dtype=np.uint64)] * 4, key, rounds=7)]
        for value, key in ((0, 0), (2**32 - 1, 2**64 - 1))
    )
    assert zeros == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert ones == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def equals_reference(dtype: torch.dtype, seed: int, call: int) -> None:
    for numel in NUMELS:
        shard, gradient = randn(numel, dtype), randn(numel, dtype, seed=1)
        exact = shard.float() * 0.97 - gradient.float() * 0.037
        exact[exact.abs() < 2.0**-14] = 0.0  # the spacing of float16 differs below it
        actual = updated(shard.where(exact != 0, 0.0), gradient.where(exact != 0, 0.0), 0.037, 0.97, (seed, call))
        assert torch.equal(actual, philox.rounded(exact, dtype, philox.noise(numel, seed, call)))


@pytest.mark.parametrize(
    ("seed", "call"), [(0, 0), (1, 16), (42, 2**31), (2**32 + 5, 2**33 + 1), (2**64 - 1, 2**62 - 1)]
)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_adds_philox(interpreted: Interpreted, dtype: torch.dtype, seed: int, call: int) -> None:
    interpreted(equals_reference, dtype, seed, call)


def is_unbiased(dtype: torch.dtype, value: float, step: float) -> None:
    numel = 8192
    exact = 1.0 * value
    drawn = updated(torch.zeros(numel, dtype=dtype), torch.ones(numel), -exact, 1.0, (7, 0)).double()
    below = math.floor(exact / step) * step
    assert set(drawn.tolist()) == {below, below + step}
    up = (exact - below) / step
    assert abs(float(drawn.mean()) - exact) < 4 * step * math.sqrt(up * (1 - up) / numel)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("dtype", "value", "step"),
    [
        (torch.bfloat16, 1.00123, 2.0**-7),
        (torch.bfloat16, 1.0e-20, 2.0**-74),
        (torch.float16, 1.00023, 2.0**-10),
        (torch.float16, 2.0**-14 * 0.7001, 2.0**-24),
        (torch.float16, 3.3e-6, 2.0**-24),
        (torch.float16, 2.0**-24 * 0.4, 2.0**-24),
    ],
)
def test_stochastic_rounding_is_unbiased(
    interpreted: Interpreted, dtype: torch.dtype, value: float, step: float, sign: float
) -> None:
    interpreted(is_unbiased, dtype, sign * value, step)


def ups(programs: int, noise: tuple[int, int]) -> Tensor:
    """Round many midpoint values and return +1 (up) or -1 (down), with a row for each of a lane's 8 elements."""
    shard = torch.zeros(8192 * programs, dtype=torch.bfloat16)
    drawn = updated(shard, torch.ones(shard.numel()), -(1 + 2.0**-8), 1.0, noise)
    return torch.where(drawn > 1, 1.0, -1.0).view(programs, 8, 1024).swapaxes(0, 1).reshape(8, -1)


def is_independent() -> None:
    drawn = ups(4, (3, 5))
    bound = 4.5 / math.sqrt(drawn.shape[1])
    assert (torch.corrcoef(drawn) - torch.eye(8)).abs().max() < bound, "of one call of Philox"
    for other in (drawn.roll(1, dims=1), ups(4, (3, 6)), ups(4, (4, 5))):
        assert (drawn * other).mean(dim=1).abs().max() < bound
    assert torch.equal(drawn, ups(4, (3, 5)))


def test_noise_is_independent_between_words_neighbours_calls_and_seeds(interpreted: Interpreted) -> None:
    interpreted(is_independent)


def keeps_inf_and_nan(dtype: torch.dtype, noise: tuple[int, int] | None) -> None:
    gradient = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    actual = updated(torch.zeros(4, dtype=dtype), gradient, 1.0, 1.0, noise)
    torch.testing.assert_close(actual, -gradient.to(dtype), equal_nan=True)
    every_bit = torch.tensor([-1, 2**31 - 1], dtype=torch.int32).view(
        torch.float32
    )  # a GPU's nan, whose bits overflow to zero when incremented
    assert updated(torch.zeros(2, dtype=dtype), every_bit, 1.0, 1.0, noise).isnan().all()
    actual = updated(gradient.to(dtype), torch.ones(4), 0.0, 0.5, noise)
    torch.testing.assert_close(actual, gradient.to(dtype), equal_nan=True)


@pytest.mark.parametrize("noise", [None, (0, 0)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_inf_and_nan_are_preserved(interpreted: Interpreted, dtype: torch.dtype, noise: tuple[int, int] | None) -> None:
    interpreted(keeps_inf_and_nan, dtype, noise)


def keeps_what_is_representable(noise: tuple[int, int] | None) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    torch.testing.assert_close(
        updated(every, torch.zeros(2**16), 1.0, 1.0, noise), every, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("noise", [None, (0, 0)], ids=["nearest", "stochastic"])
def test_representable_values_are_unchanged(interpreted: Interpreted, noise: tuple[int, int] | None) -> None:
    interpreted(keeps_what_is_representable, noise)


class CountingGenerator:
    """Fake CUDA generator: a seed, and an offset in steps of four."""

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset

    def get_state(self) -> Tensor:
        return torch.tensor([self.seed, self.offset])

    def set_state(self, state: Tensor) -> None:
        self.seed, self.offset = state.tolist()


def rule_goes_on_from_its_state() -> None:
    from lomo_ds.numerics import float_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lomo_ds.numerics.apply.kernel_for", lambda device: float_kernel)
        generator: Any = CountingGenerator(11)
        noise = RoundingNoise(generator)

        def drawn() -> list[Tensor]:
            shards = [torch.ones(2000, dtype=dtype) for dtype in (*HALF_DTYPES, torch.bfloat16)]
            sgd_step(shards, [torch.ones(2000) for _ in shards], torch.tensor(0.5), 1e-3, 0.1, noise=noise)
            return shards

        drawn()
        state = noise.state()
        first, second = drawn(), drawn()
        noise.load_state(state)
        again = drawn()
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[2]), "shards of one call draw different noise"


def test_the_rule_resumes_from_the_state_of_its_generator(interpreted: Interpreted) -> None:
    interpreted(rule_goes_on_from_its_state)


@pytest.mark.parametrize("in_memory", [False, True], ids=["scalars as arguments", "scalars in memory"])
@pytest.mark.parametrize("squares", [True, False], ids=["squares", "no squares"])
def test_compiles_to_wide_loads_and_separate_roundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, squares: bool, in_memory: bool
) -> None:
    """Check compiled code: 16-byte loads and stores, no FMA, and shared memory only for the sum of squares."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lomo_ds.numerics import float_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    scalar = "*fp32" if in_memory else "fp32"
    types = {"weights": "*bf16", "directions": "*bf16", "factor": scalar, "decay": scalar, "limit": "constexpr"}
    types["squares"] = "*fp32" if squares else "constexpr"
    nothing = {"limit": None} if squares else {"limit": None, "squares": None}
    source = ASTSource(
        float_kernel._apply,
        signature=types | dict.fromkeys(("numel", "seed", "call"), "i64"),
        constexprs={"FACTOR_IN_MEMORY": in_memory, "DECAY_IN_MEMORY": in_memory, "STOCHASTIC": True, **nothing},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=float_kernel.OPTIONS)
    code = compiled.asm["ptx"]
    assert code.count("ld.global.v4.b32") == 2 * 8
    assert len(re.findall(r"ld\.global\.b32", code)) == (2 if in_memory else 0), "the scalars, once"
    assert code.count("st.global.v4.b32") == 8
    assert "fma." not in code
    assert compiled.metadata.shared == (16 if squares else 0), "a number for each warp"


def test_the_place_of_a_scalar_causes_no_other_compilation() -> None:
    """A launch looks up the compiled code without their alignment."""
    from lomo_ds.numerics import float_kernel

    kernel: Any = float_kernel._apply
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    assert unspecialized == {"factor", "decay", "squares"}
