"""The Triton kernels without a GPU: what they compute, by Triton's interpreter, and what they compile to."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lomo_ds.numerics.apply import Scalar
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.numerics.int8 import blocks as int8_blocks
from lomo_ds.numerics.int8 import eager as int8
from lomo_ds.numerics.int8.eager import BLOCK, Noise
from tests.numerics import philox

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMELS = [0, BLOCK + 1, 8192, 8192 + 5 * BLOCK + 37]  # 8192 are a program's
Interpreted = Callable[..., None]


def randn(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def updated(
    codes: Tensor, scales: Tensor, gradient: Tensor, factor: Scalar, decay: Scalar, noise: Noise | None = None
) -> tuple[Tensor, Tensor]:
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    written = codes.clone(), scales.clone()
    int8_kernel.update(*written, gradient, factor, decay, noise)
    return written


def encodes_as_eager(dtype: torch.dtype) -> None:
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    for numel in NUMELS:
        values = randn(numel).mul(torch.linspace(-9, 9, numel).exp()).to(dtype)
        values[5 * BLOCK : 6 * BLOCK] = 0.0
        for bad, place in ((math.inf, 1), (-math.inf, 2), (math.nan, 4)):
            values[place * BLOCK + 7 : place * BLOCK + 8] = bad
        actual, expected = int8_kernel.encode(values), int8.encode(values)
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_equals_eager_bit_for_bit(interpreted: Interpreted, dtype: torch.dtype) -> None:
    interpreted(encodes_as_eager, dtype)


def decodes_as_eager(dtype: torch.dtype) -> None:
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    for numel in NUMELS:
        codes, scales = int8.encode(randn(numel))
        scales[1:2] = math.nan
        memory = torch.full((numel + 20,), 7.0, dtype=dtype)
        int8_kernel.decode(codes, scales, memory[10:-10])
        expected = int8.decode(codes, scales, dtype)
        torch.testing.assert_close(memory[10:-10], expected, rtol=0, atol=0, equal_nan=True)
        assert (memory[:10] == 7).all()
        assert (memory[-10:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_equals_eager_bit_for_bit(interpreted: Interpreted, dtype: torch.dtype) -> None:
    interpreted(decodes_as_eager, dtype)


def decodes_rows_as_eager(dtype: torch.dtype) -> None:
    """Buffers of several ranks, with what belongs to other parameters between them."""
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    for numel in NUMELS:
        start = int8_blocks.ALIGNMENT * 3
        gathered = torch.full((3, start + int8_blocks.quantized_bytes(numel) + 32), 7, dtype=torch.int8)
        packed = gathered[:, start : start + int8_blocks.quantized_bytes(numel)]
        for rank, buffer in enumerate(packed):
            int8_blocks.quantize_into(buffer, randn(numel, seed=rank))
        codes, scales, _ = int8_blocks.view_blocks(packed, numel)
        memory = torch.full((3 * numel + 20,), 7.0, dtype=dtype)
        int8_kernel.decode(codes, scales, memory[10:-10].view(3, numel))
        alone = [int8.decode(codes[rank], scales[rank], dtype) for rank in range(3)]
        assert torch.equal(memory[10:-10], torch.cat(alone))
        assert (memory[:10] == 7).all()
        assert (memory[-10:] == 7).all()
        on_cpu = torch.empty(3, numel, dtype=dtype)
        int8_blocks.dequantize(int8_blocks.view_blocks(packed, numel), on_cpu)
        assert torch.equal(on_cpu.view(-1), torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_buffers_of_all_ranks_are_decoded_at_once(interpreted: Interpreted, dtype: torch.dtype) -> None:
    interpreted(decodes_rows_as_eager, dtype)


def updates_as_eager(dtype: torch.dtype, factor: Scalar, decay: Scalar) -> None:
    for numel in NUMELS:
        weights = randn(numel).mul(torch.linspace(-7, 7, numel).exp())
        expected = int8.encode(weights)
        gradient = (randn(numel, seed=1) * weights).to(dtype)
        actual = updated(*expected, gradient, factor, decay)
        int8.update_(*expected, gradient, factor, decay, None)
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("decay", [0.97, torch.tensor(0.97)], ids=["float decay", "tensor decay"])
@pytest.mark.parametrize(
    ("dtype", "factor"), zip(DTYPES, [torch.tensor(-0.2), 0.9, -0.2], strict=True), ids=["tensor", "shrinks", "grows"]
)
def test_nearest_equals_eager_bit_for_bit(
    interpreted: Interpreted, dtype: torch.dtype, factor: Scalar, decay: Scalar
) -> None:
    interpreted(updates_as_eager, dtype, factor, decay)


def scalars_in_memory_draw_the_same_noise(noise: Noise | None) -> None:
    for numel in NUMELS:
        weights, gradient = int8.encode(randn(numel)), randn(numel, seed=1)
        expected = updated(*weights, gradient, 0.037, 0.97, noise)
        memory = torch.tensor([7.0, 0.97, 0.037])  # views that 16 bytes do not divide
        for factor, decay in ((memory[2], memory[1]), (0.037, memory[1]), (memory[2], 0.97)):
            assert all(map(torch.equal, updated(*weights, gradient, factor, decay, noise), expected))


@pytest.mark.parametrize("noise", [None, Noise(3, 4, 5)], ids=["nearest", "stochastic"])
def test_scalars_in_memory_draw_the_same_noise(interpreted: Interpreted, noise: Noise | None) -> None:
    interpreted(scalars_in_memory_draw_the_same_noise, noise)


def leaves_sums_of_squares(dtype: torch.dtype) -> None:
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    for numel in NUMELS[1:]:
        codes, scales = int8.encode(randn(numel))
        gradient = randn(numel, seed=1).to(dtype)
        for limit in (None, 0.1):
            actual, buffer = (codes.clone(), scales.clone()), torch.full((ceil_div(numel, 8192) + 2,), -1.0)
            int8_kernel.update(*actual, gradient, 0.037, 0.97, None, limit, buffer[1:-1])
            exact = [(part.double().numpy() ** 2).sum() for part in gradient.split(8192)]
            np.testing.assert_allclose(buffer[1:-1].numpy(), exact, rtol=1e-6)
            assert buffer[0] == buffer[-1] == -1
            clamped = gradient if limit is None else gradient.clamp(-limit, limit)
            assert all(map(torch.equal, actual, updated(codes, scales, clamped, 0.037, 0.97)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_leaves_sums_of_squares_and_clamps(interpreted: Interpreted, dtype: torch.dtype) -> None:
    interpreted(leaves_sums_of_squares, dtype)


def reference_noise(numel: int, noise: Noise) -> Tensor:
    """Philox over (lane, 256 steps, shard, a constant): half a word for each of a lane's 8 elements, then Weyl."""
    programs = ceil_div(numel, 8192)
    lanes = np.arange(programs * 1024, dtype=np.uint64)
    rest = [np.full_like(lanes, word) for word in (noise.step // 256, noise.shard, int.from_bytes(b"int8"))]
    words = philox.philox([lanes, *rest], noise.seed, rounds=7)
    halves = np.stack([half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))])
    began = halves.reshape(8, programs, 1024).swapaxes(0, 1).reshape(-1)[:numel].astype(np.int64)
    return torch.from_numpy(((began + noise.step * 40503) % 2**16 + 0.5) / 2**16).float()


def equals_reference(noise: Noise) -> None:
    for numel in NUMELS[1:]:
        codes, scales = int8.encode(randn(numel))
        gradient = randn(numel, seed=1)
        exact = int8.decode(codes, scales, torch.float32) * 0.97 - gradient * 0.037
        actual = updated(codes, scales, gradient, 0.037, 0.97, noise)
        multiples = exact / actual[1].float().repeat_interleave(BLOCK)[:numel]
        expected = (multiples + reference_noise(numel, noise)).floor().clamp(-127, 127)
        assert torch.equal(actual[0], expected.to(torch.int8))
        int8.update_(codes, scales, gradient, 0.037, 0.97, noise)
        assert torch.equal(actual[1], scales), "of eager mode too: scales are not drawn"


@pytest.mark.parametrize(
    "noise", [Noise(0, 0, 0), Noise(42, 1, 255), Noise(2**32 + 5, 2**32 - 1, 1000), Noise(2**64 - 1, 7, 2**31)]
)
def test_stochastic_rounding_adds_philox_and_weyl(interpreted: Interpreted, noise: Noise) -> None:
    interpreted(equals_reference, noise)


def keeps_what_has_not_changed() -> None:
    for numel in NUMELS:
        codes, scales = int8.encode(randn(numel))
        actual = updated(codes, scales, torch.zeros(numel), 1.0, 1.0, Noise(3, 4, 5))
        assert torch.equal(actual[0], codes)
        assert torch.equal(actual[1], scales)


def test_what_has_not_changed_keeps_its_code(interpreted: Interpreted) -> None:
    interpreted(keeps_what_has_not_changed)


def is_unbiased() -> None:
    numel = 64 * BLOCK
    codes, scales = int8.encode(torch.full((numel,), 127.0))
    gradient = torch.full((numel,), -0.3)
    gradient[::BLOCK] = 0.0  # 127 keeps the scale of 1
    codes[gradient != 0] = -5
    drawn = updated(codes, scales, gradient, 1.0, 1.0, Noise(7, 0, 3))[0][gradient != 0].double()
    assert set(drawn.tolist()) == {-5.0, -4.0}
    assert abs(float(drawn.mean()) + 4.7) < 4 * math.sqrt(0.3 * 0.7 / drawn.numel())


def test_stochastic_rounding_is_unbiased(interpreted: Interpreted) -> None:
    interpreted(is_unbiased)


def shows_what_is_not_finite(noise: Noise | None) -> None:
    every_bit = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # a GPU's nan
    for bad in (math.inf, -math.inf, math.nan, every_bit, -every_bit):
        codes, scales = int8.encode(randn(3 * BLOCK))
        gradient = torch.zeros(3 * BLOCK)
        gradient[BLOCK + 5] = bad
        actual = updated(codes, scales, gradient, 1.0, 1.0, noise)
        assert actual[1].isnan().tolist() == [False, True, False]
        assert not actual[0][BLOCK : 2 * BLOCK].any()
        again = updated(*actual, torch.zeros(3 * BLOCK), 1.0, 1.0, noise)
        assert again[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("noise", [None, Noise(0, 0, 0)], ids=["nearest", "stochastic"])
def test_a_block_that_is_not_finite_is_nan(interpreted: Interpreted, noise: Noise | None) -> None:
    interpreted(shows_what_is_not_finite, noise)


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, bool | None]) -> str:
    """Return the PTX of a kernel, which a compiler produces without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lomo_ds.numerics.int8 import kernel as int8_kernel

    aligned = [place for place, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or "apart" in name]
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=int8_kernel.OPTIONS).asm["ptx"]


def test_decoding_compiles_to_wide_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"codes": "*i8", "scales": "*bf16", "out": "*bf16", "numel": "i64"}
    signature |= dict.fromkeys(("codes_apart", "scales_apart", "out_apart"), "i64")
    code = compiled(int8_kernel._decode, signature, {})
    assert code.count("ld.global.v2.b32") == 8, "8 codes"
    assert code.count("st.global.v4.b32") == 8, "8 values of bfloat16"
    assert "shared" not in code


def test_encoding_compiles_to_wide_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"values": "*bf16", "codes": "*i8", "scales": "*bf16", "numel": "i64"}
    code = compiled(int8_kernel._encode, signature, {})
    assert code.count("ld.global.v4.b32") == 8, "8 values of bfloat16"
    assert code.count("st.global.v2.b32") == 8, "8 codes"
    assert set(re.findall(r"div\.[.\w]*", code)) == {"div.rn.f32"}, "correctly rounded, as in eager mode"


@pytest.mark.parametrize("decay_in_memory", [False, True], ids=["decay as argument", "decay in memory"])
def test_updating_compiles_to_wide_loads_and_separate_roundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decay_in_memory: bool
) -> None:
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"codes": "*i8", "scales": "*bf16", "directions": "*bf16", "factor": "*fp32"}
    pointers |= {"decay": "*fp32" if decay_in_memory else "fp32", "limit": "constexpr", "squares": "*fp32"}
    signature = pointers | dict.fromkeys(("numel", "seed", "shard", "window", "shift"), "i64")
    constants = {"FACTOR_IN_MEMORY": True, "DECAY_IN_MEMORY": decay_in_memory, "STOCHASTIC": True, "limit": None}
    code = compiled(int8_kernel._update, signature, constants)
    assert code.count("ld.global.v2.b32") == code.count("st.global.v2.b32") == 8, "8 codes"
    assert code.count("ld.global.v4.b32") == 8, "8 gradients of bfloat16"
    elements, programs = 64, 2  # of a thread; with masks and without
    assert code.count("fma.") == code.count("fma.rn.f32") == 2 * elements * programs, "two for a quotient, and no other"
    assert set(re.findall(r"div\.[.\w]*", code)) == {"div.rn.f32"}, "correctly rounded, as in eager mode"


def test_the_place_of_a_scalar_causes_no_other_compilation() -> None:
    """A launch looks up the compiled code without their alignment."""
    from lomo_ds.numerics.int8 import kernel as int8_kernel

    kernel: Any = int8_kernel._update
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    assert unspecialized == {"factor", "decay", "squares"}


def test_a_quotient_by_the_reciprocal_of_a_scale_is_mended_to_the_correctly_rounded_one() -> None:
    """The kernel's arithmetic, its fused operations in float64, which holds what they round; every 61st mantissa."""
    values = (np.arange(0, 2**23, 61, dtype=np.uint32) | 0x3F800000).view(np.float32)
    differing = 0
    for mantissa in range(128):
        scale = np.uint32((0x3F80 | mantissa) << 16).view(np.float32)
        inverse = np.float32(1) / scale
        quotient = values * inverse
        rest = np.float32(values.astype(np.float64) - quotient.astype(np.float64) * np.float64(scale))
        mended = np.float32(quotient.astype(np.float64) + rest.astype(np.float64) * np.float64(inverse))
        assert (mended == values / scale).all()
        differing += int((quotient != mended).sum())
    assert differing > 0, "else there is nothing to mend"
