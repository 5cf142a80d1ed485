"""Runs each row of a benchmark in its own process group, with a time limit after which the whole group is killed.

The process of a row appends its results to a file, one JSON object per line:

    {"ready": true}                              the imports are done; the process waits for a line on stdin
    {"name": "7b, batch 8", "peak": 123, ...}    a part of the results; a later line of the same name updates it
    {"outcome": "failed", "error": "..."}        the outcome of a row that failed

The line on stdin is the time limit in seconds. When stdin ends, the parent process has exited, and the row exits too.
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

READY_SECONDS = 150.0  # time limit for the imports of a process; a newly attached disk is slow
POLL_SECONDS = 0.1  # interval at which results are read
RUNNING = "under way"
STDIN = 0
LOG_LINES = 40  # lines of output that are recorded for a failed row

Part = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkRow:
    """A row of a benchmark.

    Attributes:
        place: short name, for the command line.
        needs: the row is skipped if fewer seconds are left.
        limit: time limit in seconds after the row is ready.
        command: command of the process; the path of the result file is appended.
        environment: additional environment variables of the process.
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
        folder: folder of the result file and the log; must not exist yet.
    """

    def __init__(self, row: BenchmarkRow, folder: Path) -> None:
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
        """Start the measurement with a time limit."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.flush()

    def new_lines(self) -> list[Part]:
        """Return the complete result lines that were written since the last call."""
        with self.results.open("rb") as results:
            results.seek(self._read)
            lines = results.read().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        self._read += sum(map(len, complete))
        return [json.loads(line) for line in complete]

    @property
    def exit_status(self) -> int | None:
        """Exit status of the process; None while it runs."""
        return self.process.poll()

    def log_lines(self) -> list[str]:
        """Return the last lines of output."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]

    def kill(self) -> None:
        """Kill all processes of the group, including those that have outlived the first one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


class Results:
    """The results of all rows so far, as written to the result file.

    Args:
        changed: callback, called after every change.

    Attributes:
        rows: for each row ``place``, ``title``, ``outcome``, ``limit``, ``parts`` and the ``seconds`` that it took.
    """

    def __init__(self, rows: list[BenchmarkRow], changed: Callable[[], None]) -> None:
        self.rows: list[dict[str, Any]] = [
            {"place": row.place, "title": row.title, "outcome": "not begun", "limit": row.limit, "parts": []}
            for row in rows
        ]
        self.changed = changed

    def add(self, index: int, lines: list[Part]) -> None:
        """Add result lines of a row."""
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
    rows: list[BenchmarkRow],
    results: Results,
    folder: Path,
    deadline: float,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Measure the rows one after another; all processes start during the first row, to do their imports.

    Args:
        folder: empty folder for temporary files.
        deadline: in terms of ``time.monotonic``.
        report: callback that receives progress messages.
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
                results.set(index, outcome=f"skipped: it needs {row.needs:.0f} s, but less time was left")
                continue
            report(f"{row.place}: {row.title}")
            results.set(index, outcome=RUNNING)
            _measure(index, row, start(index), results, deadline, start_all)
            start(index).kill()
    except KeyboardInterrupt:
        for index, result in enumerate(results.rows):
            if result["outcome"] == RUNNING:
                results.add(index, processes[index].new_lines() if index in processes else [])
                results.set(index, outcome="interrupted")
        raise
    finally:
        for process in processes.values():
            process.kill()


def _measure(
    index: int, row: BenchmarkRow, process: RowProcess, results: Results, deadline: float, on_begin: Callable[[], None]
) -> None:
    """Wait until the process is ready, start it, and collect its results until it ends or its time is up."""
    if not _wait_until_ready(process, min(deadline, time.monotonic() + READY_SECONDS)):
        results.set(index, **_failure(process, f"it was not ready within {READY_SECONDS:.0f} s"))
        return
    start = time.monotonic()
    limit = min(row.limit, deadline - start)
    process.begin(limit)
    on_begin()
    while process.exit_status is None and time.monotonic() < start + limit:
        time.sleep(POLL_SECONDS)
        results.add(index, process.new_lines())
    status = process.exit_status
    results.add(index, process.new_lines())
    fields: dict[str, Any] = {"seconds": time.monotonic() - start}
    if status is None:
        fields |= {"outcome": f"stopped after {limit:.0f} s", "log": process.log_lines()}
    elif results.rows[index]["outcome"] == RUNNING:  # the process has not reported an outcome
        fields |= {"outcome": "measured"} if status == 0 else _failure(process, f"exit status {status}")
    elif results.rows[index]["outcome"] == "failed":
        fields |= {"log": process.log_lines()}
    results.set(index, **fields)


def _wait_until_ready(process: RowProcess, deadline: float) -> bool:
    while time.monotonic() < deadline:
        if any("ready" in line for line in process.new_lines()):
            return True
        if process.exit_status is not None:
            return False
        time.sleep(POLL_SECONDS)
    return False


def _failure(process: RowProcess, reason: str) -> dict[str, Any]:
    lines = process.log_lines()
    return {"outcome": "failed", "error": lines[-1] if lines else reason, "log": lines}


class RowOutput:
    """The counterpart of ``RowProcess`` in the row's own process.

    Args:
        path: file to append results to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Part) -> None:
        """Append a line; readers ignore it until it is complete."""
        with self.path.open("a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")

    def wait_to_begin(self) -> float:
        """Report that this process is ready, and return the time limit in seconds; exit when the parent exits."""
        self.write({"ready": True})
        line = b""
        while not line.endswith(b"\n"):  # unbuffered: a thread that holds the lock of a buffer would block the exit
            read = os.read(STDIN, 1)
            if not read:
                raise SystemExit("the parent process has exited")
            line += read
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        return float(line)


def _end_with_stdin() -> None:
    """Kill this process group when stdin ends."""
    while os.read(STDIN, 1):
        pass
    os.killpg(0, signal.SIGKILL)
