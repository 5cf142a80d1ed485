"""Every test that wants a GPU is marked so: ``-m cuda`` runs all of them, and whoever has no GPU sees them skipped."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
USES_GPU = ('ranks(1, "cuda")', ".cuda()", 'device="cuda"', "torch.cuda.synchronize()")


def marks_of(node: ast.Module | ast.FunctionDef) -> str:
    """The source of the marks of a test, or of all tests of a module."""
    if isinstance(node, ast.FunctionDef):
        return " ".join(map(ast.unparse, node.decorator_list))
    assigned = [statement for statement in node.body if isinstance(statement, ast.Assign)]
    return " ".join(
        ast.unparse(assignment) for assignment in assigned if "pytestmark" in ast.unparse(assignment.targets[0])
    )


def unmarked_tests(source: str) -> list[str]:
    """The tests in ``source`` that use a GPU and lack the mark."""
    module = ast.parse(source)
    if "mark.cuda" in marks_of(module):
        return []
    tests = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    uses = [test for test in tests if any(use in (ast.get_source_segment(source, test) or "") for use in USES_GPU)]
    return [test.name for test in uses if "mark.cuda" not in marks_of(test)]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_what_wants_a_gpu_is_marked(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if path != Path(__file__):
        assert "skipif(not torch.cuda.is_available()" not in source, "mark it with pytest.mark.cuda instead"
        assert unmarked_tests(source) == []


def test_a_test_without_the_mark_is_found() -> None:
    source = "def test_one():\n    tensor.cuda()\n\n@pytest.mark.cuda\ndef test_other():\n    tensor.cuda()\n"
    assert unmarked_tests(source) == ["test_one"]
    assert unmarked_tests("pytestmark = pytest.mark.cuda\n" + source) == []
