"""Application of updates on a GPU: bit-equal to the CPU, with resumable noise, and without host synchronization."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from lomo_ds.numerics.apply import Update, allocate_square_sums, apply, kernel_for
from lomo_ds.numerics.int8 import Values, quantize_flat, view_blocks
from lomo_ds.numerics.rounding_noise import RoundingNoise
from lomo_ds.numerics.values import read
from tests.numerics import philox
from tests.updates import noise_of, sgd_step

pytestmark = pytest.mark.cuda
HALF_DTYPES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF_DTYPES]
NUMELS = [1, 1000, 8192, 100_003, 0, 4096 * 1024]
COEFFICIENTS = [0.5, torch.tensor(0.5, dtype=torch.float64)]


def randn(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator).to(dtype) for numel in NUMELS]


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise on every host synchronization."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernel_is_used() -> None:
    pytest.importorskip("triton")
    assert kernel_for(torch.device("cuda", 0)) is not None


@pytest.mark.parametrize("coefficient", COEFFICIENTS, ids=["float", "tensor"])
@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_equals_the_cpu_bit_for_bit(
    dtype: torch.dtype, gradient_dtype: torch.dtype, coefficient: float | Tensor
) -> None:
    expected, gradients = randn(dtype), randn(gradient_dtype, seed=1)
    shards, there = on_gpu(expected), on_gpu(gradients)
    coefficient_there = coefficient.cuda() if isinstance(coefficient, Tensor) else coefficient
    sgd_step(expected, gradients, coefficient, lr=0.1, weight_decay=0.1)
    sgd_step(on_gpu(randn(dtype)), on_gpu(randn(gradient_dtype)), coefficient_there, 0.1, 0.1)  # compiles
    with no_waiting():
        sgd_step(shards, there, coefficient_there, lr=0.1, weight_decay=0.1)
    torch.cuda.synchronize()
    assert_same(shards, expected)


@pytest.mark.parametrize("coefficient", COEFFICIENTS, ids=["float", "tensor"])
@pytest.mark.parametrize("gradient_dtype", DTYPES)
def test_fp32_equals_float64_arithmetic(gradient_dtype: torch.dtype, coefficient: float | Tensor) -> None:
    weights, gradients = randn(torch.float32), randn(gradient_dtype, seed=1)
    shards, there = on_gpu(weights), on_gpu(gradients)
    with no_waiting():
        sgd_step(shards, there, coefficient, lr=0.1, weight_decay=0.1)
    torch.cuda.synchronize()
    for shard, weight, gradient in zip(shards, weights, gradients, strict=True):
        exact = weight.double() * 0.99 - 0.05 * gradient.double()
        torch.testing.assert_close(shard.cpu().double(), exact, rtol=1e-6, atol=1e-7)


def updated_by_scalars(dtype: torch.dtype, device: str, in_pieces: bool, watched: bool = False) -> Tensor:
    """Apply an update with all scalars in device memory, and return the weights in host memory."""
    exact, direction = (values.to(device) for values in (randn(torch.float32)[3], randn(torch.float32, seed=1)[3]))
    weights: Values = exact.to(dtype) if dtype.is_floating_point else view_blocks(quantize_flat(exact), exact.numel())
    factor, decay, scale = (torch.tensor(value, device=device) for value in (0.037, 0.97, 0.5))
    by_piece = (lambda start, stop: direction[start:stop]) if in_pieces else direction
    with no_waiting() if watched else nullcontext():
        apply([(weights, Update(by_piece, factor, decay, scale))], None)
    return read(weights).cpu()


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_scalars_in_device_memory_equal_those_of_the_cpu(dtype: torch.dtype, in_pieces: bool) -> None:
    updated_by_scalars(dtype, "cuda", in_pieces)  # compiles
    actual, expected = updated_by_scalars(dtype, "cuda", in_pieces, True), updated_by_scalars(dtype, "cpu", in_pieces)
    if dtype == torch.float32:  # may fuse the multiplication with the addition
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(actual, expected)


def test_fp32_equals_torch_sgd_bit_for_bit() -> None:
    shards, gradients = on_gpu(randn(torch.float32)), on_gpu(randn(torch.float32, seed=1))
    parameters = [torch.nn.Parameter(shard.clone()) for shard in shards]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.optim.SGD(parameters, lr=0.37).step()
    sgd_step(shards, gradients, coefficient=1.0, lr=0.37, weight_decay=0.0)
    assert_same(shards, [parameter.detach() for parameter in parameters])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_stochastic_rounding_adds_philox(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    shard = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradient = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    exact = shard.float() - gradient * torch.tensor(1e-3)
    actual, noise = shard.cuda(), RoundingNoise(generator(seed=5))
    sgd_step([actual], [gradient.cuda()], coefficient=1.0, lr=1e-3, weight_decay=0.0, noise=noise)
    expected = philox.rounded(exact, dtype, philox.noise(shard.numel(), seed=5, call=0))
    normal = exact.abs() > 2.0**-14  # below it the spacing of float16 differs
    assert torch.equal(actual.cpu()[normal], expected[normal])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rounding_resumes_from_a_saved_state(dtype: torch.dtype) -> None:
    noise = RoundingNoise(generator())

    def drawn() -> list[Tensor]:
        shards = on_gpu(randn(dtype))
        sgd_step(shards, on_gpu(randn(dtype, seed=1)), coefficient=1.0, lr=1e-3, weight_decay=0.0, noise=noise)
        torch.cuda.synchronize()
        return shards

    drawn()
    with no_waiting():
        state = noise.state()
    first, second = drawn(), drawn()
    noise.load_state(state)
    assert_same(drawn(), first)
    assert not torch.equal(first[-1], second[-1])
    other = RoundingNoise(generator(seed=6))
    other.load_state(state)
    noise = other
    assert_same(drawn(), first)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_a_shard_that_is_not_aligned(dtype: torch.dtype) -> None:
    """Check a shard and a gradient that do not start at a multiple of 16 bytes."""
    weights, gradient = randn(dtype)[-1], randn(dtype, seed=1)[-1]
    expected = weights[3:-2].clone()
    sgd_step([expected], [gradient[1:-4].clone()], coefficient=1.0, lr=0.1, weight_decay=0.1)
    actual = weights.cuda()
    sgd_step([actual[3:-2]], [gradient.cuda()[1:-4]], coefficient=1.0, lr=0.1, weight_decay=0.1)
    assert_same([actual[3:-2], actual[:3], actual[-2:]], [expected, weights[:3], weights[-2:]])


def test_a_shard_of_more_than_2_to_the_31_elements() -> None:
    numel = 2**31 + 8192 + 5
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip(f"needs {5 * numel / 2**30:.0f} GiB of free GPU memory")
    shard = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    gradient = torch.zeros_like(shard)
    gradient[-3:] = 1.0
    sgd_step([shard], [gradient], coefficient=1.0, lr=0.5, weight_decay=0.0, noise=noise_of(generator()))
    assert shard[-5:].tolist() == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert bool((shard[: 2**20] == 1).all())


def test_updates_without_triton_are_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernel, gradients = on_gpu(randn(torch.bfloat16)), on_gpu(randn(torch.bfloat16, seed=1))
    eager = [shard.clone() for shard in by_kernel]
    sgd_step(by_kernel, gradients, coefficient=0.5, lr=0.1, weight_decay=0.1)
    monkeypatch.setattr("lomo_ds.numerics.apply.kernel_for", lambda device: None)
    sgd_step(eager, gradients, coefficient=0.5, lr=0.1, weight_decay=0.1)
    assert_same(eager, by_kernel)
    sgd_step(eager, gradients, coefficient=0.5, lr=0.1, weight_decay=0.1, noise=noise_of(generator()))


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_an_update_computes_the_norm_of_its_gradients(dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    noise, gradients = RoundingNoise(generator()), on_gpu(randn(gradient_dtype, seed=1))
    squares = allocate_square_sums(NUMELS, torch.device("cuda", 0))
    assert squares is not None
    exact = sum(float(gradient.double().square().sum()) for gradient in gradients)
    totals = []
    for _ in range(2):
        squares.clear()
        shards = on_gpu(randn(dtype))
        sgd_step(shards, gradients, 0.5, 0.1, 0.0, 0.3, squares, noise)  # clamped after the measurement
        totals.append(squares.total())
    assert float(totals[0].sqrt()) == pytest.approx(exact**0.5, rel=1e-6)
    assert torch.equal(*totals), "bit for bit"


def test_fp32_with_squares_equals_torch_sgd_bit_for_bit() -> None:
    actual, expected = on_gpu(randn(torch.float32)), on_gpu(randn(torch.float32))
    gradients = on_gpu(randn(torch.float32, seed=1))
    sgd_step(expected, gradients, coefficient=1.0, lr=0.37, weight_decay=0.1)
    squares = allocate_square_sums(NUMELS, torch.device("cuda", 0))
    sgd_step(actual, gradients, coefficient=1.0, lr=0.37, weight_decay=0.1, squares=squares)
    assert_same(actual, expected)
