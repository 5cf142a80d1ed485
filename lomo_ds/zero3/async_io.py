"""DeepSpeed's async_io (libaio with O_DIRECT), compiled by its first use on a machine."""

import contextlib
import fcntl
import functools
import logging
import threading
from pathlib import Path
from typing import Any

from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch.utils import cpp_extension

from lomo_ds.errors import ConfigError, one_line

COMPILED = ("pin_memory", "async_io")  # the extensions that it consists of
PATIENCE = 5.0  # seconds after which one may wonder

logger = logging.getLogger(__name__)


class _Builder(AsyncIOBuilder):
    """Compiles without debug information, which would take the compiler three quarters more time."""

    def cxx_args(self) -> list[str]:
        return [argument for argument in super().cxx_args() if argument != "-g"]


def require_async_io() -> None:
    """Make sure that async_io can be used here, which may take minutes, once.

    Raises:
        ConfigError: libaio is missing, or async_io cannot be compiled.
    """
    if not _is_installed() and not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "zero_optimization.offload_param.device nvme needs libaio, which is not installed; install libaio-dev "
            "(Debian, Ubuntu) or libaio-devel (Fedora, RHEL) and a C++ compiler, or use cpu"
        )
    try:
        load_async_io()
    except Exception as error:  # a compiler may fail in any way
        raise ConfigError(
            f"zero_optimization.offload_param.device nvme needs DeepSpeed's async_io, which cannot be built here "
            f"({one_line(error)[:300]}); see ds_report, or use cpu"
        ) from None


@functools.cache
def load_async_io() -> Any:
    """The extension; one process of a machine loads it at a time."""
    if _is_installed():
        return _Builder().load(verbose=False)
    folders = [Path(cpp_extension._get_build_directory(name, verbose=False)) for name in COMPILED]
    words = "DeepSpeed's async_io is being compiled in %s, which takes minutes, once"
    told = threading.Timer(PATIENCE, logger.info, [words, folders[-1]])
    told.start()
    try:
        with (folders[-1] / "lomo_ds.lock").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # the kernel ends it with the process
            for folder in folders:
                _remove_left_behind(folder / "lock")
            return _Builder().load(verbose=False)
    finally:
        told.cancel()


def _is_installed() -> bool:
    return bool(installed_ops.get(AsyncIOBuilder.NAME))


def _remove_left_behind(baton: Path) -> None:
    """Remove the file by which torch says that a process is compiling, if that process is gone.

    A process that is killed leaves it behind, and every later one would wait for ever.
    """
    with contextlib.suppress(OSError), baton.open() as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # fails while anyone else has it open
        baton.unlink()
