"""Whose keys ``celery singleton prune`` may remove, and what it takes for an age."""

from __future__ import annotations

from collections.abc import Sequence
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
def test_an_age(text: str, seconds: float) -> None:
    assert as_seconds(None, None, text) == seconds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "d", "30x", "30 d", "-1d", "1.5h", "0", "0d", "36501d", "9" * 5000, "٣d", "1d2h"]
)
def test_no_age(text: str) -> None:
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


def old(app: Celery, *names: str) -> Runtime:
    runtime = runtime_of(app)
    runtime.store.wishes.expect([row_key(PREFIX, name) for name in names])
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
        ("chosen2[1]", "chosen2"),
        ('one2{"a":1}', "one2"),
    ],
)
def test_the_key_of_a_task_with_unique_on(app: Celery, name: str, task: str) -> None:
    found = find_unused(old(app, name), DAY, None)
    assert found.by_task == {task: [row_key(PREFIX, name)]}
    assert not found.passed_over


@pytest.mark.parametrize("name", ["one", 'one{"a":1}', "plain", "plain[1]", "by_name", "chosen2"])
def test_the_row_of_a_known_task_that_is_no_key_of_unique_on(app: Celery, name: str) -> None:
    """It never had one, has it no longer, or has it only now."""
    found = find_unused(old(app, name), DAY, None)
    assert not found.by_task
    assert not found.passed_over


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gone", "gone"),
        ('by_name_of_old{"a":1}', "by_name_of_old"),
        ('by_nam{"a":1}', "by_nam"),
        ("by_name7", "by_name7"),
        ("chosen7", "chosen7"),
        ("chosentrue", "chosentrue"),
    ],
)
def test_what_may_be_of_a_task_that_is_not_known(app: Celery, name: str, task: str) -> None:
    found = find_unused(old(app, name), DAY, None)
    assert not found.by_task
    assert found.passed_over == {task: 1}


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("chosen", ['chosen"x"', "chosen-1.5e+300", "chosen7", "chosenfalse", "chosennull"]),
        ("chosen2", ["chosen2[1]"]),
        ("by_name", ['by_name{"a":1}']),
    ],
)
def test_the_keys_of_one_task(app: Celery, task: str, names: Sequence[str]) -> None:
    """What a callable chose may be a bare number: that this is no task is for an operator to say,
    unless it is one.
    """
    every = ('chosen"x"', "chosen7", "chosenfalse", "chosennull", "chosen-1.5e+300", "chosen2")
    others = ("chosen_of_old", 'chosen_of_old{"a":1}', "chosen2[1]", 'by_name{"a":1}', "by_name7")
    found = find_unused(old(app, *every, *others), DAY, task)
    assert found.by_task == {task: [row_key(PREFIX, name) for name in names]}
    assert not found.passed_over


def test_what_was_removed_before_the_store_went_away_is_told(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = old(app, *(f'by_name{{"a":{n}}}' for n in range(5)))
    unused = find_unused(runtime, DAY, None)
    batches: list[Sequence[str]] = []
    real = runtime.store.prune

    def once(keys: Sequence[str], older_than: float) -> Sequence[str]:
        batches.append(keys)
        if len(batches) > 1:
            raise StoreUnavailable("as told")
        return real(keys, older_than)

    monkeypatch.setattr(runtime.store, "prune", once)
    told: list[Changed] = []
    monkeypatch.setattr(runtime.door, "publish", told.append)
    with pytest.raises(StoreUnavailable):
        remove(runtime, unused, DAY, batch=2)
    assert [len(keys) for keys in batches] == [2, 2]
    assert [(each.singleton, each.key, each.what) for each in told] == [
        ("by_name", "by_name", "2 keys pruned")
    ]


def test_what_is_in_use_again_is_told(app: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    """A run begins between the question and the answer."""
    runtime = old(app, 'by_name{"a":1}', 'by_name{"a":2}')
    unused = find_unused(runtime, DAY, None)
    assert runtime.store.acquire(PREFIX + 'by_name{"a":1}', "host:1:a.1", 60, None)
    removed = remove(runtime, unused, DAY, batch=500)
    print_removed(unused, removed)
    assert capsys.readouterr().out == "1 key removed; 1 key in use again or gone\n"
