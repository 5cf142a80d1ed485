"""The README and the pages of ``docs/``: links, headings, paths and test selections that they name exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.test_house import FLOORS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
README_LINES = 120
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "lomo_ds|launch|benchmarks|tests|docs|ds_configs"
PATH = re.compile(rf"(?<![\w/.-])(?:(?:{FOLDERS})/[\w./-]*\w/?|[\w./-]+\.py\b)")
SELECTION = re.compile(r'(tests/[\w./]+) -k (?:"([^"]+)"|(\w+))')


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors_of(page: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_link_targets(page: str) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    missing = []
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(str(target.resolve().relative_to(ROOT)))):
            missing.append(link)
    return missing


def exists(path: str) -> bool:
    """Return whether a path exists from the root; architecture.md omits ``lomo_ds/``, and commands ``benchmarks/``."""
    return any((ROOT / folder / path).exists() for folder in ("", "lomo_ds", "benchmarks"))


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_images_point_to_existing_files_and_headings(page: str) -> None:
    assert missing_link_targets(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page: str) -> None:
    prose = LINK.sub("", text_of(page))
    assert [path for path in PATH.findall(prose) if not exists(path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_selected_tests_exist(page: str) -> None:
    """Each word of ``-k "one or other"`` occurs in the name of a test in the file or folder before it."""
    missing = []
    for path, quoted, word in SELECTION.findall(text_of(page)):
        names = names_of_tests(path)
        missing += [f"{path} -k {w}" for w in (quoted or word).split(" or ") if not any(w in name for name in names)]
    assert missing == []


def names_of_tests(path: str) -> list[str]:
    """Return the names of the test functions in a file or folder."""
    files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("test_*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def test_every_page_is_linked_from_the_readme() -> None:
    assert [page for page in PAGES[1:] if f"({page})" not in text_of("README.md")] == []


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= README_LINES


def test_the_architecture_page_lists_the_floors() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text_of("docs/architecture.md"), flags=re.MULTILINE)
    floors = [{folder for number, folder in rows if int(number) == floor} for floor in range(1, len(FLOORS) + 1)]
    assert floors == FLOORS
