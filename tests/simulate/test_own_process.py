"""Errors and progress of a function in a process of its own."""

import os
import signal
import sys
from collections.abc import Callable

import pytest

from lomo_ds.errors import ConfigError, ModelError
from lomo_ds.simulate.own_process import RemoteError, Report, call_in_own_process


class UnpicklableError(Exception):
    """An error that cannot be sent to another process, like that of an operation on tensors without data."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__("an operation\n  is unknown")
        self.function = function


def behave(way: str, report: Report) -> str:
    report(f"behave {way}")
    match way:
        case "badly":
            raise UnpicklableError(lambda: None)
        case "like a user":
            raise ConfigError("a setting is wrong")
        case "fatally":
            os.kill(os.getpid(), signal.SIGKILL)
        case "silently":
            sys.exit(3)
    print("noise of a library")
    return way


def call(way: str) -> str:
    return str(call_in_own_process(behave, way, lambda stage: None))


def test_a_result_and_stages_are_reported(capfd: pytest.CaptureFixture[str]) -> None:
    stages: list[str] = []
    assert call_in_own_process(behave, "well", stages.append) == "well"
    assert "behave well" in stages
    assert capfd.readouterr().out == ""


def test_an_error_that_cannot_be_sent_keeps_its_message_and_its_traceback() -> None:
    with pytest.raises(ModelError) as raised:
        call("badly")
    assert str(raised.value) == "the step cannot be simulated: UnpicklableError: an operation is unknown"
    assert isinstance(raised.value.__cause__, RemoteError)
    assert "raise UnpicklableError" in str(raised.value.__cause__)


def test_an_error_of_the_user_stays_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^a setting is wrong$"):
        call("like a user")


@pytest.mark.parametrize(
    ("way", "message"), [("fatally", "code -9; it was killed, perhaps because host memory"), ("silently", "code 3$")]
)
def test_a_process_that_ends_early_is_an_error(way: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call(way)
