"""Application of updates against torch.optim.SGD and against arithmetic in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_ds.numerics import flat
from lomo_ds.numerics.apply import Scalar, Update, apply
from lomo_ds.numerics.int8 import BLOCK, Values, quantize_flat, view_blocks
from lomo_ds.numerics.rounding_noise import PIECES, RoundingNoise
from lomo_ds.numerics.values import numel_of, read
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


FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
every_format = pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
LONG = 5 * BLOCK * 10 + 37  # five pieces of ten blocks, and a short one
PIECE = 10 * BLOCK + 3


def weights_of(dtype: torch.dtype, numel: int = LONG, number: int = 3) -> Values:
    (exact,) = randn([numel])
    return view_blocks(quantize_flat(exact), numel, number) if dtype == torch.int8 else exact.to(dtype)


def read_all(values: Values) -> Tensor:
    return read(values).clone()


@every_format
@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.25)], ids=["no scale", "float", "tensor"])
def test_a_direction_in_pieces_equals_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: Scalar
) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", PIECE)
    (direction,) = randn([LONG], seed=1)
    calls: list[tuple[int, int]] = []

    def piece(start: int, stop: int) -> Tensor:
        calls.append((start, stop))
        return direction[start:stop].clone()

    whole, pieces = weights_of(dtype), weights_of(dtype)
    apply([(whole, Update(direction.clone(), 0.1, 0.97, scale, limit=1.5))], None)
    apply([(pieces, Update(piece, 0.1, 0.97, scale, limit=1.5))], None)
    assert torch.equal(read_all(pieces), read_all(whole))
    assert not torch.equal(read_all(pieces), read_all(weights_of(dtype)))
    step = PIECE - PIECE % BLOCK
    assert calls == [(start, min(start + step, LONG)) for start in range(0, LONG, step)]


@every_format
def test_pieces_bound_the_temporaries(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", PIECE)
    weights = weights_of(dtype, 20_000)
    with Watch() as watch:
        apply([(weights, Update(lambda start, stop: torch.ones(stop - start), 0.1, 0.97))], None)
    assert 0 < watch.largest <= torch.float32.itemsize * PIECE


@pytest.mark.parametrize("scale", [1.0, 0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["1", "float", "tensor"])
@every_format
def test_tensor_scalars_equal_floats_within_one_rounding(dtype: torch.dtype, scale: Scalar) -> None:
    """Products in fp32 are rounded once more for tensors; the other formats compute them alike."""
    (direction,) = randn([LONG], seed=1)
    factor, decay = torch.tensor(0.037), torch.tensor(0.97)
    by_floats, by_tensors = weights_of(dtype), weights_of(dtype)
    apply([(by_floats, Update(direction.clone(), float(factor), float(decay), scale))], None)
    apply([(by_tensors, Update(direction.clone(), factor, decay, scale))], None)
    expected, actual = read_all(by_floats).double(), read_all(by_tensors).double()
    if dtype == torch.float32:
        steps = direction.double().abs() * float(factor) * float(scale)
        assert ((actual - expected).abs() <= 2.0**-23 * (steps + expected.abs())).all()
    else:
        assert torch.equal(actual, expected)
    assert (float(factor), float(decay)) == (float(torch.tensor(0.037)), float(torch.tensor(0.97))), "unchanged"


@every_format
def test_scalars_of_float64_are_read_as_numbers(dtype: torch.dtype) -> None:
    (direction,) = randn([LONG], seed=1)
    single, double = weights_of(dtype), weights_of(dtype)
    scalars = torch.tensor([0.125, 0.75])  # the same number in both
    for weights, (factor, decay) in ((single, scalars), (double, scalars.double())):
        apply([(weights, Update(direction.clone(), factor, decay))], None)
    assert torch.equal(read_all(single), read_all(double))


@every_format
def test_each_update_gets_its_own_scalars(dtype: torch.dtype) -> None:
    tensors = torch.tensor([0.02, 0.97, 0.5])
    arguments: list[tuple[Any, ...]] = [
        (0.1, 0.97), (0.2, 0.97), (0.1, 0.9), (0.1, 0.97, 0.5), (0.1, 0.97, 1.0, 0.01),
        (tensors[0], 0.97), (tensors[0] * 2, 0.97), (0.1, tensors[1]), (0.1, 0.97, tensors[2]), (0.1, 0.97),
    ]  # fmt: skip
    together = [weights_of(dtype, 500 + number, number) for number in range(len(arguments))]
    alone = [weights_of(dtype, 500 + number, number) for number in range(len(arguments))]
    directions = randn([numel_of(weights) for weights in together], seed=1)
    updates = [Update(direction.clone(), *given) for direction, given in zip(directions, arguments, strict=True)]
    apply(list(zip(together, updates, strict=True)), None)
    for weights, direction, given in zip(alone, directions, arguments, strict=True):
        apply([(weights, Update(direction.clone(), *given))], None)
    assert identical([read_all(weights) for weights in together], [read_all(weights) for weights in alone])


def test_updates_with_the_same_scalars_are_applied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[int]] = []

    def record(shards: list[Tensor], directions: list[Tensor], **scalars: Any) -> None:
        groups.append([shard.numel() for shard in shards])

    monkeypatch.setattr("lomo_ds.numerics.apply.update_single", record)
    scale = torch.tensor(0.5)
    scalars: list[tuple[Any, ...]] = [(0.1, 1.0), (0.2, 1.0), (0.1, 1.0), (0.1, 1.0, scale), (0.1, 0.9)]
    scalars += [(0.1, 1.0, scale), (0.1, 1.0, scale.clone())]
    updates = [Update(torch.zeros(numel), *given) for numel, given in enumerate(scalars)]
    apply([(torch.zeros(numel), update) for numel, update in enumerate(updates)], None)
    assert groups == [[0, 2], [1], [3, 5], [4], [6]]


def drawn_in_pieces(noise: RoundingNoise, dtype: torch.dtype, pieces: int) -> list[Tensor]:
    """Round the same values in every piece, and return the pieces."""
    step = PIECE - PIECE % BLOCK
    (exact,) = randn([step])
    values: Values = exact.repeat(pieces).to(torch.bfloat16)
    if dtype == torch.int8:
        values = view_blocks(quantize_flat(exact.repeat(pieces)), pieces * step, number=3)
    apply([(values, Update(lambda start, stop: exact.clone(), 1e-3))], noise)
    return list(read_all(values).split(step))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_pieces_draw_different_noise_that_resumes_from_a_saved_state(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", PIECE)
    noise = RoundingNoise(torch.Generator().manual_seed(5))
    before = drawn_in_pieces(noise, dtype, pieces=3)
    assert not any(torch.equal(before[one], before[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    state = noise.state()
    first, second = drawn_in_pieces(noise, dtype, pieces=3), drawn_in_pieces(noise, dtype, pieces=3)
    assert not any(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, before))
    if dtype == torch.int8:
        assert noise.calls == {3 + piece * PIECES: 3 for piece in range(3)}, "a sequence of its own for each piece"
    resumed = RoundingNoise(torch.Generator().manual_seed(5 if dtype == torch.int8 else 6))
    resumed.load_state(state)
    assert identical(drawn_in_pieces(resumed, dtype, pieces=3), first)


def test_pieces_of_one_tensor_share_no_noise_with_another() -> None:
    noise = RoundingNoise(torch.Generator().manual_seed(5))
    drawn = [noise.for_blocks(number, piece) for number in (0, 1, 2**20 - 1) for piece in (0, 1, 2)]
    assert len({(each.seed, each.shard) for each in drawn}) == len(drawn)
    assert all(each.step == 0 and 0 <= each.shard < 2**32 for each in drawn)
    assert noise.for_blocks(1, 2).step == 1


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@every_format
def test_the_host_never_reads_a_scalar(dtype: torch.dtype, in_pieces: bool) -> None:
    direction = randn([LONG], seed=1)[0]
    scalars = torch.tensor(0.1), torch.tensor(0.97), torch.tensor(0.5, dtype=torch.float64)
    update = Update((lambda start, stop: direction[start:stop]) if in_pieces else direction, *scalars)
    weights = weights_of(dtype)
    with Watch() as watch:
        apply([(weights, update)], None)
    assert not watch.host_reads
