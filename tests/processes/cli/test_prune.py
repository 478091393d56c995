"""The command ``celery singleton prune``, run as an operator runs it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable

import pytest
from celery import Celery

from celery_singleton_state.kv import KeyValueStore
from celery_singleton_state.store.base import Ended
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.fleet import Fleet, outcome

PREFIX = "singleton-state:"
LONG_AGO = "'2001-01-01 00:00:00.000+00:00'"


def prune(fleet: Fleet, *options: str) -> subprocess.CompletedProcess[str]:
    return fleet.command("singleton", "prune", "--older-than", "30d", *options)


def output_of(answer: subprocess.CompletedProcess[str], status: int = 0) -> str:
    assert answer.returncode == status, answer.stderr
    assert "Traceback" not in answer.stderr
    return answer.stdout if status == 0 else answer.stderr


def old(store: SqlStore, *names: str) -> None:
    """Make singletons that ran once, years ago."""
    for name in names:
        task = re.match(r"[a-z_]+", name)[0]
        acquired = store.acquire(PREFIX + name, "host:1:a.1", 60, None, task=task)
        assert acquired is not None
        assert store.release(acquired.lease, Ended("succeeded", "[]"))
    store._change(f"UPDATE kv_store SET updated_at = {LONG_AGO}, last_finished_at = {LONG_AGO}", {})


def names(store: SqlStore) -> list[str]:
    return [row.key.removeprefix(PREFIX) for row in store.list(PREFIX)]


def test_only_old_unused_keys_are_removed(
    fleet: Fleet, client: Callable[[], Celery], store: SqlStore, store_url: str
) -> None:
    """All keys are years old, and the keys of tasks with ``unique_on`` are removed.

    Kept are: a key that has just been run, a key whose lease was never released, and rows that
    belong to no task with ``unique_on``.
    """
    old(store, *(f'keyed{{"number":{n}}}' for n in range(1, 6)), 'raises{"reason":"x"}')
    old(store, "increment", 'gone{"a":1}', 'keyed_of_old{"number":1}', "keyed", "keyed7")
    assert store.acquire(PREFIX + 'keyed{"number":1}', "host:1:a.2", 0, None)
    a_users = PREFIX + 'keyed{"number":6}'
    with KeyValueStore(store_url) as users:
        users.set(a_users, "kept")
    store._change(f"UPDATE kv_store SET updated_at = {LONG_AGO}", {})
    fleet.start("-P", "solo")
    assert outcome(client().send_task("keyed", (2,))) == 3
    answer = prune(fleet, "--yes", "--batch", "2")
    assert output_of(answer) == ("keyed: 4 unused keys\nraises: 1 unused key\n5 keys removed\n")
    assert "singleton keyed 4 keys pruned by " in answer.stderr
    assert "singleton raises 1 key pruned by " in answer.stderr
    assert answer.stderr.count("pruned by") == 2
    assert names(store) == [
        *('gone{"a":1}', "increment", "keyed"),
        *('keyed_of_old{"number":1}', 'keyed{"number":1}', 'keyed{"number":2}'),
    ]
    with KeyValueStore(store_url) as users:
        assert users.get(a_users) == "kept"
    assert outcome(client().send_task("keyed", (3,))) == 4, (
        "a removed key begins with its initial state"
    )


def test_prune_with_json_output(fleet: Fleet, store: SqlStore) -> None:
    old(store, 'keyed{"number":1}', 'keyed{"number":2}', 'raises{"reason":"x"}', 'gone{"a":1}')
    by_task = {"keyed": 2, "raises": 1}
    dry = json.loads(output_of(prune(fleet, "--dry-run", "--json")))
    assert dry == {"removed": 0, "by_task": by_task}
    assert len(names(store)) == 4
    done = json.loads(output_of(prune(fleet, "--yes", "--json")))
    assert done == {"removed": 3, "by_task": by_task}
    assert names(store) == ['gone{"a":1}']
    nothing = json.loads(output_of(prune(fleet, "--json")))
    assert nothing == {"removed": 0, "by_task": {}}


def test_prune_asks_first(fleet: Fleet, store: SqlStore) -> None:
    old(store, 'keyed{"number":1}')
    for more, question in (((), "stdout"), (("--json",), "stderr")):
        no = subprocess.run(
            fleet.celery("singleton", "prune", "--older-than", "30d", *more),
            env=fleet.environment,
            input="n\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert no.returncode == 1
        assert "Remove 1 key, and their states?" in getattr(no, question)
    assert names(store) == ['keyed{"number":1}']


def test_a_dry_run_removes_nothing(fleet: Fleet, store: SqlStore) -> None:
    old(store, 'keyed{"number":1}')
    assert output_of(prune(fleet, "--dry-run")) == "keyed: 1 unused key\n"
    assert names(store) == ['keyed{"number":1}']


def test_prune_of_one_task_only(fleet: Fleet, store: SqlStore) -> None:
    old(store, 'keyed{"number":1}', 'raises{"reason":"x"}', "keyed7")
    assert output_of(prune(fleet, "--task", "keyed", "--yes")) == (
        "keyed: 2 unused keys\n2 keys removed\n"
    )
    assert names(store) == ['raises{"reason":"x"}']


def test_nothing_to_remove(fleet: Fleet, store: SqlStore) -> None:
    old(store, "increment")
    answer = prune(fleet)
    assert output_of(answer) == "there is nothing to remove\n"
    assert "pruned" not in answer.stderr


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ((), 2, "Missing option '--older-than'"),
        (("--older-than", "30x"), 2, "'30x' is not an age; write days, hours, minutes or seconds"),
        (("--older-than", "0"), 2, "above 0 and up to 36500d"),
        (("--older-than", "1d", "--batch", "0"), 2, "--batch"),
        (("--older-than", "1d", "--task", "gone"), 1, "this app has no singleton task 'gone'"),
        (("--older-than", "1d", "--task", "plain_add"), 1, "no singleton task 'plain_add'"),
        (("--older-than", "1d", "--task", "increment"), 1, "task increment has no unique_on"),
    ],
)
def test_wrong_options_of_prune_are_refused(
    fleet: Fleet, store: SqlStore, options: tuple[str, ...], status: int, text: str
) -> None:
    answer = output_of(fleet.command("singleton", "prune", *options, "--yes"), status)
    assert text in " ".join(answer.split())


def test_prune_with_an_unavailable_store(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet("postgresql://nobody@127.0.0.1:1/none", CELERY_SINGLETON_AUTO_MIGRATE="0")
    assert output_of(prune(fleet, "--yes"), 1).startswith("Error: ")
