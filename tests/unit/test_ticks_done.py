"""``EntryTicks``: which ticks of an entry are done, have failed, or will be retried.

Done ticks are kept as spans of time. In a span, every tick that was sent is done.
"""

from __future__ import annotations

import itertools
import logging
import random

import pytest

from celery_singleton_state import ticks_done
from celery_singleton_state.ticks import Tick
from celery_singleton_state.ticks_done import MAX_ENTRIES, MAX_OTHERS, EntryTicks

#: Due times, one each minute. They have fractions of a second, as due times of intervals do.
DUES = [1_764_000_012.345678 + 60 * number for number in range(2000)]


def done(order: list[int], known: EntryTicks | None = None) -> EntryTicks:
    """Return what is known after these ticks were done, in this order.

    Each tick but the first names the tick before it.
    """
    known = known or EntryTicks()
    for number in order:
        known = known.with_done(DUES[number], DUES[number - 1] if number else None)
    return known


def test_ticks_that_end_in_order_leave_one_span() -> None:
    known = done(list(range(2000)))
    assert len(known.done) == 1
    assert all(known.is_done(due) for due in DUES)
    assert not known.is_done(DUES[0] - 1)
    assert not known.is_done(DUES[-1] + 60)


@pytest.mark.parametrize("order", list(itertools.permutations(range(5))))
def test_exactly_the_ticks_that_ended_are_done_in_any_order(order: tuple[int, ...]) -> None:
    for count in range(6):
        known = done(list(order[:count]))
        assert [n for n in range(5) if known.is_done(DUES[n])] == sorted(order[:count])
        later = [n for n in range(1, 5) if n not in order[:count]]
        assert not any(known.has_ended(DUES[n]) for n in later)
    assert len(known.done) == 1


def test_many_ticks_in_any_order_are_exact() -> None:
    order = list(range(2000))
    random.Random(1).shuffle(order)
    known = done(order[:1000])
    assert {n for n in range(2000) if known.is_done(DUES[n])} == set(order[:1000])
    assert len(done(order[1000:], known).done) == 1


def test_skipped_ticks_count_as_done() -> None:
    """With ``catch_up="latest"``, tick 9 was sent after tick 1, and names tick 1 as the tick before
    it.
    """
    known = done([0, 1]).with_done(DUES[9], DUES[1])
    assert known.is_done(DUES[5])
    assert len(known.done) == 1


def test_a_tick_without_a_known_predecessor_counts_alone() -> None:
    known = EntryTicks().with_done(DUES[3], None)
    assert (known.is_done(DUES[3]), known.is_done(DUES[2])) == (True, False)
    assert known.reaches_back_to(DUES[3])
    assert not known.reaches_back_to(DUES[2])
    assert len(known.with_done(DUES[4], DUES[3]).done) == 1


def test_a_tick_that_asked_for_a_retry_has_not_ended() -> None:
    known = done([0, 1]).with_retried(DUES[1])
    assert not known.has_ended(DUES[1])
    assert done([1], known).is_done(DUES[1])


def test_a_tick_that_failed_for_good_has_ended_and_is_not_done() -> None:
    known = done([0]).with_failed(DUES[1])
    assert (known.has_ended(DUES[1]), known.is_done(DUES[1])) == (True, False)
    assert done([1], known) == done([0, 1])
    for due in DUES[2:]:
        known = known.with_failed(due)
    assert len(known.failed) == MAX_OTHERS
    assert known.has_ended(DUES[-1])


def test_if_there_are_too_many_gaps_the_oldest_are_closed() -> None:
    known = done(list(range(1, 40, 2)))
    kept = known.with_at_most(5)
    assert len(kept.done) == 5
    assert kept.is_done(DUES[2])
    assert [n for n in range(40) if n > 31 and kept.is_done(DUES[n])] == [33, 35, 37, 39]
    assert known.with_at_most(20) is known


def test_encoded_ticks_are_decoded_unchanged() -> None:
    known = done([0, 3]).with_failed(DUES[7]).with_retried(DUES[8])
    raw = ticks_done.encode({}, Tick("shop:e", DUES[0]), known)
    assert ticks_done.decode(raw, "s") == {"shop:e": known}
    assert ticks_done.decode(raw, "s")["shop:e"].is_done(DUES[3])


def test_the_entry_that_ended_longest_ago_is_forgotten() -> None:
    raw = None
    for number in [*range(MAX_ENTRIES), 0, MAX_ENTRIES]:
        known = ticks_done.decode(raw, "s")
        raw = ticks_done.encode(known, Tick(f"shop:e{number}", DUES[0]), done([0]))
    known = ticks_done.decode(raw, "s")
    assert len(known) == MAX_ENTRIES
    assert "shop:e0" in known
    assert "shop:e1" not in known


@pytest.mark.parametrize("raw", [None, "", "not JSON", "[1]", '{"e":[1]}'])
def test_ticks_that_cannot_be_read_count_as_unknown(
    raw: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert ticks_done.decode(raw, "s") == {}
    assert bool(raw) == ("its ticks_done cannot be read" in caplog.text)
