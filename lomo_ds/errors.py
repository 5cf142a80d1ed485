"""Exceptions for every error that a user can cause.

A message states the rule, the value that breaks it and how to fix it. ``launch`` prints the message without a
traceback; a program that calls the library sees an ordinary exception, a ValueError if an argument is wrong.
"""

import difflib

SIMILARITY_CUTOFF = (
    0.83  # 1 means equal; a name that differs by one letter or one short word passes, half a name does not
)


def did_you_mean(name: str, known: list[str]) -> str:
    """Return the end of an error message that suggests the most similar ``known`` name; empty if none is similar."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=SIMILARITY_CUTOFF)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(text: object) -> str:
    """Return ``text`` on one line, so that it can be part of an error message."""
    return " ".join(str(text).split())


class LomoError(Exception):
    """Base class of every error that the user can fix.

    Attributes:
        only_on_this_rank: no other rank raises this error, so this rank must report it.
        on_some_ranks: any number of ranks may raise this error, and exactly one must report it.
    """

    only_on_this_rank = False
    on_some_ranks = False


class ConfigError(LomoError, ValueError):
    """A setting is invalid or unsupported, or two settings contradict each other."""


class DataError(LomoError, ValueError):
    """A text file, one of its rows or a tokenizer lacks something that training needs."""


class BadRowError(DataError):
    """One row of a dataset is malformed; the others can still be read."""


class ModelError(LomoError, ValueError):
    """A model folder is incomplete, unreadable or does not fit the data."""


class DamagedError(LomoError, ValueError):
    """A file of a checkpoint or of an exported model is missing, or differs from what was written."""


class CheckpointError(LomoError, ValueError):
    """A checkpoint cannot be written, or does not belong to this run."""


class OffloadError(LomoError, OSError):
    """A shard on NVMe cannot be read or written."""


class NonFiniteGradientError(LomoError, ArithmeticError):
    """A gradient was inf or nan after the schedule had already applied it."""


class DoesNotFitError(LomoError, MemoryError):
    """A GPU ran out of memory."""

    on_some_ranks = True


class PeerError(LomoError, RuntimeError):
    """Another rank failed and has reported the error; this rank stops without a message."""
