"""Application of updates against torch.optim.SGD and against arithmetic in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lomo_ds.numerics import flat
from lomo_ds.numerics.rounding_noise import RoundingNoise
from tests.numerics.operations import Watch
from tests.updates import noise_of, sgd_step

HALF_DTYPES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF_DTYPES]
NUMELS = [1000, 1, 0, 37, 513]
COEFFICIENTS = [
    pytest.param(0.25, id="float"),
    pytest.param(torch.tensor(0.25, dtype=torch.float64), id="float64 tensor"),
    pytest.param(torch.tensor(0.25), id="float32 tensor"),
]


def randn(numels: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator).to(dtype) for numel in numels]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def identical(first: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, others, strict=True))


@pytest.mark.parametrize("coefficient", [1.0, torch.tensor(1.0, dtype=torch.float64)], ids=["float", "tensor"])
def test_equals_torch_sgd_bit_for_bit(coefficient: float | Tensor) -> None:
    weights, gradients = randn(NUMELS), randn(NUMELS, seed=1)
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.optim.SGD(parameters, lr=0.37).step()
    sgd_step(weights, gradients, coefficient, lr=0.37, weight_decay=0.0)
    assert identical(weights, [parameter.detach() for parameter in parameters])


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("gradient_dtype", DTYPES)
def test_weight_decay_is_decoupled(gradient_dtype: torch.dtype, coefficient: float | Tensor) -> None:
    weights, gradients = randn(NUMELS), randn(NUMELS, gradient_dtype, seed=1)
    exact = [w.double() * (1 - 0.1 * 0.5) - 0.1 * 0.25 * g.double() for w, g in zip(weights, gradients, strict=True)]
    sgd_step(weights, gradients, coefficient, lr=0.1, weight_decay=0.5)
    for weight, of_weight in zip(weights, exact, strict=True):
        torch.testing.assert_close(weight.double(), of_weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_is_one_rounding_of_fp32_arithmetic(
    dtype: torch.dtype, gradient_dtype: torch.dtype, coefficient: float | Tensor
) -> None:
    weights, gradients = randn(NUMELS, dtype), randn(NUMELS, gradient_dtype, seed=1)
    expected = []
    for weight, gradient in zip(weights, gradients, strict=True):
        # float64 holds products of fp32 numbers exactly, and its rounding of differences is negligible
        decayed = (weight.double() * float(torch.tensor(1 - 0.1 * 0.5))).float()
        step = (gradient.double() * float(torch.tensor(0.1 * 0.25))).float()
        expected.append((decayed.double() - step.double()).float().to(dtype))
    sgd_step(weights, gradients, coefficient, lr=0.1, weight_decay=0.5)
    assert identical(weights, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_updating_a_list_equals_updating_each_member(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", 600)  # some shards share a piece, others need several
    together, gradients = randn(NUMELS, dtype), randn(NUMELS, seed=1)
    alone = clones(together)
    for weight, gradient in zip(alone, clones(gradients), strict=True):
        sgd_step([weight], [gradient], coefficient=0.5, lr=0.1, weight_decay=0.1)
    sgd_step(together, gradients, coefficient=0.5, lr=0.1, weight_decay=0.1)
    assert identical(together, alone)


def test_a_list_of_mixed_dtypes() -> None:
    weights = [randn([100], dtype)[0] for dtype in DTYPES * 2]
    gradients = [randn([100], dtype, seed=1)[0] for dtype in [*DTYPES, *reversed(DTYPES)]]
    exact = [w.double() - 0.05 * g.double() for w, g in zip(weights, gradients, strict=True)]
    sgd_step(weights, gradients, coefficient=0.5, lr=0.1, weight_decay=0.0)
    for weight, of_weight, dtype in zip(weights, exact, DTYPES * 2, strict=True):
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.double(), of_weight, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_nothing_to_update() -> None:
    sgd_step([], [], coefficient=1.0, lr=0.1, weight_decay=0.1)
    for dtype in DTYPES:
        empty = [torch.zeros(0, dtype=dtype)]
        sgd_step(empty, clones(empty), coefficient=1.0, lr=0.1, weight_decay=0.1, noise=noise_of(torch.Generator()))


def test_stochastic_rounding_does_not_lose_small_updates() -> None:
    weights = torch.ones(10_000, dtype=torch.bfloat16)
    gradient = torch.full_like(weights, 1.0)
    nearest = weights.clone()
    noise = RoundingNoise(torch.Generator().manual_seed(0))
    for _ in range(100):
        sgd_step([weights], [gradient.clone()], coefficient=1.0, lr=1e-4, weight_decay=0.0, noise=noise)
        sgd_step([nearest], [gradient.clone()], coefficient=1.0, lr=1e-4, weight_decay=0.0)
    assert nearest.float().mean() == 1.0
    assert float(weights.float().mean()) == pytest.approx(0.99, abs=1e-3)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rounding_resumes_from_a_saved_state(dtype: torch.dtype) -> None:
    noise = RoundingNoise(torch.Generator().manual_seed(0))
    runs: list[list[Tensor]] = []
    state = noise.state()
    for _ in range(2):
        noise.load_state(state)
        runs.append(randn(NUMELS, dtype))
        sgd_step(runs[-1], randn(NUMELS, seed=1), coefficient=1.0, lr=1e-3, weight_decay=0.0, noise=noise)
    assert identical(*runs)
    other = randn(NUMELS, dtype)
    sgd_step(other, randn(NUMELS, seed=1), coefficient=1.0, lr=1e-3, weight_decay=0.0, noise=noise)
    assert not identical(other, runs[0])


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_inf_and_nan_propagate_to_the_weights(dtype: torch.dtype, generator: torch.Generator | None) -> None:
    weights, gradient = torch.zeros(4, dtype=dtype), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], dtype=dtype)
    sgd_step([weights], [gradient], coefficient=1.0, lr=1.0, weight_decay=0.1, noise=noise_of(generator))
    torch.testing.assert_close(weights.float(), torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize(("device", "numel"), [("cpu", 20_000_000), ("meta", 2**33)])
@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_exceeds_64_mib(
    dtype: torch.dtype, generator: torch.Generator | None, device: str, numel: int
) -> None:
    """Check temporaries; the meta device stands for a GPU, where pieces are larger, and allocates nothing."""
    weights = torch.zeros(numel, dtype=dtype, device=device)
    gradient = torch.zeros_like(weights, dtype=torch.bfloat16)
    coefficient = torch.tensor(0.5, dtype=torch.float64)
    with Watch() as watch:
        sgd_step([weights], [gradient], coefficient, lr=0.1, weight_decay=0.1, noise=noise_of(generator))
    assert 0 < watch.largest <= 64 * 2**20


def test_fp32_makes_no_temporary() -> None:
    weights, gradients = randn(NUMELS), randn(NUMELS, seed=1)
    with Watch() as watch:
        sgd_step(weights, gradients, coefficient=0.5, lr=0.1, weight_decay=0.1)
    assert watch.largest == 0
    assert watch.names == {"aten::_foreach_mul_.Scalar", "aten::_foreach_add_.List"}, "one call for all shards"


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_never_reads_a_value(dtype: torch.dtype, generator: torch.Generator | None) -> None:
    weights, gradients = randn(NUMELS, dtype), randn(NUMELS, dtype, seed=1)
    with Watch() as watch:
        coefficient = torch.tensor(0.5, dtype=torch.float64)
        sgd_step(weights, gradients, coefficient, lr=0.1, weight_decay=0.1, noise=noise_of(generator))
    assert not watch.host_reads
