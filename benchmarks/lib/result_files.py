"""Result files of a benchmark: JSON, Markdown and a picture, with commit, versions, machine and command."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks/results"
VERSIONS = ("torch", "deepspeed", "transformers", "safetensors")


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Build an argument parser with the option that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=RESULTS, help="folder of the results; benchmarks/results by default"
    )
    return parser


def require(*packages: str) -> None:
    """Exit with an error message if one of ``packages`` is not installed."""
    if missing := missing_packages(packages):
        sys.exit(f"this benchmark needs {' and '.join(missing)}: pip install --editable '.[bench]'")


def missing_packages(packages: Iterable[str]) -> list[str]:
    """Return the ``packages`` that cannot be imported."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def environment(*packages: str, gpus: list[str] | None = None) -> dict[str, Any]:
    """Describe the commit, the versions, the machine and the command of a measurement.

    Args:
        packages: packages whose versions are recorded in addition to ``VERSIONS``.
        gpus: names of the GPUs; None asks torch, which then allocates memory on the first one.
    """
    if gpus is None:
        gpus = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    versions = {package: version_of(package) for package in (*VERSIONS, *packages)}
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpus": gpus,
        },
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
    }


def pyplot() -> Any:
    """Return matplotlib's pyplot, set up to draw into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_results(
    folder: Path, name: str, results: dict[str, Any], markdown: str, figure: Any = None, show: bool = True
) -> None:
    """Write ``name``.json, .md and .png, replacing older files atomically, and print the Markdown.

    Args:
        results: the results, with ``environment()`` under "environment".
        markdown: the report; the picture and the environment are appended to it.
        figure: a matplotlib figure; None writes no picture, for example while rows are still being measured.
        show: whether to print the Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = f"\n![{name}]({name}.png)\n" if figure is not None else ""
    write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / f"{name}.md", f"{markdown}{picture}\n{_environment_table(results['environment'])}")
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=160)
        pyplot().close(figure)
    if show:
        endings = ["json", "md", *(["png"] if figure is not None else [])]
        print(f"\n{markdown}\nresults: {', '.join(str(folder / f'{name}.{ending}') for ending in endings)}")


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a process that is killed leaves either the old file or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def version_of(package: str) -> str:
    """Return the installed version of a package, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table whose columns, except the first, are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _environment_table(environment: dict[str, Any]) -> str:
    machine = environment["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    rows = [
        ["command", f"`{environment['command']}`"],
        ["commit", environment["commit"]],
        ["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB memory, {gpus}"],
        ["versions", ", ".join(f"{package} {version}" for package, version in environment["versions"].items())],
    ]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _commit() -> str:
    """Return the commit that is checked out, with "-dirty" if a tracked file differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return "unknown"
    return described.stdout.strip() or "unknown"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
