"""The exporter's page in a real browser: its layout, and how its script refreshes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from celery_singleton_state.exporter.page.document import Page, render
from tests.helpers.chromium import Chromium
from tests.helpers.page_data import five, many, page, row, run, shown
from tests.helpers.waiting import wait_until

HOSTILE = "t<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>\"'&</th>"
PHONE = 360


class Site:
    """A web server with one page, which a test can change.

    :param page: the page that is served. If it is ``None``, the server answers 502.
    """

    def __init__(self, page: Page) -> None:
        self.page: Page | None = page
        self.answers = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answers += 1
                body = render(site.page).encode() if site.page else b"bad gateway"
                self.send_response(200 if site.page else 502)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def wait_for_answers(self, count: int) -> None:
        """Wait until the server has given ``count`` more answers."""
        enough = self.answers + count
        wait_until(lambda: self.answers >= enough, "the page asks again")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    started = Chromium(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A server with a page of five singletons that refreshes itself each second."""
    served = Site(replace(five(), refresh=1))
    yield served
    served.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 800, 1280])
@pytest.mark.parametrize(("made", "rows"), [(five(), 5), (many(), 200)], ids=["5", "2000"])
def test_the_page_fits_and_is_styled_at_each_width(
    browser: Chromium, site: Site, tmp_path: Path, made: Page, rows: int, width: int, dark: bool
) -> None:
    site.page = made
    with browser.open(site.url, width, 800, dark) as tab:
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        assert tab.ask("innerWidth") == width, "nothing has made the viewport wider"
        assert tab.ask("document.documentElement.scrollWidth") <= width
        assert tab.ask("refused") == [], "its own style and script are let in"
        assert tab.ask("document.querySelectorAll('.singletons tbody tr').length") == rows
        ground = tab.ask("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(15, 19, 23)") == dark
        # Without its style sheet a bar would be black, and the drawing 150 pixels high.
        assert tab.ask("document.querySelector('.line').getBoundingClientRect().height") == 24
        assert tab.ask("getComputedStyle(document.querySelector('.line .ok')).fill") != (
            "rgb(0, 0, 0)"
        )
        bars = "[...document.querySelectorAll('.line path:not(.axis)')]"
        assert tab.ask(f"Math.min(...{bars}.map(bar => bar.getBoundingClientRect().width))") >= 2


def test_long_names_and_errors_do_not_widen_the_page(browser: Chromium, site: Site) -> None:
    name = f't{{"key":"{"x" * 400}"}}'
    failed = row(name, last_outcome="failed")
    site.page = page(
        shown(name, failed, run(9, 2, "failed", "E" * 200), late="y" * 300, value="z" * 900),
        app="a" * 90,
        query="q" * 90,
        total=900,
    )
    for width in (PHONE, 1280):
        with browser.open(site.url, width) as tab:
            tab.ask("document.querySelector('details').open = true")
            assert tab.ask("innerWidth") == width
            assert tab.ask("document.documentElement.scrollWidth") <= width


def test_hostile_text_runs_no_script(browser: Chromium, site: Site) -> None:
    bad = shown(HOSTILE, row(HOSTILE), run(9, 2, "failed", HOSTILE), value=HOSTILE, task=HOSTILE)
    site.page = page(bad, app=HOSTILE, query=HOSTILE, refresh=1)
    with browser.open(site.url) as tab:
        assert tab.ask("document.querySelector('.name').textContent") == HOSTILE
        site.wait_for_answers(2)
        assert tab.ask("document.querySelector('pre').textContent") == HOSTILE
        assert tab.ask("[window.harmed === undefined, refused.length]") == [True, 0]


def test_a_refresh_keeps_focus_input_and_scroll_position(browser: Chromium, site: Site) -> None:
    made = replace(many(), refresh=1)
    first = replace(made.shown[0], value='{"last_id":7}')
    site.page = replace(made, shown=(first, *made.shown[1:]))
    with browser.open(site.url, PHONE) as tab:
        tab.ask("window.same = true")
        tab.ask("document.querySelector('details').open = true")
        tab.ask("document.getElementById('q').focus({preventScroll: true})")
        tab.type("acm")
        tab.ask("scrollTo(0, 12345)")
        changed = replace(first, value='{"last_id":8}')
        site.page = replace(made, unhealthy=8, shown=(changed, *made.shown[1:]))
        tab.wait_for("document.querySelector('.summary li').textContent === '8 unhealthy'")
        assert tab.ask("window.same"), "it was not loaded anew"
        assert tab.ask("document.title").startswith("8 unhealthy")
        assert tab.ask("document.querySelector('details pre').textContent") == '{"last_id":8}'
        assert tab.ask("document.querySelector('details').open")
        assert tab.ask("[document.activeElement.id, document.activeElement.value, scrollY]") == (
            ["q", "acm", 12345]
        )
        assert tab.ask("document.querySelectorAll('main').length") == 1
        tab.ask("document.querySelector('summary').focus({preventScroll: true})")
        site.page = replace(site.page, unhealthy=7)
        tab.wait_for("document.querySelector('.summary li').textContent === '7 unhealthy'")
        assert tab.ask("document.activeElement.tagName") == "SUMMARY"
        assert tab.ask("[scrollY, refused.length]") == [12345, 0]


def test_the_page_does_not_refresh_while_text_is_selected(browser: Chromium, site: Site) -> None:
    """A refresh would remove the selection of an operator who copies a holder's name."""
    with browser.open(site.url) as tab:
        tab.ask("getSelection().selectAllChildren(document.querySelector('.lease .holder'))")
        selected = tab.ask("getSelection().toString()")
        assert site.page is not None
        site.page = replace(site.page, unhealthy=3)
        tab.wait_for("!document.getElementById('stale').hidden")
        assert "text in it is selected" in tab.ask("document.getElementById('stale').textContent")
        assert tab.ask("getSelection().toString()") == selected
        assert tab.ask("document.querySelector('.summary li').textContent") == "1 unhealthy"
        tab.ask("getSelection().removeAllRanges()")
        tab.wait_for("document.querySelector('.summary li').textContent === '3 unhealthy'")
        tab.wait_for("document.getElementById('stale').hidden")


def test_the_page_says_when_it_cannot_refresh(
    browser: Chromium, site: Site, tmp_path: Path
) -> None:
    """The exporter answers 502, and later it does not answer at all. The page keeps its content."""
    made = site.page
    with browser.open(site.url) as tab:
        notice = "document.getElementById('stale')"
        assert not tab.ask(f"{notice}.checkVisibility()")
        site.page = None
        tab.wait_for(f"{notice}.checkVisibility()")
        assert "the exporter answered 502" in tab.ask(f"{notice}.textContent")
        assert tab.ask("document.querySelectorAll('.singletons tbody tr').length") == 5
        tab.screenshot(tmp_path / "old.png")
        site.page = made
        tab.wait_for(f"!{notice}.checkVisibility()")
        site.close()
        tab.wait_for(f"{notice}.checkVisibility()")
        assert "could not be refreshed" in tab.ask(f"{notice}.textContent")


def test_an_unavailable_store_is_shown_until_it_answers_again(
    browser: Chromium, site: Site
) -> None:
    made = site.page
    with browser.open(site.url) as tab:
        site.page = page(error="connection refused", refresh=1)
        tab.wait_for(
            "document.querySelector('main .away code')?.textContent === 'connection refused'"
        )
        assert tab.ask("document.title").startswith("store unavailable")
        assert tab.ask("document.getElementById('stale').hidden"), "it is not old"
        site.page = made
        tab.wait_for("document.querySelectorAll('.singletons tbody tr').length === 5")


def test_the_filter_is_kept_by_a_refresh(browser: Chromium, site: Site) -> None:
    with browser.open(site.url) as tab:
        tab.ask("document.getElementById('q').focus()")
        tab.type('a&b "c"')
        tab.ask("document.querySelector('header button').click()")
        tab.wait_for("location.search === '?q=a%26b+%22c%22'")
        tab.wait_for("document.readyState === 'complete'")
        site.wait_for_answers(2)
        assert tab.ask("location.search") == "?q=a%26b+%22c%22"


def test_without_scripts_the_page_is_loaded_again(browser: Chromium, site: Site) -> None:
    with browser.open("about:blank#") as tab:
        tab.call("Emulation.setScriptExecutionDisabled", value=True)
        tab.go(site.url)
        assert tab.ask("document.querySelectorAll('.singletons tbody tr').length") == 5
        site.page = page(refresh=1)
        tab.wait_for("document.querySelector('main')?.textContent.includes('no singleton has run')")
