"""The exporter's page: what it shows for given data. No data may become part of its markup."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, TemplateError, nodes

from celery_singleton_state import exporter
from celery_singleton_state.exporter.page import document as page_document
from celery_singleton_state.exporter.page.document import POLICY, Page, ShownSingleton, render
from celery_singleton_state.text.moments import ago, span, took
from celery_singleton_state.text.visible import visible
from tests.helpers.page_data import (
    ERRORS,
    HOLDER,
    NOW,
    beat,
    entry,
    five,
    held,
    many,
    page,
    row,
    run,
    shown,
)
from tests.helpers.page_reader import Reader

EXPORTER = Path(exporter.__file__).parent
HOSTILE = "</title></style></code><script>alert(1)</script><img onerror='x()' \"q\" & \x00\u202e"


def read(*singletons: ShownSingleton, **changes: Any) -> str:
    """Return the text of a page with these singletons."""
    return Reader(render(page(*singletons, **changes))).text


def test_the_page_is_a_complete_accessible_document() -> None:
    document = render(five())
    reader = Reader(document)
    assert document.startswith("<!doctype html>")
    assert not reader.open, "all is closed"
    assert reader.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        reader.all("meta")
    )
    assert {"http-equiv": "refresh", "content": "5"} in reader.all("meta")
    assert len(reader.all("h1")) == len(reader.all("main")) == 1
    assert len(reader.all("caption")) == len(reader.all("table")) == 2
    assert all(each["scope"] in ("row", "col") for each in reader.all("th"))
    assert reader.text.startswith("1 unhealthy · shop · singletons")


@pytest.mark.parametrize("made", [five, many, page])
def test_the_page_loads_nothing_from_elsewhere(made: Callable[[], Page]) -> None:
    document = render(made())
    for outside in ("http://", "https://", "src=", "@import", "url(", "style="):
        assert outside not in document


def test_a_late_singleton() -> None:
    late = shown("t", row("t", last_finished_at=NOW - 7_300), late="it finished 7300 s ago")
    assert "! late t it finished 7300 s ago" in read(late)
    assert "1 unhealthy" in read(late)


def test_a_failing_singleton_shows_its_error() -> None:
    failed = row("t", last_outcome="failed", last_finished_at=NOW - 90)
    text = read(shown("t", failed, run(300), run(90, 31, "failed", ERRORS[1])))
    assert "✕ failing" in text
    assert f"✕ failed 90 s ago took 31 s {ERRORS[1]}" in text
    assert "✕ failing" in read(shown("t", row("t", last_outcome="lost")))


def test_the_error_of_an_earlier_run_is_not_shown() -> None:
    """If a singleton's last run succeeded, the list of singletons may lack its history or have an
    old one.

    The last error in an old history belongs to an earlier run.
    """
    assert ERRORS[1] not in read(shown("t", row("t"), run(300, 2, "failed", ERRORS[1])))


def test_a_duplicate_does_not_count_as_the_last_run() -> None:
    failed = row("t", last_outcome="failed")
    runs = run(90, 2, "failed", ERRORS[1]), run(10, 0.01, "duplicate")
    assert ERRORS[1] in read(shown("t", failed, *runs))


def test_a_running_singleton() -> None:
    text = read(shown("t", held("t", since=30, fence=1_234)))
    assert "▶ running" in text
    assert f"{HOLDER.format(3, 4711)} since 11:59:35 (30 s), 6 s left" in text
    assert "fence 1,234" in text
    assert "1 running" in text


def test_a_singleton_whose_lease_has_expired() -> None:
    text = read(shown("t", held("t", since=80, expires_in=-72.0)))
    assert "! lease expired" in text
    assert "(80 s), expired 72 s ago" in text
    assert "▶ running" not in text


def test_a_singleton_in_its_hold_period() -> None:
    kept = held("t", holder=None, acquired_at=None, expires_in=20.0)
    assert "hold period, free in 20 s" in read(shown("t", kept))
    assert "▶ running" not in read(shown("t", kept))
    over = held("t", holder=None, acquired_at=None, expires_in=-20.0)
    assert "lease free" in read(shown("t", over))
    assert "✓ healthy" in read(shown("t", over))


def test_a_singleton_that_never_ran() -> None:
    text = read(shown("t", None))
    assert "never ran" in text
    assert "lease free" in text
    assert "<svg" not in render(page(shown("t", None))).partition("<tbody>")[2]


def test_a_state_is_shown_if_it_is_given_and_is_cut_if_it_is_long() -> None:
    assert "<details" not in render(page(shown("t", row("t"))))
    assert '{"last_id":7}' in read(shown("t", row("t"), value='{"last_id":7}'))
    text = read(shown("t", row("t"), value="x" * 12_000))
    assert "and 10,000 characters more" in text
    assert len(text) < 4_000


def test_hostile_text_stays_text() -> None:
    hostile = shown(
        f"t{HOSTILE}",
        held("t", holder=HOSTILE, last_outcome=HOSTILE),
        run(60, 2, HOSTILE, HOSTILE),
        late=HOSTILE,
        value=HOSTILE,
        task="t",
    )
    plans = beat(
        name=HOSTILE, leader=HOSTILE, upcoming=(entry(HOSTILE, 5, task=HOSTILE, schedule=HOSTILE),)
    )
    document = render(page(hostile, app=HOSTILE, query=HOSTILE, beat=plans))
    reader = Reader(document)
    assert not reader.open
    assert len(reader.all("script")) == len(reader.all("style")) == 1
    assert not reader.all("img")
    assert "\x00" not in document
    assert reader.text.count("<script>alert(1)</script>") >= 8
    # A quotation mark can be escaped in two ways, which mean the same in HTML.
    quoted = document.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")
    assert quoted.count(escape(visible(HOSTILE))) >= 15
    away = Reader(render(page(error=HOSTILE)))
    assert len(away.all("script")) == 1
    assert not away.all("img")


@pytest.fixture
def templates() -> Environment:
    return page_document.load_templates()


@pytest.mark.parametrize(
    "printed",
    [
        "{{ text }}",
        "{{ text ~ '' }}",
        "{% set same = text %}{{ same }}",
        "{% set block %}{{ text }}{% endset %}{{ block }}",
        "{% macro say(it) %}{{ it }}{% endmacro %}{{ say(text) }}",
        "{% macro say() %}<b>{% endmacro %}{{ say() ~ text }}",
        "{{ '%s' % text }}",
        "{{ [text] }}",
    ],
)
def test_each_text_that_a_template_prints_is_escaped(templates: Environment, printed: str) -> None:
    """In whatever way a template prints a text, it is escaped and its control characters are
    replaced.
    """
    found = templates.from_string(printed).render(text=HOSTILE)
    assert "<script" not in found
    assert "&lt;script" in found
    assert found.isprintable()


@pytest.mark.parametrize("name", ["safe", "tojson", "xmlattr", "urlize", "indent", "replace"])
def test_no_template_can_print_a_text_as_markup(templates: Environment, name: str) -> None:
    with pytest.raises(TemplateError):
        templates.from_string(f"{{{{ text|{name} }}}}")


def test_no_template_turns_escaping_off(templates: Environment) -> None:
    files = list(EXPORTER.rglob("*.html"))
    assert files
    switches = nodes.EvalContextModifier, nodes.MarkSafe, nodes.MarkSafeIfAutoescape
    for file in files:
        parsed = templates.parse(file.read_text("utf-8"))
        assert not [each for kind in switches for each in parsed.find_all(kind)], file


def test_no_html_is_written_in_python() -> None:
    # A "<" after "?P" begins the name of a group in a regular expression, and no HTML tag.
    tag = re.compile(r"(?<!\?P)<[a-zA-Z/!]")
    for file in EXPORTER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not tag.search(node.value), f"{file.name}:{node.lineno}"
        assert "Markup(" not in file.read_text("utf-8"), file


@pytest.mark.parametrize(("tag", "file"), [("style", "page.css"), ("script", "page.js")])
def test_the_content_security_policy_allows_the_included_file(tag: str, file: str) -> None:
    """The policy has a hash of the file. Jinja includes the file as a template, so the file must
    not contain any text that Jinja would interpret.
    """
    (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", render(five()), re.DOTALL)
    assert inside == (EXPORTER / "page" / file).read_text("utf-8").rstrip("\n")
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{digest}'" in POLICY


def test_a_lone_surrogate_in_a_name_can_be_encoded() -> None:
    assert render(page(shown("t\ud800", None))).encode()


def test_the_timeline() -> None:
    document = render(page(shown("t", held("t"), run(300), run(100, 60, "failed", "E: <b>"))))
    reader = Reader(document)
    (label,) = (each["aria-label"] for each in reader.all("svg") if each.get("role") == "img")
    assert label == "Runs since 2026-03-14 11:55:03 UTC: 1 succeeded, 1 failed, 1 not ended"
    titles = re.findall(r"<title>(.*?)</title>", document)[1:]
    assert titles == [
        "succeeded, 2026-03-14 11:55:03 UTC, took 2 s, fence 11",
        "failed, 2026-03-14 11:57:25 UTC, took 60 s, fence 11: E: &lt;b&gt;",
        "running, since 2026-03-14 11:59:35 UTC, fence 12",
    ]
    bars = dict(re.findall(r'<path class="(ok|failed|now)" d="M([\d.]+ \d+H[\d.]+)', document)[-3:])
    # The x axis has 100 units for 302 s: from the first start to now. The second run lasted from
    # 142 s to 202 s.
    assert bars == {"ok": "0 11H1.4", "failed": "47.02 2H66.89", "now": "90.07 9H100"}


def test_the_timeline_of_runs_that_ended_long_ago_is_not_a_point() -> None:
    long_ago = [run(9_000 + 100 * n, 10) for n in (2, 1, 0)]
    document = render(page(shown("t", row("t"), *long_ago)))
    assert "now, 2 h later" in document
    last = re.findall(r'<path class="ok" d="M([\d.]+) ', document)[-1]
    assert 40 < float(last) < 50


@pytest.mark.parametrize("age", [0.0, 60.0, 10.0**8])
def test_the_timeline_of_one_short_run(age: float) -> None:
    document = render(page(shown("t", row("t"), run(age, 0.0))))
    ((left, right),) = re.findall(r'd="M([\d.]+) 11H([\d.]+)V22', document)[-1:]
    assert 0 <= float(left) < float(right) <= 100


def test_times_in_the_future_are_drawn_within_the_timeline() -> None:
    """A row can be newer than the time that the page takes for the present."""
    document = render(page(shown("t", held("t", since=-5), run(-3))))
    for left, right in re.findall(r'd="M([\d.]+) \d+H([\d.]+)V', document):
        assert 0 <= float(left) < float(right) <= 100


def test_only_200_of_2000_singletons_are_shown() -> None:
    began = time.thread_time()
    document = render(many())
    assert time.thread_time() - began < 2, "usually it takes about 0.1 s of CPU time"
    reader = Reader(document)
    assert "200 of 2,000 shown, filter for others" in reader.text
    assert "2,000 in all" in reader.text
    assert len([each for each in reader.all("th") if each["scope"] == "row"]) == 205
    assert len(document) < 800_000


def test_a_filter() -> None:
    text = read(shown("t", row("t")), query='acme"', total=300, running=4, unhealthy=2)
    assert '1 of 300 matching acme" shown, filter for others' in text
    assert "300 match" in text
    assert "2 unhealthy in all" in text
    document = render(page(query='acme"'))
    assert {"value": 'acme"'}.items() <= Reader(document).all("input")[0].items()
    assert 'no singleton matches acme"' in Reader(document).text
    assert {"href": "?"} in Reader(document).all("a")


def test_the_page_before_the_first_run() -> None:
    text = read()
    assert "no singleton has run yet" in text
    assert "no beat has led yet" in text


def test_the_store_is_unavailable() -> None:
    text = read(shown("t", None), error="connection refused", beat=beat())
    assert text.startswith("store unavailable · shop")
    assert "The store is unavailable connection refused The exporter cannot tell which" in text
    assert "Singletons" not in text
    assert "no singleton has run yet" not in text


def test_the_leader_and_the_next_ticks() -> None:
    text = read(beat=beat(entries=40))
    assert "celerybeat@beat-2.shop.internal:17:c01dbeef leads shop since 10:30:05 (90 min)" in text
    assert "fence 41" in text
    assert "5 of 40 entries" in text
    assert "import_orders shop.tasks.import_orders ! late by 14 s 11:59:50 every 30 s" in text
    assert "reindex shop.tasks.reindex in 5 s 12:00:09" in text
    assert "missed 3" in text


def test_no_beat_leads() -> None:
    done = entry("once", None), entry("now", -0.2)
    text = read(beat=beat(leader=None, leads_since=None, upcoming=done))
    assert "! no beat leads shop: no tick is sent until a beat leads (last fence 41)" in text
    assert "never due again" in text
    assert "due now" in text


def test_durations_are_written_with_a_unit() -> None:
    assert [span(each) for each in (-1, 0, 119, 120, 7_199, 7_200, 172_799, 10**6)] == [
        *("0 s", "0 s", "119 s", "2 min", "120 min", "2 h", "48 h", "12 d")
    ]
    assert [took(each) for each in (-1, 0.004, 0.25, 9.4, 9.6)] == [
        *("0 s", "0.004 s", "0.25 s", "9.4 s", "10 s")
    ]
    assert [ago(NOW - each, NOW) for each in (-2, 0.4, 3)] == ["just now", "just now", "3 s ago"]
