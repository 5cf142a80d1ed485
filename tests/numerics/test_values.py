"""Reading of weights in every format, against torch's own conversion, and the memory that it takes."""

import pytest
import torch
from torch import Tensor

from lomo_ds.numerics import flat, int8
from lomo_ds.numerics.int8 import Values
from lomo_ds.numerics.values import device_of, numel_of, part_of, piece_numel, read, squared_norm
from tests.numerics.operations import Watch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
NUMELS = [0, 1, int8.BLOCK, 5 * int8.BLOCK + 7]

every_format = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def values_of(dtype: torch.dtype, numel: int) -> Values:
    """Return random weights with magnitudes that differ from block to block."""
    exact = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4.0, numel)
    return int8.view_blocks(int8.quantize_flat(exact), numel, number=7) if dtype == torch.int8 else exact.to(dtype)


def exactly(values: Values) -> Tensor:
    """Return the weights in float64: a code times the scale of its block, or torch's own conversion."""
    if isinstance(values, Tensor):
        return values.double()
    return values.codes.double() * values.scales.double().repeat_interleave(int8.BLOCK)[: values.codes.numel()]


@every_format
@pytest.mark.parametrize("numel", NUMELS)
def test_reading_is_exact(dtype: torch.dtype, numel: int) -> None:
    values = values_of(dtype, numel)
    before = exactly(values)
    weights = read(values)
    assert weights.dtype == torch.float32
    assert torch.equal(weights.double(), before)
    assert numel_of(values) == numel
    assert device_of(values) == torch.device("cpu")


def test_fp32_is_read_without_a_copy() -> None:
    weights = torch.ones(5)
    assert read(weights) is weights


@every_format
def test_reading_leaves_half_precision_and_eight_bits_unchanged(dtype: torch.dtype) -> None:
    values = values_of(dtype, 200)
    before = exactly(values)
    if dtype != torch.float32:
        read(values).zero_()
    squared_norm(values)
    assert torch.equal(exactly(values), before)


@every_format
@pytest.mark.parametrize(("start", "stop"), [(0, 327), (64, 192), (128, 130), (320, 327), (64, 64)])
def test_a_part_is_a_view_of_the_weights(dtype: torch.dtype, start: int, stop: int) -> None:
    values = values_of(dtype, 327)
    before, part = exactly(values), part_of(values, start, stop)
    assert torch.equal(exactly(part), before[start:stop])
    if isinstance(part, Tensor):
        part.zero_()
    else:
        assert part.number == 7
        part.codes.zero_()
    before[start:stop] = 0.0
    assert torch.equal(exactly(values), before)


def test_a_part_of_eight_bit_weights_begins_with_a_block() -> None:
    with pytest.raises(AssertionError):
        part_of(values_of(torch.int8, 200), 63, 128)


@every_format
@pytest.mark.parametrize("piece", [64, 200, 2**18], ids=["a block a piece", "odd pieces", "one piece"])
@pytest.mark.parametrize("numel", NUMELS)
def test_the_squared_norm_is_that_of_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int, numel: int
) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", piece)
    values = values_of(dtype, numel)
    total = squared_norm(values)
    assert (total.shape, total.dtype) == ((), torch.float32)
    torch.testing.assert_close(total.double(), exactly(values).square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", [2**18, 200, 64])
def test_a_piece_is_a_whole_number_of_blocks(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", limit)
    piece = piece_numel(torch.device("cpu"))
    assert piece % int8.BLOCK == 0
    assert limit - int8.BLOCK < piece <= limit


@every_format
def test_the_squared_norm_allocates_no_more_than_a_piece(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(flat, "CPU_PIECE_NUMEL", 1000)
    values = values_of(dtype, 20_000)
    with Watch() as watch:
        squared_norm(values)
    assert 0 < watch.largest <= (4 if dtype == torch.float32 else 4 * 1000), "fp32 is not copied"
    assert not watch.host_reads
