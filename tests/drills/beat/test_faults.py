"""Three beats, each on a host of its own. The leader has one fault after the other."""

from __future__ import annotations

import logging
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.helpers.beat_hosts import APP, Host, Hosts
from tests.helpers.servers import Proxy
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.xdist_group("storm")

logger = logging.getLogger(__name__)

ENTRIES = 200
#: For how many seconds the leaders have faults.
STORM = 120.0
SEED = 1


# -- what happens to a leader, until another one leads


@contextmanager
def killed(hosts: Hosts, host: Host) -> Iterator[None]:
    host.beat.close()
    yield
    hosts.restart(host)
    host.beat.wait_stands_by()


@contextmanager
def stopped(_hosts: Hosts, host: Host) -> Iterator[None]:
    """Pause the leader, whatever it is doing, and resume it when another beat leads."""
    host.beat.process.send_signal(signal.SIGSTOP)
    before = len(host.beat.output)
    yield
    host.beat.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "beat stands by" in host.beat.output[before:], "the beat stands by")
    after = host.beat.output[before:].split("beat stands by")[0]
    # The leader may have been paused just before it sent this one tick.
    assert after.count("Sending due task") <= 1, after


@contextmanager
def cut_off_from_the_store(_hosts: Hosts, host: Host) -> Iterator[None]:
    host.store.mode = "mute"
    yield
    _heal(host.store)


@contextmanager
def cut_off_from_the_broker(_hosts: Hosts, host: Host) -> Iterator[None]:
    host.broker.mode = "mute"
    yield
    _heal(host.broker)


@contextmanager
def refused_by_the_broker(_hosts: Hosts, host: Host) -> Iterator[None]:
    host.broker.mode = "refuse"
    host.broker.cut()
    yield
    _heal(host.broker)


def _heal(proxy: Proxy) -> None:
    """Let new connections through, and cut the old connections, whose data is lost."""
    proxy.mode = "pass"
    proxy.cut()


Fault = Callable[[Hosts, Host], AbstractContextManager[None]]
FAULTS: tuple[Fault, ...] = (
    killed,
    stopped,
    cut_off_from_the_store,
    cut_off_from_the_broker,
    refused_by_the_broker,
)


def test_every_tick_is_run_once_whatever_happens_to_the_leader(
    make_hosts: Callable[..., Hosts],
) -> None:
    """200 entries are due every 1 to 3 s. Half of the entries catch up on all missed ticks, half
    only on the latest tick. For two minutes the leader has one fault after the other.
    """
    hosts = make_hosts(
        {
            f"e{number}": {
                "task": "ticked",
                "schedule": 1.0 + number % 3,
                "catch_up": "all" if number % 2 else "latest",
            }
            for number in range(ENTRIES)
        }
    )
    hosts.fleet.start("-P", "threads", "-c", "4", app=APP)
    for _ in range(3):
        hosts.start()
    wait_until(lambda: len(hosts.executed()) == ENTRIES, "each entry has run")
    faults = list(storm(hosts, random.Random(SEED)))
    hosts.leader()
    hosts.wait_for_ticks(2 * ENTRIES)
    hosts.wait_until_caught_up()
    hosts.stop()

    assert not (found := hosts.complaints()), "\n".join(found)
    states = hosts.states()
    missed = sum(state.missed_count for state in states.values())
    assert all(states[f"e{number}"].missed_count == 0 for number in range(1, ENTRIES, 2))
    said = "".join(text for _, text in hosts.fleet.outputs())
    assert ("beat: ticks were missed, and are not sent" in said) == (missed > 0)
    assert len(faults) >= len(FAULTS), faults
    ticks = sum(len(ticks) for ticks in hosts.executed().values())
    refused = len(re.findall(r"singleton \S+ task \S+ was done before", said))
    logger.warning(
        "%d ticks, %d second copies refused, %d missed; seconds until another beat led: %s",
        *(ticks, refused, missed, ", ".join(faults)),
    )


def storm(hosts: Hosts, chance: random.Random) -> Iterator[str]:
    """Cause one fault after the other. For each fault, yield its name and the seconds until another
    beat led.
    """
    end = time.monotonic() + STORM
    faults: list[Fault] = []
    while time.monotonic() < end:
        faults = faults or chance.sample(FAULTS, len(FAULTS))
        fault, host = faults.pop(), hosts.leader()
        began = time.monotonic()
        with fault(hosts, host):
            hosts.leader(other_than=host)
            yield f"{fault.__name__} {time.monotonic() - began:.1f}"
            hosts.wait_for_ticks(ENTRIES)
