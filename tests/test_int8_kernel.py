"""The Triton kernels without a GPU: what they compute, by Triton's interpreter, and what they compile to."""

import math
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds import int8
from lomo_ds.int8 import BLOCK
from tests.rules import philox

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMELS = [0, 1, BLOCK, BLOCK + 1, 8192, 8192 + 5 * BLOCK + 37]  # 8192 are a program's
Interpreted = Callable[..., None]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    """Runs a function where kernels run on the CPU: in a process of its own, for triton asks when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        process.submit(torch.set_num_threads, 1).result()
    yield lambda function, *arguments: process.submit(function, *arguments).result()
    process.shutdown()


def randn(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def updated(
    codes: Tensor, scales: Tensor, gradient: Tensor, factor: float | Tensor, decay: float, noise: Any = None
) -> tuple[Tensor, Tensor]:
    from lomo_ds import int8_kernel

    written = codes.clone(), scales.clone()
    int8_kernel.update(*written, gradient, factor, decay, noise)
    return written


def decodes_as_eager(dtype: torch.dtype) -> None:
    from lomo_ds import int8_kernel

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


def updates_as_eager(dtype: torch.dtype, factor: float | Tensor) -> None:
    for numel in NUMELS:
        weights = randn(numel).mul(torch.linspace(-7, 7, numel).exp())
        expected = int8.encode(weights)
        gradient = (randn(numel, seed=1) * weights).to(dtype)
        found = updated(*expected, gradient, factor, decay=0.97)
        int8.update_(*expected, gradient, factor, 0.97, None)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("factor", [-0.2, torch.tensor(-0.2), 0.9], ids=["grows", "tensor", "shrinks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_equals_eager_bit_for_bit(interpreted: Interpreted, dtype: torch.dtype, factor: float | Tensor) -> None:
    interpreted(updates_as_eager, dtype, factor)


def equals_reference(seed: int, call: int) -> None:
    for numel in NUMELS[1:]:
        codes, scales = int8.encode(randn(numel))
        gradient = randn(numel, seed=1)
        exact = int8.decode(codes, scales, torch.float32) * 0.97 - gradient * 0.037
        found = updated(codes, scales, gradient, 0.037, 0.97, (seed, call))
        multiples = exact / found[1].float().repeat_interleave(BLOCK)[:numel]
        noise = (philox.noise(numel, seed, call).float() + 0.5) / 2**16
        assert torch.equal(found[0], (multiples + noise).floor().clamp(-127, 127).to(torch.int8))
        int8.update_(codes, scales, gradient, 0.037, 0.97, torch.Generator())
        assert torch.equal(found[1], scales), "of eager mode too: scales are not drawn"


@pytest.mark.parametrize(("seed", "call"), [(0, 0), (42, 2**31), (2**32 + 5, 2**33 + 1), (2**64 - 1, 2**62 - 1)])
def test_stochastic_rounding_adds_philox(interpreted: Interpreted, seed: int, call: int) -> None:
    interpreted(equals_reference, seed, call)


def keeps_what_has_not_changed() -> None:
    for numel in NUMELS:
        codes, scales = int8.encode(randn(numel))
        found = updated(codes, scales, torch.zeros(numel), 1.0, 1.0, (3, 4))
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], scales)


def test_what_has_not_changed_keeps_its_code(interpreted: Interpreted) -> None:
    interpreted(keeps_what_has_not_changed)


def is_unbiased() -> None:
    numel = 64 * BLOCK
    codes, scales = int8.encode(torch.full((numel,), 127.0))
    gradient = torch.full((numel,), -0.3)
    gradient[::BLOCK] = 0.0  # 127 keeps the scale of 1
    codes[gradient != 0] = -5
    drawn = updated(codes, scales, gradient, 1.0, 1.0, (7, 0))[0][gradient != 0].double()
    assert set(drawn.tolist()) == {-5.0, -4.0}
    assert abs(float(drawn.mean()) + 4.7) < 4 * math.sqrt(0.3 * 0.7 / drawn.numel())


def test_stochastic_rounding_is_unbiased(interpreted: Interpreted) -> None:
    interpreted(is_unbiased)


def shows_what_is_not_finite(noise: tuple[int, int] | None) -> None:
    every_bit = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # a GPU's nan
    for bad in (math.inf, -math.inf, math.nan, every_bit, -every_bit):
        codes, scales = int8.encode(randn(3 * BLOCK))
        gradient = torch.zeros(3 * BLOCK)
        gradient[BLOCK + 5] = bad
        found = updated(codes, scales, gradient, 1.0, 1.0, noise)
        assert found[1].isnan().tolist() == [False, True, False]
        assert not found[0][BLOCK : 2 * BLOCK].any()
        again = updated(*found, torch.zeros(3 * BLOCK), 1.0, 1.0, noise)
        assert again[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("noise", [None, (0, 0)], ids=["nearest", "stochastic"])
def test_a_block_that_is_not_finite_is_nan(interpreted: Interpreted, noise: tuple[int, int] | None) -> None:
    interpreted(shows_what_is_not_finite, noise)


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, bool]) -> str:
    """Its PTX; a compiler needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lomo_ds import int8_kernel

    attributes = {(place,): [["tt.divisibility", 16]] for place in range(3)}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=int8_kernel.OPTIONS).asm["ptx"]


def test_decoding_compiles_to_wide_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lomo_ds import int8_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"codes": "*i8", "scales": "*bf16", "out": "*bf16", "numel": "i64"}
    code = compiled(int8_kernel._decode, signature, {})
    assert code.count("ld.global.v2.b32") == 8, "8 codes"
    assert code.count("st.global.v4.b32") == 8, "8 values of bfloat16"
    assert "shared" not in code


def test_updating_compiles_to_wide_loads_and_separate_roundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lomo_ds import int8_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"codes": "*i8", "scales": "*bf16", "gradients": "*bf16", "factor": "*fp32", "decay": "fp32"}
    signature = pointers | dict.fromkeys(("numel", "seed", "call"), "i64")
    code = compiled(int8_kernel._update, signature, {"FACTOR_IN_MEMORY": True, "STOCHASTIC": True})
    assert code.count("ld.global.v2.b32") == code.count("st.global.v2.b32") == 8, "8 codes"
    assert code.count("ld.global.v4.b32") == 8, "8 gradients of bfloat16"
    assert "fma." not in code
    assert set(re.findall(r"div\.[.\w]*", code)) == {"div.rn.f32"}, "correctly rounded, as in eager mode"
