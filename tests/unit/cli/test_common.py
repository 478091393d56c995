"""Wrong values on the command line: each ends the command with one line, without a traceback."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery
from click.testing import CliRunner, Result

from celery_singleton_state.cli import singleton


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the signal handlers that a command has replaced."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(app: Celery, *words: str) -> Result:
    return CliRunner().invoke(singleton, words, obj=SimpleNamespace(app=app))


@pytest.mark.parametrize(
    "words",
    [
        *(("exporter", "--port", each) for each in ("99999", "-1", "x", "", "1e3", "9" * 5000)),
        *(("exporter", "--allowed-host", each) for each in ("", "a b", "a:80", "http://a")),
        *(("next", "entry", "-n", each) for each in ("-1", "0", "x", "nan", "10001", "9" * 5000)),
        *(("prune", "--older-than", each) for each in ("nan", "inf", "1e400", "-1", "9" * 5000)),
        *(("prune", "--older-than", "1d", "--batch", each) for each in ("0", "-1", "1e9", "nan")),
    ],
)
def test_an_invalid_option_value_is_refused(memory_app: Celery, words: tuple[str, ...]) -> None:
    answer = run(memory_app, *words)
    assert answer.exit_code == 2
    assert "Error: Invalid value for" in answer.output


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 70, "..", "192.0.2.1"])
def test_the_exporter_names_a_host_that_it_cannot_listen_at(memory_app: Celery, host: str) -> None:
    answer = run(memory_app, "exporter", "--host", host, "--port", "0")
    assert answer.exit_code == 1
    assert answer.output.startswith(f"Error: cannot listen at {host}:0: ")
    assert answer.output.count("\n") == 1


@pytest.mark.parametrize("library", ["jinja2", "prometheus_client"])
def test_the_exporter_without_its_libraries(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """The package was installed without its ``exporter`` extra."""
    for name in list(sys.modules):
        if name.startswith("celery_singleton_state.exporter"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    answer = run(memory_app, "exporter", "--port", "0")
    assert answer.exit_code == 1
    assert answer.output.startswith("Error: the exporter needs a library: ")
    assert library in answer.output
    assert answer.output.endswith("; install celery-singleton-state[exporter]\n")


def test_the_exporter_names_a_port_that_is_in_use(memory_app: Celery) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = run(memory_app, "exporter", "--port", str(port))
    assert answer.exit_code == 1
    assert answer.output.startswith(f"Error: cannot listen at 127.0.0.1:{port}: ")


def test_the_exporter_names_an_included_module_that_is_missing(memory_app: Celery) -> None:
    memory_app.conf.include = ["nowhere.at_all"]
    answer = run(memory_app, "exporter", "--host", "nowhere.invalid")
    assert answer.exit_code == 1
    assert answer.output == (
        "Error: a module of the app cannot be imported: No module named 'nowhere'\n"
    )


def test_commands_know_the_tasks_of_included_modules(
    memory_app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``health`` needs these tasks, because a task's options decide whether its singleton is
    healthy.
    """
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "with_a_task.py").write_text(
        "from celery import current_app\n"
        "from celery_singleton_state import singleton_task\n"
        "@singleton_task(current_app, name='never', expected_interval=0.001)\n"
        "def never(self): ...\n"
    )
    memory_app.set_current()
    memory_app.conf.singleton_startup_grace = 0
    memory_app.conf.include = ["with_a_task"]
    answer = run(memory_app, "health")
    assert (answer.exit_code, answer.output[:19]) == (1, "never: it never ran")


def test_an_included_module_that_fails_ends_health_only(
    memory_app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``health`` would answer wrongly without the tasks of that module. The other commands print a
    warning and continue.
    """
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text("1 / 0")
    memory_app.conf.include = ["broken_module"]
    answer = run(memory_app, "health")
    assert answer.exit_code == 1
    why = "a module of the app cannot be imported: ZeroDivisionError: division by zero\n"
    assert answer.output == f"Error: {why}"
    answer = run(memory_app, "ls")
    assert answer.exit_code == 0
    assert answer.output == f"warning: {why}no singleton has run yet\n"
