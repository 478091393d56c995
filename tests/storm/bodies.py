"""How a storm's bodies spend their time: most sleep, some log in a loop, some keep the GIL."""

from __future__ import annotations

import logging
import math
import os
import random
import re
import time
from collections.abc import Iterator
from functools import cache

from tests.storm.jobs import TICK

#: How many of a hundred bodies log in a tight loop, and how many keep the GIL.
LOGGING, KEEPING_THE_GIL = 4, 2
#: For how many seconds a body keeps the GIL: longer than a lease's life.
LONG = 2.5

#: A slow pattern: it backtracks through all ways to split a text into parts of one and two letters.
#: One letter more makes it take 1.6 times as long.
_SLOW = re.compile("(?:a|aa)+$")
_FEW, _GROWTH, _MOST = 22, (1 + math.sqrt(5)) / 2, 36


def checks_of(job: str, attempt: int, seconds: float) -> Iterator[None]:
    """Yield whenever the body can check its lease, for about ``seconds``.

    The job and the attempt's number decide how the body spends the time between two checks.
    """
    chance = random.Random(f"{job} {attempt}").uniform(0, 100)
    if chance < KEEPING_THE_GIL:
        return _keep_the_gil()
    return _log(seconds) if chance < KEEPING_THE_GIL + LOGGING else _sleep(seconds)


def _sleep(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while True:
        yield
        if time.monotonic() >= end:
            return
        time.sleep(random.uniform(0.5, 1.5) * TICK)


def _log(seconds: float) -> Iterator[None]:
    end, log = time.monotonic() + seconds, _logger()
    while time.monotonic() < end:
        yield
        tick = time.monotonic() + TICK
        while time.monotonic() < tick:
            log.info("still at it")
    yield


@cache
def _logger() -> logging.Logger:
    """Return a logger that formats each line and writes it to the null device."""
    logger = logging.getLogger("storm.body")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.FileHandler(os.devnull)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
    logger.addHandler(handler)
    return logger


def _keep_the_gil() -> Iterator[None]:
    """Keep the GIL for about 2.5 s: match a regular expression that backtracks very often."""
    yield
    more = math.log(LONG / _seconds_for_few()) / math.log(_GROWTH)
    _match(min(_FEW + max(round(more), 0), _MOST))
    yield


@cache
def _seconds_for_few() -> float:
    start = time.perf_counter()
    _match(_FEW)
    return time.perf_counter() - start


def _match(letters: int) -> None:
    _SLOW.match("a" * letters + "b")
