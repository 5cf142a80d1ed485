"""Docstrings and names that a reader would stumble over."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
FILES = [path for folder in ("lomo_ds", "benchmarks", "launch", "tests") for path in (PROJECT / folder).rglob("*.py")]
# A docstring begins with a verb in the imperative, or with a noun phrase that defines the thing.
FRAGMENT = re.compile(r"(What|Of|Which|Whether|How|For|As|To|That|Those|These|Where|When|Nothing|Also|They|Its?)\b")
VAGUE_NAMES = {"found", "told", "some", "few", "theirs", "ours", "mine", "anew"}


def path_name(path: Path) -> str:
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize("path", FILES, ids=path_name)
def test_docstrings_are_no_fragments(path: Path) -> None:
    nodes = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)
    ]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    assert [text.partition("\n")[0] for text in docstrings if FRAGMENT.match(text)] == []


@pytest.mark.parametrize("path", FILES, ids=path_name)
def test_variables_are_named_after_what_they_hold(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    assert names & VAGUE_NAMES == set()
