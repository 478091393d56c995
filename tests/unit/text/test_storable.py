"""``storable`` turns any text into one that every database can hold. ``restored`` reverses this."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_singleton_state import history
from celery_singleton_state.keys import MAX_KEY_LENGTH, row_key
from celery_singleton_state.text.storable import from_json, restored, storable, to_json
from celery_singleton_state.ticks import task_id_of
from tests.helpers.history import entry

#: Any text, with lone surrogates, which hypothesis leaves out by default.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
ODD = "a\0b\udc80 Łódź\\x00 \U0001f389"


@given(ANY_TEXT)
def test_a_text_is_restored(text: str) -> None:
    stored = storable(text)
    assert stored.isascii()
    assert stored.isprintable()
    assert restored(stored) == text


@given(st.text(st.sampled_from("\\xud0n"), max_size=9))
def test_a_text_that_looks_like_an_escaped_text_is_restored(text: str) -> None:
    assert restored(storable(text)) == text


def test_a_text_that_was_not_escaped_is_left_unchanged() -> None:
    assert restored("Łódź \\d") == "Łódź \\d"


@given(st.dictionaries(ANY_TEXT, st.lists(ANY_TEXT)))
def test_a_json_document_is_restored(document: dict[str, list[str]]) -> None:
    text = to_json(document)
    assert text.isascii()
    assert from_json(text, msgspec.json.Decoder(dict[str, list[str]])) == document


@given(ANY_TEXT, ANY_TEXT)
def test_different_names_have_different_keys_that_can_be_stored(one: str, other: str) -> None:
    keys = {row_key("p:", name) for name in (one, other)}
    assert len(keys) == len({one, other})
    for key in keys:
        key.encode()
        assert "\0" not in key
        assert len(key) <= MAX_KEY_LENGTH


def test_a_history_restores_the_texts_of_errors_and_messages() -> None:
    one = msgspec.structs.replace(entry(1, task_id=ODD), error=ODD, sent=ODD)
    text = history.append((), one, 16)
    assert text.isascii()
    assert history.decode(text, "t") == (one,)


def test_a_schedule_entry_may_have_any_name() -> None:
    due = datetime(2026, 11, 28, tzinfo=UTC)
    assert task_id_of("s", ODD, due) != task_id_of("s", "a", due)


@pytest.mark.parametrize("text", ["plain", "with space", "", "celery@host:1:ab.1"])
def test_a_plain_text_is_stored_unchanged(text: str) -> None:
    assert storable(text) == text
