"""No module imports from a test: code that tests share is in ``tests/helpers`` or in fixtures."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.fleet import ROOT

FILES = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, also inside its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def of_tests(name: str) -> bool:
    """Return whether a dotted name is, or is in, a test module or a ``conftest``."""
    return any(part == "conftest" or part.startswith("test_") for part in name.split("."))


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("from tests.unit.test_keys import task", True),
        ("from tests.unit import test_keys", True),
        ("from .test_keys import task", True),
        ("def later():\n    import tests.conftest", True),
        ("from tests.helpers.servers import Postgres", False),
    ],
)
def test_the_check_finds_an_import_from_a_test(text: str, refused: bool) -> None:
    assert any(map(of_tests, imported(ast.parse(text)))) is refused


def test_no_module_imports_from_a_test() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in FILES
        for name in imported(ast.parse(file.read_text()))
        if of_tests(name)
    }
    assert found == set()
