"""Rows of a benchmark in processes of their own: each leads a process group, has a time limit, and is killed whole.

A row's process is told where to append its results, one JSON object a line:

    {"ready": true}                              it has imported what it needs, and waits for a line on its stdin
    {"name": "7b, batch 8", "peak": 123, ...}    a part of the results; a later line of the same name adds to it
    {"outcome": "failed", "error": "..."}        how the row has ended, if not well

The line on stdin is the number of seconds that it has. When stdin ends, whoever started it is gone, and it ends too.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY_SECONDS = 150.0  # that the imports of a process may take; a disk that has just been attached is slow
LOOK_SECONDS = 0.1  # between two looks at what a process has written
UNDER_WAY = "under way"
STDIN = 0
LOG_LINES = 40  # kept of what a row that failed has printed

Part = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        place: short, for the command line.
        needs: seconds below which it is not begun.
        limit: seconds that it may take, from when it is ready.
        command: starts its process; the path of its results is added.
        environment: variables of its process.
    """

    place: str
    title: str
    needs: float
    limit: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


class RowProcess:
    """The process group of one row.

    Args:
        folder: where its results and its log go; made here.
    """

    def __init__(self, row: Row, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.log, self.results = folder / "log", folder / "results"
        self.results.touch()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*row.command, str(self.results)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | row.environment,
                start_new_session=True,
            )
        self._read = 0  # bytes of the results so far

    def begin(self, seconds: float) -> None:
        """Let it measure for so long."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.flush()

    def new_lines(self) -> list[Part]:
        """What it has written since the last call, whole lines only."""
        with self.results.open("rb") as results:
            results.seek(self._read)
            lines = results.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self._read += sum(map(len, whole))
        return [json.loads(line) for line in whole]

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def log_lines(self) -> list[str]:
        """The last lines that it has printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]

    def kill(self) -> None:
        """End all processes of the group; some may have outlived the first one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


class Results:
    """What came out of rows so far, as it is written into a file.

    Attributes:
        rows: of each row ``place``, ``title``, ``outcome``, ``limit``, ``parts``, and the ``seconds`` it took.
    """

    def __init__(self, rows: list[Row], changed: Callable[[], None]) -> None:
        self.rows: list[dict[str, Any]] = [
            {"place": row.place, "title": row.title, "outcome": "not begun", "limit": row.limit, "parts": []}
            for row in rows
        ]
        self.changed = changed

    def add(self, index: int, lines: list[Part]) -> None:
        """Add what the process of a row has written."""
        row = self.rows[index]
        for line in lines:
            if "name" in line:
                part = next((part for part in row["parts"] if part["name"] == line["name"]), None)
                if part is None:
                    row["parts"].append(line)
                else:
                    part.update(line)
            elif "ready" not in line:
                row.update(line)
        if any("ready" not in line for line in lines):
            self.changed()

    def set(self, index: int, **fields: Any) -> None:
        """Set fields of a row."""
        self.rows[index].update(fields)
        self.changed()


def run_rows(
    rows: list[Row], results: Results, folder: Path, deadline: float, told: Callable[[str], None] = lambda text: None
) -> None:
    """Measure one row after the other; the processes of all are started, to import what they need, beside the first.

    Args:
        folder: an empty one, for files that are of no use afterwards.
        deadline: of ``time.monotonic``.
        told: is called with what is happening.
    """
    processes: dict[int, RowProcess] = {}

    def start(index: int) -> RowProcess:
        if index not in processes:
            processes[index] = RowProcess(rows[index], folder / str(index))
        return processes[index]

    def start_all() -> None:
        for index in range(len(rows)):
            start(index)

    try:
        for index, row in enumerate(rows):
            if deadline - time.monotonic() < row.needs:
                results.set(index, outcome=f"skipped: it needs {row.needs:.0f} s, and less were left")
                continue
            told(f"{row.place}: {row.title}")
            results.set(index, outcome=UNDER_WAY)
            _measure(index, row, start(index), results, deadline, start_all)
            start(index).kill()
    except KeyboardInterrupt:
        for index, found in enumerate(results.rows):
            if found["outcome"] == UNDER_WAY:
                results.add(index, processes[index].new_lines() if index in processes else [])
                results.set(index, outcome="interrupted")
        raise
    finally:
        for process in processes.values():
            process.kill()


def _measure(
    index: int, row: Row, process: RowProcess, results: Results, deadline: float, begun: Callable[[], None]
) -> None:
    """Wait until the process is ready, let it begin, and collect what it writes until it ends, or its time does."""
    if not _wait_until_ready(process, min(deadline, time.monotonic() + READY_SECONDS)):
        results.set(index, **_failure(process, f"it was not ready within {READY_SECONDS:.0f} s"))
        return
    start = time.monotonic()
    limit = min(row.limit, deadline - start)
    process.begin(limit)
    begun()
    while process.exit_status is None and time.monotonic() < start + limit:
        time.sleep(LOOK_SECONDS)
        results.add(index, process.new_lines())
    status = process.exit_status
    results.add(index, process.new_lines())
    ended: dict[str, Any] = {"seconds": time.monotonic() - start}
    if status is None:
        ended |= {"outcome": f"stopped after {limit:.0f} s", "log": process.log_lines()}
    elif results.rows[index]["outcome"] == UNDER_WAY:  # it has not said itself how it ended
        ended |= {"outcome": "measured"} if status == 0 else _failure(process, f"exit status {status}")
    elif results.rows[index]["outcome"] == "failed":
        ended |= {"log": process.log_lines()}
    results.set(index, **ended)


def _wait_until_ready(process: RowProcess, deadline: float) -> bool:
    while time.monotonic() < deadline:
        if any("ready" in line for line in process.new_lines()):
            return True
        if process.exit_status is not None:
            return False
        time.sleep(LOOK_SECONDS)
    return False


def _failure(process: RowProcess, reason: str) -> dict[str, Any]:
    lines = process.log_lines()
    return {"outcome": "failed", "error": lines[-1] if lines else reason, "log": lines}


class Output:
    """The other end of ``RowProcess``, in the row's own process.

    Args:
        path: the file to append results to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Part) -> None:
        """Append a line, whole or not at all, as far as readers can tell."""
        with self.path.open("a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")

    def wait_to_begin(self) -> float:
        """Say that this process is ready, and wait for the number of seconds it has; end with whoever started it."""
        self.write({"ready": True})
        line = b""
        while not line.endswith(b"\n"):  # unbuffered: a thread that waits within a buffer's lock breaks the exit
            read = os.read(STDIN, 1)
            if not read:
                raise SystemExit("whoever started this process is gone")
            line += read
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        return float(line)


def _end_with_stdin() -> None:
    """Kill this process group when stdin ends."""
    while os.read(STDIN, 1):
        pass
    os.killpg(0, signal.SIGKILL)
