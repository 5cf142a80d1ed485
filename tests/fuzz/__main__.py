"""Fuzzing with inputs of every kind for some minutes: ``make fuzz``, or ``python -m tests.fuzz``.

A fault is an exception other than a ``LomoError``, an error message of more than one line, a step or logit that differs
from the reference, or a run of more than ``test_inputs.SECONDS``. The smallest input that shows the fault is printed,
and the exit status is 1. The seed of a run is printed, and reproduces its inputs.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before anything imports deepspeed

from _pytest.outcomes import Failed
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption

from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.test_inputs import SECONDS, time_limit
from tests.ranks import GroupOf, groups


@dataclass
class Counts:
    """Numbers of inputs of one kind, by their results."""

    tried: int = 0
    refused: int = 0
    done: int = 0
    faults: int = 0

    def summary(self) -> str:
        """Return the counts as text for a line of the log."""
        return ", ".join(f"{count} {name}" for name, count in vars(self).items())


def main() -> int:
    """Run the fuzz tests and return the exit status, which is 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Draw inputs of every kind, and count.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None, help="of an earlier run, whose inputs are drawn again")
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS], metavar="KIND", help="only these")
    options = parser.parse_args()
    first_seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    kinds = [kind for kind in KINDS if kind.name in (options.kinds or kind.name)]
    counts = {kind.name: Counts() for kind in kinds}
    print(f"seed {first_seed}: make fuzz SEED={first_seed} draws the same inputs", flush=True)
    end = time.monotonic() + 60 * options.minutes
    with suppressed_stderr(), groups(hung=SECONDS / 2) as ranks, tempfile.TemporaryDirectory() as folder:
        for kind, turn_seed in turns(kinds, first_seed, end):
            take_turn(kind, turn_seed, counts[kind.name], ranks, Path(folder))
            print(f"{kind.name:20} {counts[kind.name].summary()}", flush=True)
    print(table(kinds, counts))
    return int(any(of_kind.faults for of_kind in counts.values()))


@contextmanager
def suppressed_stderr() -> Iterator[None]:
    """Suppress the progress bars and warnings of libraries, in this process and on the ranks."""
    before, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)


def turns(kinds: list[Kind], first_seed: int, end: float) -> Iterator[tuple[Kind, int]]:
    """Yield each kind in turn with a seed, until the time is over."""
    for number in count():
        for kind in kinds:
            if number and time.monotonic() > end:
                return
            yield kind, first_seed + number


def take_turn(kind: Kind, turn_seed: int, counts: Counts, ranks: GroupOf, folder: Path) -> None:
    """Test the inputs of one turn, update ``counts``, and print a fault with the smallest input that shows it."""
    is_searching = True  # False while hypothesis shrinks a failing input

    @seed(turn_seed)
    @settings(
        max_examples=kind.turn,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def draw(drawn: Any) -> None:
        nonlocal is_searching
        try:
            with time_limit():
                is_done = kind.check(ranks, folder, drawn)
        except UnsatisfiedAssumption:  # the input cannot be compared with a reference
            raise
        except BaseException:
            counts.tried += is_searching
            is_searching = False
            raise
        counts.tried += is_searching
        counts.done += is_searching and is_done
        counts.refused += is_searching and not is_done

    try:
        draw()
    except (Exception, Failed) as fault:  # pytest's Failed is raised by groups of ranks
        counts.faults += 1
        print(
            f"FAULT in {kind.name}, drawn by SEED={turn_seed}:",
            *traceback.format_exception(fault, limit=-3),
            flush=True,
        )


def table(kinds: list[Kind], counts: dict[str, Counts]) -> str:
    """Return a Markdown table with the counts of each kind and their sums."""
    head = [
        "| inputs | tried | rejected with an error message | equal to the reference | faults |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = [(f"{kind.name} ({kind.done})", counts[kind.name]) for kind in kinds]
    total = Counts(*(sum(of_kind) for of_kind in zip(*(vars(each).values() for each in counts.values()), strict=True)))
    lines = [f"| {name} | {c.tried} | {c.refused} | {c.done} | {c.faults} |" for name, c in [*rows, ("all", total)]]
    return "\n".join([*head, *lines])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
