"""How a failure of the singleton is answered: a value, worked out here, carried out once."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from celery_singleton_state.errors import SingletonError

from .checks import checked, checks_of, either, nothing, seconds, switch, whole


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How one reason is retried, in Celery's own terms.

    :param max_retries: retries of the message at most, counted as Celery counts them, whatever
        their reasons; ``None`` for no limit.
    :param backoff: seconds before the first retry, doubled for each further one.
    :param backoff_max: seconds that the delay never exceeds.
    :param jitter: whether the delay is drawn evenly from zero to what the backoff says.
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
        """Seconds before the next try of a message that was retried so often."""
        full = min(self.backoff * 2 ** min(retries, 64), self.backoff_max)
        return random.uniform(0, full) if self.jitter else full


_CHECKS = checks_of(RetryPolicy)


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Answer: try the message again after this many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Fail:
    """Answer: the message fails."""


def answer_to(
    error: SingletonError,
    retries: int,
    reasons: Collection[str],
    policies: Mapping[str, RetryPolicy],
    usual: RetryPolicy,
) -> RetryAfter | Fail:
    """How a message that was retried so often is to go on after this error.

    :param reasons: the reasons that are retried.
    :param policies: policies of single reasons.
    :param usual: the policy of all others.
    """
    if error.reason not in reasons:
        return Fail()
    policy = policies.get(error.reason, usual)
    if policy.max_retries is not None and retries >= policy.max_retries:
        return Fail()
    return RetryAfter(policy.delay(retries))


def policy_of(task: Any) -> RetryPolicy:
    """The policy that a task's own Celery options make.

    ``retry_backoff`` that was never set counts as true; set to false, it means what it means to
    Celery: ``default_retry_delay`` each time.
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
