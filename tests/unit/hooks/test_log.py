"""Log lines: text from outside the package neither ends a line nor begins another."""

from __future__ import annotations

import ast
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

import celery_singleton_state
from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.hooks import Lost, log
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.text.visible import logger_of
from tests.helpers.waiting import wait_until

FORGED = (
    "id\r\n[2026-11-28 03:00:00,000: CRITICAL/MainProcess] forged\x1b[31m\u202e\x85\x9b\u2028\u2800"
)
PACKAGE = Path(celery_singleton_state.__file__).parent


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Everything that the package logs during the test, formatted as for a log file."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s:%(name)s: %(message)s"))
    logger = logging.getLogger("celery_singleton_state")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(before)


def is_clean(text: str) -> bool:
    return all(line.isprintable() and "\u2800" not in line for line in text.split("\n"))


def test_all_loggers_are_made_by_one_function() -> None:
    """The function ``logger_of`` adds a filter that escapes control characters. A logger that a
    module made by itself would lack the filter.
    """
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or path.name == "visible.py":
                continue
            called = ast.unparse(node.func)
            if called.rsplit(".", 1)[-1] in ("getLogger", "get_logger", "get_task_logger"):
                assert ast.unparse(node) == "logging.getLogger('alembic')", path


def test_a_run_cannot_forge_a_log_line(memory_app: Celery, lines: io.StringIO) -> None:
    """Line breaks and control characters are in the run's task id, key, holder and error, and in an
    error of a hook.
    """

    @singleton_task(memory_app, name="t", unique_on=["key"], on_conflict="skip", shared=False)
    def t(self: SingletonTask[Any], key: str, error: bool = False) -> None:
        if error:
            raise ValueError(FORGED)
        # This inner delivery has the same key, so it conflicts with the run around it.
        t.apply(args=(key,), task_id=f"other {FORGED}")

    def hook(details: Any) -> None:
        raise ValueError(FORGED) from KeyError(FORGED)

    memory_app.conf.singleton_hooks = [hook]
    memory_app.finalize()
    t.apply(args=(FORGED,), task_id=FORGED)
    t.apply(args=(FORGED, True), task_id=FORGED)
    runtime = runtime_of(memory_app)
    (row,) = runtime.store.list(runtime.settings.key_prefix)
    log.write(Lost(singleton="t", key=row.key, holder=FORGED, fence=1, seconds=1.0, why=FORGED))
    wait_until(lambda: "a hook failed" in lines.getvalue(), "the hook is called")
    found = lines.getvalue()
    assert "skipped" in found
    assert "Traceback" in found
    assert "forged" in found
    assert is_clean(found)
    # Only tracebacks have more than one line.
    assert not [line for line in found.split("\n") if line.startswith(("[", "id"))]


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("template", "arguments", "line"),
    [
        ("%s", ("a\nb",), r"a\x0ab"),
        ("%r", ("a\nb'\u2800",), r'''"a\nb'\u2800"'''),
        ("%r and %s", ("plain\\", "Łódź\\x"), r"'plain\\' and Łódź\x"),
        ("%d, %.3f, %5.1f", (1, 2.0, 3), "1, 2.000,   3.0"),
        ("%s: %r", (ValueError("a\nb"), ValueError("a\nb")), r"a\x0ab: ValueError('a\nb')"),
        ("%s", (["\x85", {"\u202e": "\n"}],), r"['\x85', {'\u202e': '\n'}]"),
        ("%.3s|%-4s|", ("a\x1bcd", "a"), "a\\x|a   |"),
        ("%(one)s", ({"one": "\x07"},), r"\x07"),
        ("%s", (b"\n",), r"b'\n'"),
        ("%%", (), "%%"),
    ],
)
def test_arguments_are_escaped_and_formats_kept(
    lines: io.StringIO, template: str, arguments: tuple[Any, ...], line: str
) -> None:
    logger_of("celery_singleton_state.test").info(template, *arguments)
    assert lines.getvalue() == f"INFO:celery_singleton_state.test: {line}\n"


def test_tracebacks_keep_their_lines_and_escape_their_texts(lines: io.StringIO) -> None:
    logger = logger_of("celery_singleton_state.test")
    inner = ExceptionGroup(FORGED, [KeyError(FORGED), OSError(FORGED)])
    inner.add_note(FORGED)
    try:
        try:
            raise inner
        except ExceptionGroup as group:
            raise ValueError(FORGED) from group
    except ValueError:
        logger.exception("it failed: %s", FORGED)
    found = lines.getvalue()
    assert is_clean(found)
    assert found.count("in test_tracebacks_keep") == 2
    assert found.count("forged") == 6
    for kind in ("ValueError: id", "ExceptionGroup: id", "OSError: id", "KeyError: "):
        assert kind in found
    assert not [line for line in found.split("\n") if line.startswith(("[", "id"))]


def test_an_argument_whose_str_raises_breaks_nothing(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger_of("celery_singleton_state.test").info("%s", Odd())
    assert lines.getvalue() == ""
