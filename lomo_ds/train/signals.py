"""SIGTERM and SIGUSR1 as a request to finish the current step, save a checkpoint and exit."""

import os
import signal
import socket
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 1.0  # seconds: a process may get a signal twice, from the scheduler and from the launcher that forwards it


class StopRequest:
    """Records the first of ``SIGNALS``; the second one ends this process at once, whatever it is doing.

    Use it as a context manager; on exit the previous handlers are restored. Python runs a signal handler only between
    two bytecode instructions, which a hung collective never reaches. A thread that reads the wakeup file descriptor
    receives every signal nevertheless.

    Attributes:
        name: the first signal that was received, ``SIGTERM`` for example; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> "StopRequest":
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        self.previous_wakeup_fd = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        self.previous_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.previous_wakeup_fd)
        self.sender.close()
        self.thread.join()
        self.receiver.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name

    def _listen(self) -> None:
        first: float | None = None
        while number := self.receiver.recv(1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > ECHO:
                os._exit(128 + number[0])
