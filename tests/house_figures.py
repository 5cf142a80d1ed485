"""Figures on the size of the package: how long its files and functions are, and how deep its imports go.

python -m tests.house_figures
"""

import ast
from collections.abc import Sequence
from functools import cache

from tests.test_house import FLOORS, imports_of, lines_of, modules


def file_lines() -> dict[str, int]:
    """Return the lines of each file but the ``__init__``, by module."""
    return {module: lines_of(path) for module, path in modules().items() if path.name != "__init__.py"}


def function_lines() -> dict[str, int]:
    """Return the lines of each function and method, with decorators left out, by module and line."""
    return {
        f"{module}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@cache
def longest_chain(module: str) -> tuple[str, ...]:
    """Return the longest chain of imports that begins with a module."""
    chains = [longest_chain(imported) for imported in sorted(imports_of(modules()[module]) - {module})]
    return (module, *max(chains, key=len, default=()))


def percentile(values: Sequence[int], share: float) -> int:
    """Return the value that a share of ``values`` does not exceed, by the nearest rank."""
    return sorted(values)[round(share * (len(values) - 1))]


def row(noun: str, lines: dict[str, int]) -> str:
    """Return the figures of files or of functions."""
    longest = max(lines, key=lines.__getitem__)
    median, high = (percentile(list(lines.values()), share) for share in (0.5, 0.9))
    return f"{len(lines):5} {noun:9} lines: median {median}, 90 % {high}, most {lines[longest]} ({longest})"


def main() -> None:
    """Print the figures."""
    rooms = {module.partition(".")[0] for module in modules()}
    chain = max((longest_chain(module) for module in modules()), key=len)
    print(row("files", file_lines()), f"     total {sum(file_lines().values())}", sep="\n")
    print(row("functions", function_lines()))
    print(f"{len(rooms):5} top-level modules and packages, on {len(FLOORS)} floors")
    print(f"{len(chain):5} modules in the longest chain of imports: {' > '.join(chain)}")


if __name__ == "__main__":
    main()
