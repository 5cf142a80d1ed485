"""What went wrong, in the user's words: every error a user can cause, and nothing else.

A message states the rule, what it got and the way out, in one sentence. ``launch`` prints it without a
traceback; a program that calls the library sees an ordinary exception, a ValueError where an argument is to blame.
"""

import difflib

NEAR = 0.83  # of two equal names 1: a letter or a short word more, less or other is near, half a name is not


def did_you_mean(name: str, known: list[str]) -> str:
    """The end of a sentence that names the nearest of ``known``; empty if none is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(text: object) -> str:
    """``text``, which may be a library's or a user's, as it can stand within a sentence."""
    return " ".join(str(text).split())


class LomoError(Exception):
    """Base of every error that is the user's to mend.

    Attributes:
        only_on_this_rank: no other rank raises this error, so this one must tell it.
        on_some_ranks: any number of ranks may raise it, and one of them must tell it.
    """

    only_on_this_rank = False
    on_some_ranks = False


class ConfigError(LomoError, ValueError):
    """What was asked for cannot be done, or two settings contradict each other."""


class DataError(LomoError, ValueError):
    """A text file, a row in it or a tokenizer does not hold what training needs."""


class ModelError(LomoError, ValueError):
    """A model folder is incomplete, unreadable or does not fit the data."""


class DamagedError(LomoError, ValueError):
    """A file of a checkpoint or of an exported model is missing, or is not what was written."""


class CheckpointError(LomoError, ValueError):
    """A checkpoint cannot be written, or is not one of this run."""


class OffloadError(LomoError, OSError):
    """A shard on NVMe cannot be read or written."""


class NonFiniteGradientError(LomoError, ArithmeticError):
    """A gradient was inf or nan and the schedule in force had already used it."""


class DoesNotFitError(LomoError, MemoryError):
    """A GPU ran out of memory."""

    on_some_ranks = True


class PeerError(LomoError, RuntimeError):
    """Another rank failed and has said why; this rank stops in silence."""
