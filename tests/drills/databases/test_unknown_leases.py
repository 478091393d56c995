"""A live process can hold a lease without knowing it. It soon releases such a lease.

An ordinary life is 20 s here, and the tasks' leases live for ten minutes. If a lease becomes free
within 20 s, it was released and has not expired.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import Celery

from celery_singleton_state import StateLoadFailed
from celery_singleton_state.history import decode
from tests.helpers.fleet import outcome
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres
from tests.helpers.shop import Shop

#: Seconds within which the lease must be released: less than an ordinary life.
SOON = 15


@pytest.fixture
def shop(own_server: Postgres | MariaDB, make_shop: Callable[..., Shop]) -> Shop:
    made = make_shop(
        own_server,
        CELERY_SINGLETON_HEARTBEAT_INTERVAL=4,
        CELERY_SINGLETON_HEARTBEAT_THRESHOLD=5,
    )
    made.start()
    return made


def test_all_answers_to_an_acquisition_are_lost(shop: Shop, client: Callable[[], Celery]) -> None:
    """The lease is acquired, but all answers are lost, so the process does not know that it holds
    the lease.
    """
    app, name = client(), "long steps, not retried"
    for _ in range(3):
        shop.proxy.lose_answer_to(b"unanswered-message")
    error = outcome(app.send_task(name, (["copy"],), task_id="unanswered-message"))
    assert isinstance(error, StateLoadFailed)
    shop.wait_released(name, SOON)
    assert outcome(app.send_task(name, (["copy"],))) == 1


def test_the_last_answer_to_a_release_is_lost(shop: Shop, client: Callable[[], Celery]) -> None:
    """The release is lost on its way to the store, which then refuses connections, so the run does
    not learn the outcome of its save. The lease is released as soon as the store answers again.
    """
    app, name = client(), "long steps, not retried"
    shop.proxy.lose_answer_to(b"unsaved", then="refuse")
    held = shop.proxy.hold(b"unsaved")
    result = app.send_task(name, (["copy"], ["mark", "unsaved"]))
    held.wait()
    shop.proxy.mode = "refuse"
    shop.proxy.cut()
    held.forget()
    assert isinstance(outcome(result), Exception)
    shop.proxy.mode = "pass"
    shop.wait_released(name, SOON)
    assert outcome(app.send_task(name, (["copy"],))) == 2
    assert shop.rows() == [1, 2]


@pytest.mark.parametrize(
    "headers",
    [
        {"singleton_due": "yesterday", "singleton_entry": "nightly"},
        {"singleton_due": "2026-01-01T00:00:00+00:00"},
        {"singleton_retries": "x"},
        {"singleton_waited": "x"},
        {"singleton_requeued": "x"},
    ],
    ids=lambda headers: "+".join(headers),
)
def test_a_message_with_a_malformed_header_leaves_no_lease(
    shop: Shop, client: Callable[[], Celery], headers: dict[str, str]
) -> None:
    """A message has a malformed header, which may cause an error between acquisition and body. The
    lease is released all the same.
    """
    app, name = client(), "long steps, not retried"
    outcome(app.send_task(name, (["copy"],), headers=headers))
    shop.wait_released(name, SOON)
    copied = len(shop.rows())
    assert outcome(app.send_task(name, (["copy"],))) == copied + 1


@pytest.mark.parametrize(
    "text", ["half an emoji: \ud83d", "a zero: \0", "long: " + "\ud83d" * 1000]
)
def test_a_body_raises_an_error_whose_text_cannot_be_stored(
    shop: Shop, client: Callable[[], Celery], text: str
) -> None:
    """The failure is recorded in the row's history, although its text cannot be stored as it is.
    The next run gets the lease at once.
    """
    app, name = client(), "long steps, not retried"
    assert isinstance(outcome(app.send_task(name, (["copy"], ["fail", text]))), ValueError)
    shop.wait_released(name, SOON)
    row = shop.row(name)
    assert row is not None
    (failed,) = decode(row.history, name)
    assert (failed.outcome, row.last_outcome) == ("failed", "failed")
    assert str(failed.error).startswith(f"ValueError: {text.split()[0]}")
    assert outcome(app.send_task(name, (["copy"],))) == 2
