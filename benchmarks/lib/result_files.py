"""What every benchmark leaves behind: JSON, Markdown and a picture, with commit, versions, machine and command."""

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


def parser(description: str | None) -> argparse.ArgumentParser:
    """The start of a benchmark's arguments."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output_dir", type=Path, default=RESULTS, help="of the results; benchmarks/results by default")
    return made


def require(*packages: str) -> None:
    """End with a sentence, before anything is measured, where one of ``packages`` is not installed."""
    if missing := missing_of(packages):
        sys.exit(f"this benchmark needs {' and '.join(missing)}: pip install --editable '.[bench]'")


def missing_of(packages: Iterable[str]) -> list[str]:
    """Those of ``packages`` that cannot be imported."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def environment(*packages: str, gpus: list[str] | None = None) -> dict[str, Any]:
    """Where figures come from.

    Args:
        packages: whose versions count beside those of ``VERSIONS``.
        gpus: their names; None asks torch, which then takes memory of the first one for itself.
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
    """matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_results(
    folder: Path, name: str, results: dict[str, Any], markdown: str, figure: Any = None, show: bool = True
) -> None:
    """Write ``name``.json and .md, and .png, each in place of an older one at once, and print the Markdown.

    Args:
        results: with ``environment()`` under "environment".
        markdown: without the picture and the environment, which are added.
        figure: matplotlib's; None leaves the picture out, as while rows are still being measured.
        show: whether to print.
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
    """Put ``text`` in place of the file at once, so that who is killed leaves the old file or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def version_of(package: str) -> str:
    """The installed version of a package, in words where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _environment_table(found: dict[str, Any]) -> str:
    machine = found["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    rows = [
        ["command", f"`{found['command']}`"],
        ["commit", found["commit"]],
        ["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB memory, {gpus}"],
        ["versions", ", ".join(f"{package} {version}" for package, version in found["versions"].items())],
    ]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _commit() -> str:
    """The commit that is checked out, with "-dirty" where a tracked file differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
