"""Fuzz tests of a few inputs of kinds that no other test draws; ``make fuzz`` draws thousands."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.__main__ import Counts, take_turn
from tests.fuzz.kinds import Kind
from tests.fuzz.model_folders import check_folder, folders
from tests.fuzz.test_inputs import fuzz
from tests.fuzz.trained_configs import check_config, configs
from tests.ranks import GroupOf


def test_any_config_trains_like_pytorch_or_is_rejected(ranks: GroupOf) -> None:
    @fuzz(20)
    @given(configs)
    def check(config: dict[str, Any]) -> None:
        check_config(ranks, config)

    check()


def test_any_model_folder_loads_like_transformers_or_is_rejected(ranks: GroupOf) -> None:
    @fuzz(30)
    @given(folders)
    def check(spec: tuple[Any, ...]) -> None:
        check_folder(ranks, spec)

    check()


def fails_from_seven(ranks: GroupOf, folder: Path, number: int) -> bool:
    assert number < 7
    return number % 2 == 1


def test_a_fault_is_counted_and_its_smallest_input_is_printed(
    ranks: GroupOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = Counts()
    take_turn(Kind("numbers", st.integers(0, 6), fails_from_seven), 1, counts, ranks, tmp_path)
    assert (counts.tried, counts.refused, counts.done, counts.faults) == (7, 4, 3, 0)
    take_turn(Kind("numbers", st.integers(0, 10**6), fails_from_seven), 1, counts, ranks, tmp_path)
    assert counts.faults == 1
    assert "drawn=7" in capsys.readouterr().out
