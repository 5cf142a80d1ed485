"""Fixtures: groups of ranks that live as long as the test session, and the real weights where they are at hand."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["DS_ACCELERATOR"] = "cpu"  # of this process, before anything imports deepspeed

from tests.ranks import GroupOf, groups

NO_GPU = "there is no CUDA GPU here"


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say in a line why nothing is run, where only the tests that want a GPU were asked for."""
    if config.option.markexpr == "cuda" and not torch.cuda.is_available():
        return f"{NO_GPU}, so every test marked cuda is skipped"
    return None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m cuda``, import only files that hold such tests: others may need packages that are not there."""
    if config.option.markexpr == "cuda" and collection_path.match("test_*.py"):
        return "mark.cuda" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that waits most, beside which others compute; skip what wants a GPU where there is none."""
    items.sort(key=lambda item: item.path.name != "test_slurm.py")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def ranks() -> Iterator[GroupOf]:
    """``ranks(world_size)``: that many processes in one group, started once a session."""
    with groups() as group_of:
        yield group_of


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``make train`` trains on."""
    from lomo_ds.models.demo import make_demo

    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder)
    return folder


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Runs a function where kernels run on the CPU: in a process of its own, for triton asks when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        process.submit(abs, 0).result()  # it has started
    yield lambda function, *arguments: process.submit(function, *arguments).result()
    process.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are rounded as in the ranks, which have a thread each; and tiny matrices wait for no other thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def assets() -> Path:
    """The folder of real weights and texts that LOMO_DS_ASSETS names."""
    folder = os.environ.get("LOMO_DS_ASSETS")
    if not folder:
        pytest.skip("LOMO_DS_ASSETS is not set; it names a folder of real weights and texts")
    return Path(folder).resolve()
