"""``celery singleton prune``: which keys it may remove, and which ages it accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
import pytest
from celery import Celery

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.cli.prune import as_seconds, find_unused, print_removed, remove
from celery_singleton_state.hooks import Changed
from celery_singleton_state.keys import row_key
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.store.base import StoreUnavailable

DAY = 86_400.0
PREFIX = "singleton-state:"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30d", 30 * DAY),
        ("12h", DAY / 2),
        ("90m", 5400),
        ("45s", 45),
        ("45", 45),
        ("36500d", 3.1536e9),
    ],
)
def test_an_age_is_a_number_with_or_without_a_unit(text: str, seconds: float) -> None:
    assert as_seconds(None, None, text) == seconds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "d", "30x", "30 d", "-1d", "1.5h", "0", "0d", "36501d", "9" * 5000, "٣d", "1d2h"]
)
def test_other_ages_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="30d, 12h, 90m, 45s or 45"):
        as_seconds(None, None, text)  # type: ignore[arg-type]


@pytest.fixture
def app(memory_app: Celery) -> Celery:
    def of(name: str, unique_on: Any = None) -> None:
        @singleton_task(memory_app, name=name, unique_on=unique_on, shared=False)
        def body(self: SingletonTask, a: int = 0) -> None: ...

    of("by_name", ["a"])
    of("chosen", lambda a: a)
    of("chosen2", lambda a: a)
    of("one")
    of("one2", "*")

    @memory_app.task(name="plain", shared=False)
    def plain() -> None: ...

    memory_app.finalize()
    return memory_app


def old(app: Celery, tasks: Mapping[str, str]) -> Runtime:
    """Return a runtime whose store has singletons that were last used in 2001.

    :param tasks: maps the name of each singleton to the name of its task.
    """
    runtime = runtime_of(app)
    runtime.store.requests.expect({row_key(PREFIX, name): task for name, task in tasks.items()})
    runtime.store._change("UPDATE kv_store SET updated_at = '2001-01-01 00:00:00.000+00:00'", {})
    return runtime


LONG_TEXT = "x" * 300


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ('by_name{"a":1}', "by_name"),
        (f'by_name{{"a":"{LONG_TEXT}"}}', "by_name"),
        ('chosen"x"', "chosen"),
        (f'chosen"{LONG_TEXT}"', "chosen"),
        ("chosen[1]", "chosen"),
        ("chosen7", "chosen"),
        ("chosen2", "chosen"),
        ("chosen2[1]", "chosen2"),
        ('one2{"a":1}', "one2"),
    ],
)
def test_an_old_key_of_a_task_with_unique_on_can_be_removed(
    app: Celery, name: str, task: str
) -> None:
    """The task is read from the row, because a key can be ambiguous: ``chosen2`` can be a key of
    the task ``chosen``, whose callable chose the number 2.
    """
    runtime = old(app, {name: task})
    assert find_unused(runtime, DAY, None) == {task: [row_key(PREFIX, name)]}
    assert find_unused(runtime, DAY, task) == {task: [row_key(PREFIX, name)]}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("one", "one"),
        ('one{"a":1}', "one"),
        ("plain[1]", "plain"),
        ("by_name", "by_name"),
        ("chosen2", "chosen2"),
        ('gone{"a":1}', "gone"),
        ('by_name_of_old{"a":1}', "by_name_of_old"),
        ("chosen7", "chosen7"),
    ],
)
def test_a_row_that_is_no_key_of_unique_on_is_kept(app: Celery, name: str, task: str) -> None:
    """The row's task has no ``unique_on``, had none when the row was made, has one no longer, or is
    not in the app.
    """
    assert find_unused(old(app, {name: task}), DAY, None) == {}


def test_a_row_without_its_tasks_name_is_kept(app: Celery) -> None:
    runtime = old(app, {})
    assert runtime.store.requests.claim(PREFIX + 'by_name{"a":1}', "id", 0, 0)
    runtime.store._change("UPDATE kv_store SET updated_at = '2001-01-01 00:00:00.000+00:00'", {})
    assert runtime.store.unused(PREFIX, DAY) == {PREFIX + 'by_name{"a":1}': None}
    assert find_unused(runtime, DAY, None) == {}


def test_the_keys_of_one_task_are_found(app: Celery) -> None:
    tasks = {'chosen"x"': "chosen", "chosen7": "chosen", "chosen2[1]": "chosen2", "gone": "gone"}
    assert find_unused(old(app, tasks), DAY, "chosen") == {
        "chosen": [row_key(PREFIX, name) for name in ('chosen"x"', "chosen7")]
    }


def test_keys_removed_before_the_store_became_unavailable_are_reported(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = old(app, {f'by_name{{"a":{n}}}': "by_name" for n in range(5)})
    unused = find_unused(runtime, DAY, None)
    batches: list[Sequence[str]] = []
    real = runtime.store.prune

    def once(keys: Sequence[str], older_than: float) -> Sequence[str]:
        batches.append(keys)
        if len(batches) > 1:
            raise StoreUnavailable("gone")
        return real(keys, older_than)

    monkeypatch.setattr(runtime.store, "prune", once)
    reported: list[Changed] = []
    monkeypatch.setattr(runtime.dispatcher, "publish", reported.append)
    with pytest.raises(StoreUnavailable):
        remove(runtime, unused, DAY, batch=2)
    assert [len(keys) for keys in batches] == [2, 2]
    assert [(each.singleton, each.key, each.what) for each in reported] == [
        ("by_name", "by_name", "2 keys pruned")
    ]


def test_a_key_that_is_in_use_again_is_reported(
    app: Celery, capsys: pytest.CaptureFixture[str]
) -> None:
    """``prune`` finds two old keys. A run acquires the lease of one. ``prune`` removes only the
    other.
    """
    runtime = old(app, {'by_name{"a":1}': "by_name", 'by_name{"a":2}': "by_name"})
    unused = find_unused(runtime, DAY, None)
    assert runtime.store.acquire(PREFIX + 'by_name{"a":1}', "host:1:a.1", 60, None)
    removed = remove(runtime, unused, DAY, batch=500)
    print_removed(unused, removed)
    assert capsys.readouterr().out == "1 key removed; 1 key in use again or gone\n"
