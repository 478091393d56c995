"""``Pace``: the more messages wait for a lease, the longer each pauses before it is sent again."""

from __future__ import annotations

import pytest

from celery_singleton_state.lease import pace
from celery_singleton_state.lease.pace import COST_OF_MESSAGE, SHARE, Pace


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the pace reads from its clock. A test changes it."""
    found = [1000.0]
    monkeypatch.setattr(pace, "clock", lambda: found[0])
    return found


DISTANCE = COST_OF_MESSAGE / SHARE


@pytest.mark.usefixtures("now")
def test_a_few_waiting_messages_have_their_own_pause() -> None:
    tries = Pace()
    assert [tries.pause("k", 1.0, 0.0) for _ in range(3)] == [1.0] * 3


@pytest.mark.usefixtures("now")
def test_many_waiting_messages_take_a_limited_share_of_the_time() -> None:
    tries = Pace()
    pauses = [tries.pause("k", 0.1, 0.0) for _ in range(1000)]
    assert pauses == sorted(pauses), "in the order in which they came"
    assert pauses[-1] == pytest.approx(1000 * DISTANCE)


def test_messages_that_came_again_do_not_count_as_waiting(now: list[float]) -> None:
    tries = Pace()
    for _ in range(100):
        tries.pause("k", 0.1, 0.0)
    now[0] += 50 * DISTANCE
    assert tries.pause("k", 0.1, 0.0) == pytest.approx(51 * DISTANCE, abs=DISTANCE * 1.5)
    now[0] += 1000
    assert tries.pause("k", 0.1, 0.0) == pytest.approx(DISTANCE)


@pytest.mark.usefixtures("now")
def test_the_waiting_messages_of_all_singletons_share_the_time() -> None:
    tries = Pace()
    for _ in range(100):
        tries.pause("k1", 0.1, 0.0)
    assert tries.pause("k2", 0.1, 0.0) == pytest.approx(2 * DISTANCE)
    assert tries.pause("k1", 0.1, 0.0) == pytest.approx(101 * 2 * DISTANCE)


@pytest.mark.usefixtures("now")
def test_a_slow_store_is_asked_less_often() -> None:
    tries = Pace()
    for _ in range(100):
        pause = tries.pause("k", 0.1, 0.5)
    assert pause == pytest.approx(100 * 0.505 / SHARE, rel=0.2)
