"""The figures of the house, on known values and on the package itself."""

from itertools import pairwise

import pytest

from tests import house_figures
from tests.test_house import imports_of, modules


def test_figures_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    house_figures.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["files", str(sum(house_figures.file_lines().values())), "functions",
                                                   "top-level", "modules"]  # fmt: skip


def test_a_chain_is_one_of_imports() -> None:
    chain = house_figures.longest_chain("train.job")
    assert chain[0] == "train.job"
    assert all(imported in imports_of(modules()[module]) for module, imported in pairwise(chain))
    assert all(len(house_figures.longest_chain(module)) < len(chain) for module in imports_of(modules()["train.job"]))
    assert not imports_of(modules()[chain[-1]]), "it goes down to the ground"


def test_lines_of_a_function_are_those_from_its_name_to_its_end() -> None:
    lines = house_figures.function_lines()
    (key,) = (key for key in lines if key.startswith("numerics.flat:") and key.endswith(" ceil_div"))
    assert lines[key] == 3


def test_percentiles_are_nearest_ranks() -> None:
    values = [5, 1, 4, 2, 3, 11, 6, 10, 7, 9, 8]
    assert [house_figures.percentile(values, share) for share in (0.0, 0.5, 0.9, 1.0)] == [1, 6, 10, 11]
