"""Repeating a request to the store, in place and for a short time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from celery_singleton_state.store.base import StoreUnavailable

from .lease import clock

T = TypeVar("T")

#: Seconds before the second try; doubled for each further one, and jittered.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


def in_place(request: Callable[[], T], tries: float, until: float) -> T:
    """Send a request until the store answers it.

    :param tries: how often at most; infinity for no limit.
    :param until: the moment, on :func:`~celery_singleton_state.lease.lease.clock`, after which it
        is not sent again.
    :raises StoreUnavailable: the last try's.
    """
    pause = FIRST_PAUSE
    while True:
        tries -= 1
        try:
            return request()
        except StoreUnavailable:
            if tries <= 0 or clock() + pause >= until:
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)
