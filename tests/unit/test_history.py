import logging

import msgspec
import pytest

from celery_singleton_state import history
from celery_singleton_state.history import Entry
from tests.helpers.history import entry


def test_an_appended_entry_is_decoded_unchanged() -> None:
    raw = history.append((), entry(1), 16)
    assert history.decode(raw, "s") == (entry(1),)


def test_the_oldest_entries_are_dropped() -> None:
    entries: tuple[Entry, ...] = ()
    for fence in range(1, 6):
        entries = history.decode(history.append(entries, entry(fence), 3), "s")
    assert [kept.fence for kept in entries] == [3, 4, 5]


@pytest.mark.parametrize("raw", [None, "", "not JSON", "[1]", "{}", '[["t"]]'])
def test_a_history_that_cannot_be_read_counts_as_empty(
    raw: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert history.decode(raw, "s") == ()
    assert bool(raw) == ("its history cannot be read" in caplog.text)


def test_a_succeeded_run_did_its_own_and_earlier_generations() -> None:
    """The run sent a retry without raising it, and succeeded. Only the retry, which is the next
    generation, is new work.
    """
    entries = (entry(1, generation=1),)
    assert history.done_by(entries, "t", 0)
    assert history.done_by(entries, "t", 1)
    assert not history.done_by(entries, "t", 2)
    assert not history.done_by(entries, "other", 0)


def test_after_a_run_without_a_retry_no_message_of_its_id_is_new() -> None:
    assert history.done_by((entry(1, final=True),), "t", 5)


@pytest.mark.parametrize("outcome", ["failed", "retried", "lost", "skipped"])
def test_the_message_of_a_run_that_did_not_succeed_is_not_done(outcome: str) -> None:
    assert not history.done_by((entry(1, outcome=outcome, final=True),), "t", 0)


def test_a_duplicate_in_the_history_counts_as_done() -> None:
    assert history.done_by((entry(1, outcome="duplicate"),), "t", 0)


# -- after a release without an answer: has the run ended?


def test_a_run_has_ended_if_the_history_has_its_entry() -> None:
    """Entries of later runs do not matter."""
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
def test_a_run_is_recognised_by_fence_holder_and_outcome(others: Entry) -> None:
    """When an operator releases a run's lease, the entry has the run's fence and holder, but the
    outcome "lost".
    """
    assert history.has_ended((entry(2), others), entry(3), run_count=2) is False


def test_a_run_without_an_entry_did_not_end_if_an_older_one_is_kept() -> None:
    entries = (entry(2), entry(4), entry(5))
    assert history.has_ended(entries, entry(3), run_count=9) is False


def test_a_run_without_an_entry_did_not_end_if_none_was_ever_dropped() -> None:
    assert history.has_ended((), entry(3), run_count=0) is False
    assert history.has_ended((entry(4), entry(5)), entry(3), run_count=2) is False


def test_whether_a_run_ended_is_unknown_if_its_entry_may_have_been_dropped() -> None:
    assert history.has_ended((entry(4), entry(5)), entry(3), run_count=3) is None
    assert history.has_ended((), entry(3), run_count=1) is None, "the history could not be read"


def test_old_duplicates_are_dropped_separately_from_runs() -> None:
    """The history has a limit for runs and one for duplicates. So dropped duplicates do not mean
    that runs were dropped, too.
    """
    old_duplicate, old_run = entry(1, outcome="duplicate"), entry(1)
    later = (entry(4), entry(5, outcome="duplicate"))
    assert history.has_ended((old_duplicate, *later), entry(3), run_count=9) is None
    own = entry(3, outcome="duplicate")
    assert history.has_ended((old_run, *later), own, run_count=9) is None
    assert history.has_ended((old_run, *later), entry(3), run_count=9) is False


def test_an_error_is_one_short_line() -> None:
    assert history.describe(ValueError("a\n b")) == "ValueError: a b"
    assert len(history.describe(ValueError("x" * 1000))) == history.MAX_ERROR_LENGTH


def test_an_error_with_a_lone_surrogate_can_be_stored() -> None:
    """A lone surrogate (half of an emoji) cannot be encoded. The end of the run must be recorded
    anyway.
    """
    described = history.describe(ValueError("half \ud83d"))
    assert described == "ValueError: half \\ud83d"
    history.append((), msgspec.structs.replace(entry(1), error=described), 16)


def test_an_error_whose_str_raises_can_be_described() -> None:
    class Awkward(Exception):
        def __str__(self) -> str:
            raise LookupError

    assert history.describe(Awkward()) == "Awkward: (its text cannot be made)"
