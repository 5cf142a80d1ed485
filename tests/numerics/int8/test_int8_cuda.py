"""Eight-bit weights on a GPU: the bits of the same arithmetic on the CPU, and a host that never waits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lomo_ds.numerics.int8 import eager as int8
from lomo_ds.numerics.int8.eager import BLOCK, Noise
from tests.numerics.int8.test_training import train_in_eight_bits
from tests.ranks import Ranks

pytestmark = pytest.mark.cuda
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMELS = [1, BLOCK, 8192, 8192 + 5 * BLOCK + 37, 3_000_001]


def randn(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_codes_and_what_they_decode_to_equal_the_cpu_bit_for_bit(numel: int, dtype: torch.dtype) -> None:
    int8_kernel = pytest.importorskip("lomo_ds.numerics.int8.kernel")
    values = randn(numel).to(dtype)
    expected, actual = int8.encode(values), int8.encode(values.cuda())
    assert_same(actual, expected)
    assert_same(int8_kernel.encode(values.cuda()), expected)
    by_kernel = torch.empty(numel, dtype=dtype, device="cuda")
    int8_kernel.decode(*actual, by_kernel)
    decoded = int8.decode(*expected, dtype)
    assert_same((by_kernel, int8.decode(*actual, dtype)), (decoded, decoded))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_an_update_equals_the_cpu_bit_for_bit(numel: int, dtype: torch.dtype) -> None:
    int8_kernel = pytest.importorskip("lomo_ds.numerics.int8.kernel")
    expected = int8.encode(randn(numel))
    codes, scales = expected
    eager, by_kernel = ((codes.cuda(), scales.cuda()) for _ in range(2))
    gradient = randn(numel, seed=1).to(dtype)
    int8.update_(*expected, gradient, 0.2, 0.97, None)
    int8.update_(*eager, gradient.cuda(), torch.tensor(0.2, device="cuda"), 0.97, None)
    int8_kernel.update(*by_kernel, gradient.cuda(), 0.2, 0.97, None)
    assert_same(eager, expected)
    assert_same(by_kernel, expected)


def test_the_host_waits_for_nothing() -> None:
    int8_kernel = pytest.importorskip("lomo_ds.numerics.int8.kernel")
    values, gradient = randn(100_003).cuda(), randn(100_003, seed=1).cuda()
    factor, out = torch.tensor(0.2, device="cuda"), torch.empty_like(values)
    int8_kernel.update(*int8.encode(values), gradient, factor, 0.97, Noise(0, 0, 0))  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        codes, scales = int8.encode(values)
        int8.update_(codes, scales, gradient, factor, 0.97, Noise(0, 0, 0))
        int8_kernel.update(codes, scales, gradient, factor, 0.97, Noise(0, 0, 1))
        int8.decode(codes, scales, torch.float32, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("schedule", ["immediate", "stash"])
def test_training_equals_plain_pytorch(ranks: Callable[..., Ranks], schedule: str, offload: str) -> None:
    assert max(ranks(1, "cuda").run(train_in_eight_bits, schedule, offload, "layer")) < 0.05
