from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import HeartbeatFailed, RetryPolicy, SingletonTask, StateLoadFailed
from celery_singleton_state.config.retry import Fail, RetryAfter, answer_to, policy_of
from celery_singleton_state.errors import RETRYABLE_REASONS

FLAT = RetryPolicy(max_retries=2, backoff=1, backoff_max=5, jitter=False)
UNREACHABLE = StateLoadFailed("shop.run", "gone")


def test_a_retryable_reason_is_retried_with_doubling_delays() -> None:
    forever = RetryPolicy(max_retries=None, backoff=1, backoff_max=5, jitter=False)
    answers = [answer_to(UNREACHABLE, n, RETRYABLE_REASONS, {}, forever) for n in range(5)]
    assert answers == [RetryAfter(delay) for delay in (1, 2, 4, 5, 5)]


def test_the_task_fails_when_its_retries_are_used_up() -> None:
    assert answer_to(UNREACHABLE, 1, RETRYABLE_REASONS, {}, FLAT) == RetryAfter(2)
    assert answer_to(UNREACHABLE, 2, RETRYABLE_REASONS, {}, FLAT) == Fail()


def test_other_reasons_fail() -> None:
    lost = HeartbeatFailed("shop.run", "")
    assert answer_to(lost, 0, RETRYABLE_REASONS, {}, FLAT) == Fail()
    assert answer_to(lost, 0, {"HeartbeatFailed"}, {}, FLAT) == RetryAfter(1)


def test_a_reason_can_have_its_own_policy() -> None:
    own = {"StateLoadFailed": RetryPolicy(max_retries=9, backoff=7, jitter=False)}
    assert answer_to(UNREACHABLE, 0, RETRYABLE_REASONS, own, FLAT) == RetryAfter(7)


def test_jitter_stays_below_the_delay() -> None:
    delays = [RetryPolicy(backoff=2, jitter=True).delay(1) for _ in range(200)]
    assert all(0 <= delay <= 4 for delay in delays)
    assert max(delays) - min(delays) > 1


def test_a_very_large_count_does_not_overflow() -> None:
    assert RetryPolicy(backoff_max=600, jitter=False).delay(100_000) == 600


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, RetryPolicy(3, 1.0, 600.0, True)),
        ({"max_retries": None, "retry_jitter": False}, RetryPolicy(None, 1.0, 600.0, False)),
        ({"retry_backoff": 5, "retry_backoff_max": 60}, RetryPolicy(3, 5.0, 60.0, True)),
        (
            {"retry_backoff": False, "default_retry_delay": 30},
            RetryPolicy(3, 30.0, 30.0, False),
        ),
    ],
)
def test_celerys_retry_options_make_the_default_policy(
    options: dict[str, Any], expected: RetryPolicy
) -> None:
    app = Celery("shop", set_as_current=False)

    @app.task(base=SingletonTask, shared=False, **options)
    def run() -> None: ...

    assert policy_of(run) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_retries": -1},
        {"max_retries": "3"},
        {"backoff": float("nan")},
        {"backoff": -1},
        {"backoff_max": "long"},
    ],
)
def test_wrong_policies_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ImproperlyConfigured, match=f"RetryPolicy: {name}="):
        RetryPolicy(**wrong)
