"""Decide whether a message is retried after a :exc:`SingletonError`, and after which delay.

The decision is a value, :class:`RetryAfter` or :class:`Fail`. The caller carries it out.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from celery_singleton_state.errors import SingletonError

from .checks import checked, checks_of, either, nothing, seconds, switch, whole


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after which delays, a message is retried after a :exc:`SingletonError`.

    The parameters correspond to the options ``max_retries``, ``retry_backoff``,
    ``retry_backoff_max`` and ``retry_jitter`` of Celery's tasks.

    :param max_retries: how often a message is retried at most. All retries of the message count,
        whatever their reasons. ``None``: no limit. Default 3.
    :param backoff: seconds before the first retry; the delay doubles with each further retry.
        Default 1.
    :param backoff_max: the longest delay, in seconds. Default 600.
    :param jitter: true (the default): the delay is random, from zero to the delay that the backoff
        gives. False: the delay is exactly what the backoff gives.
    :raises ImproperlyConfigured: a value is not allowed.
    """

    max_retries: Annotated[int | None, either(whole(0), nothing)] = 3
    backoff: Annotated[float, seconds()] = 1.0
    backoff_max: Annotated[float, seconds()] = 600.0
    jitter: Annotated[bool, switch] = True

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = checked("RetryPolicy", name, getattr(self, name), check)
            object.__setattr__(self, name, value)

    def delay(self, retries: int) -> float:
        """Return the delay before the next retry of a message, in seconds.

        :param retries: how often the message has been retried so far.
        """
        full = min(self.backoff * 2 ** min(retries, 64), self.backoff_max)
        return random.uniform(0, full) if self.jitter else full


_CHECKS = checks_of(RetryPolicy)


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """The decision that a message is retried, after this many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Fail:
    """The decision that a message is not retried, so that it fails."""


def answer_to(
    error: SingletonError,
    retries: int,
    reasons: Collection[str],
    policies: Mapping[str, RetryPolicy],
    usual: RetryPolicy,
) -> RetryAfter | Fail:
    """Decide whether a message is retried after an error.

    :param retries: how often the message has been retried so far.
    :param reasons: the names of the error reasons after which the message may be retried.
    :param policies: maps the names of some reasons to their retry policies.
    :param usual: the retry policy of all other reasons.
    """
    if error.reason not in reasons:
        return Fail()
    policy = policies.get(error.reason, usual)
    if policy.max_retries is not None and retries >= policy.max_retries:
        return Fail()
    return RetryAfter(policy.delay(retries))


def policy_of(task: Any) -> RetryPolicy:
    """Return the retry policy that a task's Celery options, such as ``max_retries``, describe.

    A ``retry_backoff`` that is not set counts as true. If ``retry_backoff`` is false, each delay is
    the task's ``default_retry_delay``, as in Celery.
    """
    backoff = getattr(task, "retry_backoff", True)
    if not backoff:
        delay = float(task.default_retry_delay)
        return RetryPolicy(task.max_retries, delay, delay, jitter=False)
    return RetryPolicy(
        task.max_retries,
        max(1.0, float(backoff)),
        float(getattr(task, "retry_backoff_max", 600)),
        bool(getattr(task, "retry_jitter", True)),
    )
