"""Run launch/train.py inside the waiting ranks of a test session, as a launcher would on its own."""

import contextlib
import io
import runpy
from pathlib import Path
from typing import Any

from lomo_ds.train import cli

ROOT = Path(__file__).parent.parent


class NoWatchdog:
    """Stand-in for ``Watchdog`` on ranks that must survive a failed run, since later tests use them."""

    def close(self, reported: bool) -> None: ...

    def wait_for_shutdown(self) -> None: ...


def run_main(argv: list[str]) -> tuple[int, str, str]:
    """launch/train.py's main in this rank's process: exit status, stdout, stderr."""
    cli.SILENT_RANK_DELAY = 0.0  # no launcher here that would end the rank that speaks
    cli.Watchdog = NoWatchdog  # type: ignore[assignment, misc]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = runpy.run_path(str(ROOT / "launch/train.py"))["main"](argv)
    return status, out.getvalue(), err.getvalue()


def demo_arguments(demo: Path, out: Path, **more: Any) -> list[str]:
    arguments = {
        "model_name_or_path": demo / "model",
        "train_file": demo / "train.txt",
        "output_dir": out,
        "deepspeed": ROOT / "ds_configs/zero3_fp32.json",
        "max_seq_length": 32,
        "per_device_train_batch_size": 2,
    } | more
    return [f"--{name}={value}" for name, value in arguments.items() if value is not None]
