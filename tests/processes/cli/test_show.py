"""The commands ``celery singleton ls`` and ``show``, run as an operator runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.fleet import Fleet, outcome

LS_FIELDS = {
    *("singleton", "key", "fence", "holder", "task_id", "expires_in", "schema_version"),
    *("run_count", "last_outcome", "last_finished_at", "healthy"),
}


def test_ls_before_the_first_run(fleet: Fleet) -> None:
    assert fleet.command("singleton", "ls").stdout == "no singleton has run yet\n"
    assert json.loads(fleet.command("singleton", "ls", "--json").stdout) == []


def test_ls_and_show(fleet: Fleet, client: Callable[[], Celery], tmp_path: Path) -> None:
    app = client()
    fleet.start("-c", "2")
    go = tmp_path / "go"
    assert outcome(app.send_task("increment")) == 1
    running = app.send_task("held", (str(go),))
    fleet.wait_for_notes("enter", 2)

    held, free = json.loads(fleet.command("singleton", "ls", "--json").stdout)
    assert set(held) == set(free) == LS_FIELDS
    assert (held["singleton"], held["key"]) == ("held", "singleton-state:held")
    assert held["task_id"] == running.id
    assert 0 < held["expires_in"] <= 8.01
    assert (free["singleton"], free["holder"], free["expires_in"]) == ("increment", None, None)
    assert (free["run_count"], free["last_outcome"]) == (1, "succeeded")
    assert free["fence"] <= time.time() * 1000
    assert free["last_finished_at"]

    table = fleet.command("singleton", "ls").stdout
    assert "increment" in table
    assert all(len(line) <= 80 for line in table.splitlines())

    shown = json.loads(fleet.command("singleton", "show", "increment", "--json").stdout)
    assert set(shown) == LS_FIELDS | {"value", "history"}
    assert shown["value"] == {"n": 1}
    assert [run["outcome"] for run in shown["history"]] == ["succeeded"]
    assert "succeeded" in fleet.command("singleton", "show", "increment").stdout
    go.touch()
    assert outcome(running) == "held"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("celery -A shop singleton ", {"ls", "show", "state", "release", "health", "exporter"}),
        ("celery -A shop singleton state s", {"set"}),
        ("celery -A shop singleton ls --w", {"--watch"}),
        ("celery -A shop singleton show incr", {"increment", "increment_or_raise"}),
        ("celery -A shop singleton show keyed", {"""'keyed{"key":"a"}'"""}),
        ("celery -A nothing singleton show incr", set()),
    ],
)
def test_a_shell_completes_commands_and_names(fleet: Fleet, typed: str, offered: set[str]) -> None:
    """The test asks by click's protocol, as bash does after `_CELERY_COMPLETE=bash_source
    celery`.
    """
    (fleet.directory / "shop.py").write_text("from tests.apps.tasks import app\n")
    store = open_store(fleet.environment["CELERY_SINGLETON_STORE_URL"], "kv_store", 5.0, 2, True)
    for name in ("increment", "increment_or_raise", 'keyed{"key":"a"}'):
        assert store.acquire(f"singleton-state:{name}", "other", 60, None)
    store.close()
    words = typed.split(" ")
    answer = subprocess.run(
        [Path(sys.executable).parent / "celery"],
        env=fleet.environment
        | {"_CELERY_COMPLETE": "bash_complete", "COMP_WORDS": typed}
        | {"COMP_CWORD": str(len(words) - 1)},
        cwd=fleet.directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.stderr == ""
    found = {line.partition(",")[2] for line in answer.stdout.split()}
    assert offered <= found if words[-1] == "" else offered == found


def test_show_of_an_unknown_name_suggests_a_name(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    app = client()
    fleet.start("-P", "solo")
    outcome(app.send_task("increment"))
    answer = fleet.command("singleton", "show", "incremnt")
    assert answer.returncode == 1
    assert "'incremnt' has not run yet; did you mean increment?" in answer.stderr


def test_characters_that_the_output_cannot_encode_are_escaped(fleet: Fleet) -> None:
    """Python would end a program that prints such a character. Control characters, which a terminal
    obeys, are escaped, too.
    """
    store = open_store(fleet.environment["CELERY_SINGLETON_STORE_URL"], "kv_store", 5.0, 2, True)
    for name in ("innocent", 'keyed{"key":"[/acme] [red]Ł\u202e\x9b"}'):
        assert store.acquire(f"singleton-state:{name}", "ó\x1b]0;title\x07", 60, "漢")
    store.close()

    def output_of(*arguments: str) -> str:
        answer = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "tests.apps.tasks", *arguments],
            env=fleet.environment | {"PYTHONIOENCODING": "ascii:strict"},
            capture_output=True,
            timeout=60,
        )
        assert (answer.returncode, answer.stderr) == (0, b"")
        return answer.stdout.decode("ascii")

    printed = r'keyed{"key":"[/acme] [red]\u0141\u202e\x9b"}'
    listed = output_of("singleton", "ls")
    assert f" {printed} " in listed
    assert " innocent " in listed
    assert all(each == "\n" or each.isprintable() for each in listed)
    assert r"\xf3\x1b]0;title\x07, " in output_of("singleton", "show", printed)


def test_an_unavailable_store_is_one_line(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet("postgresql://nobody@127.0.0.1:1/none", CELERY_SINGLETON_AUTO_MIGRATE="0")
    answer = fleet.command("singleton", "ls")
    assert answer.returncode == 1
    assert answer.stderr.startswith("Error: ")
    assert "Traceback" not in answer.stderr
