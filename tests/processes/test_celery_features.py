"""Singletons in Celery's chains, groups and chords, and with Celery's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import VERSION, Celery, chain, chord, group

from celery_singleton_state import SingletonError, SingletonErrorReason
from tests.helpers.fleet import Fleet, outcome


@pytest.fixture
def app(fleet: Fleet, client: Callable[[], Celery]) -> Celery:
    fleet.start("-c", "3")
    return client()


def hold_lease(tmp_path: Any, app: Celery, fleet: Fleet) -> tuple[Any, Any]:
    """Start a run that holds the lease, so that other deliveries are skipped.

    Return a path and the run's result. The run ends when a file is made at this path.
    """
    go = tmp_path / "go"
    result = app.send_task("held_and_skipped", (str(go),))
    fleet.wait_for_notes("enter")
    return go, result


def test_a_singleton_in_a_chain(app: Celery) -> None:
    steps = chain(app.signature("increment"), app.signature("plain_add", (10,)), app=app)
    assert outcome(steps.apply_async()) == 11


def test_a_chain_continues_after_a_skipped_singleton(
    app: Celery, fleet: Fleet, tmp_path: Any
) -> None:
    """With celery-singleton a duplicate ends its chain (its issue 19)."""
    go, held = hold_lease(tmp_path, app, fleet)
    steps = chain(app.signature("held_and_skipped"), app.signature("plain_add", (10,)), app=app)
    assert outcome(steps.apply_async()) == 10
    go.touch()
    assert outcome(held) == "ran"


def test_singletons_in_a_group(app: Celery) -> None:
    members = [app.signature("keyed", (n,)) for n in range(3)]
    results = group(members, app=app).apply_async()
    assert [outcome(result) for result in results] == [1, 2, 3]


def test_a_chord_with_a_skipped_member_completes(app: Celery, fleet: Fleet, tmp_path: Any) -> None:
    go, held = hold_lease(tmp_path, app, fleet)
    header = [app.signature("plain_add", (5,)), app.signature("held_and_skipped")]
    result = chord(header, app=app)(app.signature("plain_add"))
    assert outcome(result) == 5
    go.touch()
    assert outcome(held) == "ran"


def test_a_singleton_with_a_countdown(app: Celery) -> None:
    assert outcome(app.send_task("increment", countdown=0.1)) == 1


def test_a_singleton_whose_result_is_ignored(app: Celery, fleet: Fleet) -> None:
    app.send_task("increment", ignore_result=True)
    fleet.wait_for_notes("leave")
    assert outcome(app.send_task("increment")) == 2


@pytest.mark.skipif(VERSION < (5, 5), reason="came with Celery 5.5")
def test_a_singleton_with_pydantic_arguments(app: Celery) -> None:
    """Two values of a model are two singletons, each with its own state."""
    answers = [outcome(app.send_task("modelled", ({"number": n},))) for n in (7, 7, 8)]
    assert [answer["number"] for answer in answers] == [8, 9, 9]


def test_a_class_based_singleton(app: Celery) -> None:
    assert [outcome(app.send_task("class_based", kwargs={"by": 2})) for _ in range(2)] == [2, 4]


@pytest.mark.parametrize("pool", ["prefork", "solo"])
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_an_error_reaches_the_caller_with_its_class_and_arguments(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Any,
    serializer: str,
    pool: str,
) -> None:
    """With celery-singleton an error that cannot be unpickled kills the worker (its issue 55)."""
    fleet = make_fleet(TEST_SERIALIZER=serializer)
    app = client()
    fleet.start("-P", pool, "-c", "1")
    for reason in SingletonErrorReason:
        error = outcome(app.send_task("raises", (str(reason),)))
        expected = SingletonError.from_reason(reason, "elsewhere", "as told")
        assert type(error) is type(expected)
        assert error.args == expected.args
        assert (error.reason, error.retryable) == (reason, expected.retryable)
