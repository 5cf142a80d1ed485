"""SIGTERM and SIGUSR1: a request to finish the step under way, save and leave."""

import os
import signal
import socket
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 1.0  # seconds: a scheduler signals every process of a job, and a launcher among them passes it on


class StopRequest:
    """Notes the first of ``SIGNALS``; the second ends this process at once, wherever it is.

    Use it as a context manager: outside, the signals do what they did before. Python runs a handler between two of
    its own instructions, which a hung collective never reaches; a thread hears of every signal without that.

    Attributes:
        name: of the signal that came; None if none did.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> "StopRequest":
        self.heard, self.told = socket.socketpair()
        self.told.setblocking(False)
        self.wakeup_before = signal.set_wakeup_fd(self.told.fileno(), warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup_before)
        self.told.close()
        self.thread.join()
        self.heard.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name

    def _listen(self) -> None:
        first: float | None = None
        while number := self.heard.recv(1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > ECHO:
                os._exit(128 + number[0])
