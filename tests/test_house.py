"""The plan of the house: a folder imports only from the floors below it, and every name is there once."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PACKAGE = PROJECT / "lomo_ds"

# From the ground up. Folders of one floor do not know each other.
FLOORS = [
    {"errors"},
    {"numerics", "distributed"},
    {"memory", "data"},
    {"zero3"},
    {"config"},
    {"update", "checkpoint"},
    {"models"},
    {"engine"},
    {"simulate"},
    {"planner"},
    {"train"},
]
FLOOR_OF = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
SMALL = 30  # lines; a file that is shorter and has one user belongs into it


@cache
def modules() -> dict[str, Path]:
    """Every file of the package but the facade of the whole, by its dotted name below ``lomo_ds``."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py")
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


@cache
def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lomo_ds":
            source = (node.module or "").removeprefix("lomo_ds").removeprefix(".")
            names = {f"{source}.{alias.name}".removeprefix(".") for alias in node.names}
            imported |= {name if name in modules() else source for name in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name[8:] for alias in node.names if alias.name.startswith("lomo_ds.")}
    return imported & set(modules())


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module: str) -> None:
    folder = module.partition(".")[0]
    assert folder in FLOOR_OF, f"{folder} stands on no floor; give it one"
    for imported in imports_of(modules()[module]):
        other = imported.partition(".")[0]
        assert other == folder or FLOOR_OF[other] < FLOOR_OF[folder], (
            f"{module} imports {imported}, which is not below it"
        )


@pytest.mark.parametrize("module", [module for module in modules() if not module.startswith("zero3")])
def test_only_zero3_reads_what_deepspeed_adds_to_a_parameter(module: str) -> None:
    nodes = ast.walk(ast.parse(modules()[module].read_text()))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not {name for name in names if name.startswith("ds_")} - {"ds_config"}


@pytest.mark.parametrize("module", modules())
def test_deepspeed_is_imported_where_its_internals_are_known(module: str) -> None:
    """``distributed`` calls its collectives, which its communication logger counts; ``simulate`` is an accelerator."""
    nodes = list(ast.walk(ast.parse(modules()[module].read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    uses_deepspeed = any(name.partition(".")[0] == "deepspeed" for name in imported)
    assert not uses_deepspeed or module.partition(".")[0] in ("distributed", "zero3", "engine", "simulate")


def test_no_import_goes_in_circles() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"{' imports '.join((*path, module))}"
        if module not in finished:
            for imported in imports_of(modules()[module]) - {module}:
                visit(imported, (*path, module))
            finished.add(module)

    for module in modules():
        visit(module, ())


def test_no_two_files_have_one_name() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PROJECT / "benchmarks").rglob("*.py")]
    names = Counter(path.name for path in files if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_classes_have_one_name() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PROJECT / "benchmarks").rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_short_file_has_several_users() -> None:
    """A package's ``__init__`` that hands a name on is no user of it."""
    users = Counter(
        imported
        for path in [*modules().values(), *(PROJECT / "benchmarks").rglob("*.py"), *(PROJECT / "launch").glob("*.py")]
        if path.name != "__init__.py"
        for imported in imports_of(path)
    )
    short = [m for m, path in modules().items() if path.name != "__init__.py" and lines_of(path) < SMALL]
    assert [module for module in short if users[module] == 1] == []


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())
