import logging

import pytest

from celery_singleton_state import history
from celery_singleton_state.history import Entry


def entry(
    fence: int,
    task_id: str = "t",
    generation: int = 0,
    outcome: str = "succeeded",
    final: bool = False,
) -> Entry:
    holder = f"node:1:{fence}"
    return Entry(task_id, generation, holder, fence, None, outcome, None, 1.5, 2.5, final)


def test_entries_come_back_as_they_were() -> None:
    raw = history.append((), entry(1), 16)
    assert history.decode(raw, "s") == (entry(1),)


def test_the_oldest_are_dropped() -> None:
    entries: tuple[Entry, ...] = ()
    for fence in range(1, 6):
        entries = history.decode(history.append(entries, entry(fence), 3), "s")
    assert [kept.fence for kept in entries] == [3, 4, 5]


@pytest.mark.parametrize("raw", [None, "", "not JSON", "[1]", "{}", '[["t"]]'])
def test_what_cannot_be_read_counts_as_empty(
    raw: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert history.decode(raw, "s") == ()
    assert bool(raw) == ("its history cannot be read" in caplog.text)


def test_done_is_the_same_generation_or_an_earlier_one() -> None:
    """The run asked for a retry and succeeded: the retry is new work, and it alone."""
    entries = (entry(1, generation=1),)
    assert history.done_by(entries, "t", 0)
    assert history.done_by(entries, "t", 1)
    assert not history.done_by(entries, "t", 2)
    assert not history.done_by(entries, "other", 0)


def test_after_a_run_that_asked_for_no_retry_nothing_is_new() -> None:
    assert history.done_by((entry(1, final=True),), "t", 5)


@pytest.mark.parametrize("outcome", ["failed", "retried", "lost", "skipped"])
def test_what_did_not_succeed_is_not_done(outcome: str) -> None:
    assert not history.done_by((entry(1, outcome=outcome, final=True),), "t", 0)


def test_a_duplicate_keeps_its_message_known() -> None:
    assert history.done_by((entry(1, outcome="duplicate"),), "t", 0)


def test_written_by_asks_for_fence_and_holder() -> None:
    entries = (entry(3),)
    assert history.written_by(entries, 3, "node:1:3")
    assert not history.written_by(entries, 4, "node:1:3")
    assert not history.written_by(entries, 3, "node:1:4")


def test_an_error_is_one_short_line() -> None:
    assert history.describe(ValueError("a\n b")) == "ValueError: a b"
    assert len(history.describe(ValueError("x" * 1000))) == history.MAX_ERROR_LENGTH


def test_an_error_without_a_text() -> None:
    class Awkward(Exception):
        def __str__(self) -> str:
            raise LookupError

    assert history.describe(Awkward()) == "Awkward: (its text cannot be made)"
