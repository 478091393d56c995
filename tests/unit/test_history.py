import logging

import msgspec
import pytest

from celery_singleton_state import history
from celery_singleton_state.history import Entry
from tests.helpers.history import entry


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


# -- whether a release took effect whose answer was lost


def test_a_run_has_ended_if_the_history_has_its_own_entry() -> None:
    """Also where others have ended since."""
    entries = (entry(2), entry(3), entry(4))
    assert history.has_ended(entries, entry(3), run_count=3) is True


@pytest.mark.parametrize(
    "others",
    [
        msgspec.structs.replace(entry(3), fence=4),
        msgspec.structs.replace(entry(3), holder="node:1:4"),
        entry(3, outcome="lost"),
    ],
    ids=["fence", "holder", "outcome"],
)
def test_a_run_is_known_by_fence_holder_and_outcome(others: Entry) -> None:
    """An operator who releases the lease leaves an entry with its fence and holder, as lost."""
    assert history.has_ended((entry(2), others), entry(3), run_count=2) is False


def test_a_run_without_an_entry_did_not_end_if_an_older_one_is_kept() -> None:
    entries = (entry(2), entry(4), entry(5))
    assert history.has_ended(entries, entry(3), run_count=9) is False


def test_a_run_without_an_entry_did_not_end_if_none_was_ever_dropped() -> None:
    assert history.has_ended((), entry(3), run_count=0) is False
    assert history.has_ended((entry(4), entry(5)), entry(3), run_count=2) is False


def test_whether_a_run_ended_is_unknown_if_its_entry_may_have_been_dropped() -> None:
    assert history.has_ended((entry(4), entry(5)), entry(3), run_count=3) is None
    assert history.has_ended((), entry(3), run_count=1) is None, "it could not be read"


def test_duplicates_are_dropped_apart_from_runs() -> None:
    """The history keeps as many of both: what it says of one tells nothing of the other."""
    old_duplicate, old_run = entry(1, outcome="duplicate"), entry(1)
    later = (entry(4), entry(5, outcome="duplicate"))
    assert history.has_ended((old_duplicate, *later), entry(3), run_count=9) is None
    own = entry(3, outcome="duplicate")
    assert history.has_ended((old_run, *later), own, run_count=9) is None
    assert history.has_ended((old_run, *later), entry(3), run_count=9) is False


def test_an_error_is_one_short_line() -> None:
    assert history.describe(ValueError("a\n b")) == "ValueError: a b"
    assert len(history.describe(ValueError("x" * 1000))) == history.MAX_ERROR_LENGTH


def test_an_error_with_half_an_emoji_can_be_stored() -> None:
    """Its text cannot be encoded, and the end of the run must be recorded all the same."""
    described = history.describe(ValueError("half \ud83d"))
    assert described == "ValueError: half \\ud83d"
    history.append((), msgspec.structs.replace(entry(1), error=described), 16)


def test_an_error_without_a_text() -> None:
    class Awkward(Exception):
        def __str__(self) -> str:
            raise LookupError

    assert history.describe(Awkward()) == "Awkward: (its text cannot be made)"
