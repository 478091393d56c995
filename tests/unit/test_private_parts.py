"""Only the module ``compat`` uses private parts of other libraries.

So at a new release of a library, a maintainer has to check this module only.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import celery_singleton_state
from celery_singleton_state import compat

ROOT = Path(celery_singleton_state.__file__).parent
COMPAT = ROOT / "compat.py"
PRIVATE = re.compile(r"_[A-Za-z]\w*|__\w*[A-Za-z0-9]_?")

#: Maps each private name of this package that a module uses on another object than ``self`` to the
#: name's owner.
OURS = {
    "_CELERY_SINGLETON_STATE_PARENT": "a variable of the environment (lease.renewal_slots)",
    "_close": "KeyValueStore, while it is made (kv)",
    "_convert": "SingletonTask",
    "_delivery": "SingletonTask",
    "_is_noted": "a mark on a __call__ (run.calls)",
    "_name": "SingletonTask",
    "_options": "SingletonTask",
    "_previous": "a handler of ours that was installed before (run.interrupt)",
    "_round_trip": "KeyValueStore, while it is made (kv)",
    "_rows": "KeyValueStore, while it is made (kv)",
    "_run_guarded": "SingletonTask",
}
PYTHONS = {
    "_fields": "of every named tuple, and documented",
    "_replace": "of every named tuple, and documented",
    "_acquireLock": "logging, before Python 3.13 (run.interrupt)",
    "_releaseLock": "logging, before Python 3.13 (run.interrupt)",
    "_current_exceptions": "sys (run.interrupt)",
    "_current_frames": "sys (run.interrupt)",
}
#: Functions that any program may replace, by Python's documentation.
REPLACEABLE = {"sys.unraisablehook"}
#: Attributes of a function that show its code. Only ``run.interrupt`` reads them, of functions in
#: Python's standard library.
INSIDES = {"__code__", "__closure__", "__globals__", "co_freevars"}


def test_only_compat_uses_private_parts_of_other_libraries() -> None:
    """Private parts are names with an underscore (as attributes, in imports and in strings), a
    function's code, and methods that are replaced on an object.
    """
    found = {
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in ROOT.rglob("*.py")
        if path != COMPAT
        for line, what in private_uses(path.read_text(), path.stem)
    }
    assert not found, "move them to compat, with a test in test_compat"


@pytest.mark.parametrize(
    "line",
    [
        "from celery._state import get_current_task",
        "from celery.canvas import _chain",
        "import celery._state",
        "worker.pool._pool",
        "getattr(task, '_exec_options', None)",
        "'_decorated' in vars(task)",
        "self.pool._pool.maxsize = 2",
        "BasePool.terminate_job.__code__",
        "def grow(): ...\npool.grow = grow",
        "pool.grow = lambda n: None",
    ],
)
def test_the_check_finds_each_kind_of_use(line: str) -> None:
    assert list(private_uses(line, "any"))


def private_uses(text: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each private part that a module's source uses."""
    tree = ast.parse(text)
    known = OURS.keys() | PYTHONS.keys()
    # The package calls ``super()`` "celerys" if it hides the types of ``super()`` from mypy.
    own = {"self", "cls", "super()", "celerys"}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    formats = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in formats for part in node.values}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = _imported(node)
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if ast.unparse(node.value) not in own else []
            if node.attr in INSIDES and module != "interrupt":
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and id(node) not in parts:
            names = [str(node.value)]
        elif isinstance(node, ast.Assign):
            yield from ((node.lineno, each) for each in _replaced(node, tree))
        yield from (
            (node.lineno, name) for name in names if PRIVATE.fullmatch(name) and name not in known
        )


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the parts of all imported names, except for imports from this package."""
    names = [each.name for each in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level or (node.module or "").startswith(ROOT.name):
            return []
        names.append(node.module or "")
    return [part for name in names for part in name.split(".")]


def _replaced(node: ast.Assign, tree: ast.Module) -> Iterator[str]:
    """Yield the methods that an assignment replaces by a function, on other objects than
    ``self``.
    """
    functions = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
    value = ast.unparse(node.value)
    if value in functions or isinstance(node.value, ast.Lambda):
        for target in node.targets:
            name = ast.unparse(target)
            if isinstance(target, ast.Attribute) and not (
                PRIVATE.fullmatch(target.attr) or name in REPLACEABLE
            ):
                yield f"{name} = {value}"


def test_compat_lists_the_private_names_that_our_classes_override() -> None:
    """A class may override a private name of its library's class on purpose, or by accident. An
    accident would break both classes.
    """
    found: defaultdict[str, set[str]] = defaultdict(set)
    for module in _modules():
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                for base, names in _shared(kind):
                    found[base] |= names
    known = {
        base: {name for name in names if PRIVATE.fullmatch(name)}
        for base, names in compat.OVERRIDDEN.items()
    }
    assert found == {base: names for base, names in known.items() if names}


def _modules() -> Iterator[ModuleType]:
    for each in pkgutil.walk_packages([str(ROOT)], f"{ROOT.name}."):
        # Only Alembic can import a migration.
        if ".versions." not in each.name:
            yield importlib.import_module(each.name)


def _shared(kind: type) -> Iterator[tuple[str, set[str]]]:
    """Yield each class of a library among a class's ancestors, with the private names that it
    shares with this package's classes.
    """
    ours = {
        name
        for each in kind.__mro__
        if each.__module__.startswith(ROOT.name)
        for name in _names_in(each)
        if PRIVATE.fullmatch(name)
    }
    for each in kind.__mro__:
        top = each.__module__.partition(".")[0]
        if top != ROOT.name and top not in sys.stdlib_module_names:
            shared = ours & _names_in(each)
            ours -= shared
            if shared:
                yield _public(each), shared


@cache
def _names_in(kind: type) -> frozenset[str]:
    """Return the names that a class's source defines or uses on itself."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        # The class is written in C, so it has no Python source.
        return frozenset(vars(kind))
    used = re.findall(r"(?:self|cls|celerys|super\(\))\.(\w+)", source)
    return frozenset({*used, *(name for name in vars(kind) if name in source)})


def _public(kind: type) -> str:
    """Return the name by which ``compat`` lists a class."""
    for name in compat.OVERRIDDEN:
        module, _, own = name.partition(":")
        if getattr(sys.modules.get(module), own, None) is kind:
            return name
    return f"{kind.__module__}:{kind.__qualname__}"
