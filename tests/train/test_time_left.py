"""Tests of the progress that a job shows: a bar on a terminal, and lines with the time left in a log file."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from lomo_ds.train.loop import time_left
from tests.launching import demo_arguments, run_main
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
LINE = re.compile(r"^step (\d+) of (\d+), \d\d:\d\d left: loss [\d.]+, \d+ tokens/s, lr [\d.e-]+, norm [\d.]+$", re.M)


@pytest.mark.parametrize(
    ("seconds", "taken", "left", "expected"),
    [(20.0, 2, 2, "00:20"), (20.0, 2, 0, "00:00"), (90.0, 1, 100, "2:30:00")],
)
def test_time_left(seconds: float, taken: int, left: int, expected: str) -> None:
    assert time_left(seconds, taken, left) == expected


def test_a_log_file_has_lines_that_count_the_steps_since_the_resume(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    first = demo_arguments(demo, tmp_path, max_steps=4, logging_steps=2, save_steps=4)
    status, said, error = ranks(1).run(run_main, first)[0]
    assert status == 0, error
    assert LINE.findall(said) == [("2", "4"), ("4", "4")]
    more = demo_arguments(demo, tmp_path, max_steps=6, logging_steps=1, save_steps=4, resume_from_checkpoint="auto")
    status, said, error, calls = ranks(1).run(run_and_record, more)[0]
    assert status == 0, error
    assert LINE.findall(said) == [("5", "6"), ("6", "6")]
    assert calls == [(1, 1), (2, 0)], "steps taken in this process, and steps left"
    assert "step/s" not in error


def run_and_record(arguments: list[str]) -> tuple[int, str, str, list[tuple[int, int]]]:
    """Run a job; return also the numbers of steps that its time left was computed from."""
    from lomo_ds.train import loop

    with mock.patch.object(loop, "time_left", side_effect=time_left) as recorded:
        outcome = run_main(arguments)
    return *outcome, [call.args[1:] for call in recorded.call_args_list]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_on_a_terminal(arguments: list[str]) -> tuple[int, str, str]:
    with mock.patch.object(io, "StringIO", Terminal):
        return run_main(arguments)


def test_a_terminal_has_a_bar_with_the_time_left(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    arguments = demo_arguments(demo, tmp_path, max_steps=3, logging_steps=1)
    status, said, error = ranks(1).run(run_on_a_terminal, arguments)[0]
    assert status == 0, error
    assert not LINE.findall(said)
    assert re.search(r"3/3 \[\d\d:\d\d<00:00, .*step.*loss", error)
