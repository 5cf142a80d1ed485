"""SIGTERM and SIGUSR1: a request to finish the step under way, save and leave."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 1.0  # seconds: a scheduler signals every process of a job, and a launcher among them passes it on


class StopRequest:
    """Notes the first of ``SIGNALS``; the second ends this process at once.

    Use it as a context manager: outside, the signals do what they did before.

    Attributes:
        name: of the signal that came; None if none did.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.since = 0.0

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.since > ECHO:
            os._exit(128 + number)
