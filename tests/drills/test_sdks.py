"""Tracing tools wrap Celery's methods and add to its messages. With each tool, workers and beats
still do all that they do without it.

A tool that is not installed is skipped. With ``SINGLETON_TEST_SDKS=required`` in the environment,
as in tox's environment ``sdks``, a missing tool is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import LeaderHandoffFailed
from celery_singleton_state.beat.entry_state import EntryState, decode_rows
from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.fleet import ROOT, Fleet, outcome
from tests.helpers.waiting import wait_until

APP = "tests.apps.sdk_app"
#: Maps each tool to its package, and to whether a folder ``bootstrap`` in the package switches the
#: tool on.
SDKS = {
    "sentry-sdk": ("sentry_sdk", False),
    "ddtrace": ("ddtrace", True),
    "newrelic": ("newrelic", True),
    "elastic-apm": ("elasticapm", False),
    "opentelemetry-instrumentation-celery": ("opentelemetry.instrumentation.celery", False),
}
#: The tools that send data to the test's collector.
SENDING = ("sentry-sdk", "ddtrace", "elastic-apm")
#: Settings that keep the tools from sending data off this host and from asking for cloud metadata.
SETTINGS = {
    "DD_CELERY_DISTRIBUTED_TRACING": "true",
    "DD_CRASHTRACKING_ENABLED": "false",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "NEW_RELIC_APP_NAME": "shop",
    "NEW_RELIC_DEVELOPER_MODE": "true",
    "NEW_RELIC_LICENSE_KEY": "0" * 40,
    "NEW_RELIC_LOG_LEVEL": "warning",
    # New Relic's own command sets these two, to say for which Python it was installed.
    "NEW_RELIC_PYTHON_PREFIX": os.path.realpath(sys.prefix),
    "NEW_RELIC_PYTHON_VERSION": "{}.{}".format(*sys.version_info),
}

pytestmark = pytest.mark.fleet(store="postgresql", app=APP, **SETTINGS)
#: Maps the name of each of the two beats to its scheduler.
SCHEDULERS = {"own": "singleton", "persistent": f"{APP}:LeadingScheduler"}
#: For how many ticks of an entry the test waits. The entry is due each second.
TICKS = int(os.environ.get("SINGLETON_TEST_SDK_SECONDS", "60"))


class Collector(BaseHTTPRequestHandler):
    """A server that answers each request of a tool with an empty object, and notes its path."""

    seen: set[str]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        self.seen.add(self.path.partition("?")[0])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def seen() -> set[str]:
    """The URL paths that the tools have requested."""
    return set()


@pytest.fixture
def collector(seen: set[str]) -> Iterator[str]:
    """The URL of a collector that answers the tools."""
    handler = type("Handler", (Collector,), {"seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=SDKS)
def sdk(request: pytest.FixtureRequest) -> str:
    """The name of an installed tool: the test runs once for each."""
    name: str = request.param
    try:
        found = importlib.util.find_spec(SDKS[name][0])
    except ModuleNotFoundError:
        found = None
    if found is None:
        assert os.environ.get("SINGLETON_TEST_SDKS") != "required", f"no {name}"
        pytest.skip(f"no {name}")
    return name


@pytest.fixture
def traced(make_fleet: Callable[..., Fleet], sdk: str, collector: str) -> Fleet:
    """A fleet in which the tool is switched on."""
    fleet = make_fleet(
        TEST_SDK=sdk,
        TEST_COLLECTOR=collector,
        DD_TRACE_AGENT_URL=collector,
    )
    package, has_bootstrap = SDKS[sdk]
    if has_bootstrap:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent / "bootstrap"
        fleet.environment["PYTHONPATH"] = f"{folder}:{ROOT}"
    return fleet


def test_a_traced_project_works_as_without_the_tool(
    traced: Fleet, client: Callable[[], Celery], sdk: str, postgres_url: str, seen: set[str]
) -> None:
    """A worker and two beats run for a minute, one with our scheduler, one with Celery's own and
    ``LeaderMixin``.

    Every tick is sent once and runs once. Of the messages that wait for a lease, each gets the
    lease or fails in time. Our log has no error, and no log has a traceback.
    """
    worker = traced.start("-c", "4")
    beats = {
        name: traced.start_beat(
            scheduler=scheduler, host=name, TEST_BEAT=name, CELERY_SINGLETON_BEAT_NAME=name
        )
        for name, scheduler in SCHEDULERS.items()
    }
    send_conflicting_messages(traced, client())
    wait_until(
        lambda: all(len(ticks_of(traced, beat, "ticked")) >= TICKS for beat in beats),
        f"{TICKS} ticks",
        2 * TICKS + 60,
    )
    # Read the logs before the stop: if a beat is stopped while it publishes, Celery logs a
    # traceback of the broker's client.
    said = [log.output for log in beats.values()]
    for beat in beats.values():
        beat.stop()
    states = {name: states_of(postgres_url, name) for name in beats}
    wait_until(
        lambda: all(
            len(ticks_of(traced, beat, name)) >= state.total_run_count
            for beat, entries in states.items()
            for name, state in entries.items()
            if name != "once"
        ),
        "every tick that was sent has run",
    )
    worker.stop()
    for beat, entries in states.items():
        assert set(entries) == {"ticked", "plain", "retried", "once", "ticked-minutely"}
        for name, state in entries.items():
            assert complaints(traced, beat, name, state) == []
    counted = {note["key"]: note["n"] for note in traced.notes("state")}
    assert counted == Counter(note["key"] for note in traced.notes("state"))
    assert all(note["traced"] for note in traced.notes("tick"))
    assert bool(seen) is (sdk in SENDING)
    assert [line for output in (worker.output, *said) for line in tracebacks(output)] == []
    assert [line for log in (worker, *beats.values()) for line in errors(log.output)] == []


def send_conflicting_messages(fleet: Fleet, app: Celery) -> None:
    """Send messages that conflict: four that wait for one another, two of which one fails because
    it waits too long, and an ``enqueue_once`` task twice.
    """
    met = [app.send_task("meets") for _ in range(4)]
    in_vain = [app.send_task("waits_in_vain", ("a", 8.0)) for _ in range(2)]
    app.send_task("sends_twice")
    assert [outcome(result) for result in met] == [None] * 4
    ended = sorted((outcome(result) for result in in_vain), key=str)
    assert ended[0] == "a"
    assert isinstance(ended[1], LeaderHandoffFailed)
    bodies = sorted(fleet.notes("enter") + fleet.notes("leave"), key=lambda note: note["at"])
    assert [note["event"] for note in bodies] == ["enter", "leave"] * 4
    assert Counter(note["id"] for note in bodies) == {result.id: 2 for result in met}
    (queued,) = fleet.wait_for_notes("queued")
    assert len(queued["ids"]) == 1
    wait_until(
        lambda: [note["id"] for note in ticks_of(fleet, "", "sent")] == queued["ids"],
        "the queued message has run",
    )


def ticks_of(fleet: Fleet, beat: str, entry: str) -> list[dict[str, Any]]:
    """Return the notes that the bodies of an entry's ticks wrote, in order."""
    return [note for note in fleet.notes("tick") if (note["beat"], note["entry"]) == (beat, entry)]


def states_of(store_url: str, beat: str) -> dict[str, EntryState]:
    """Return a dict that maps each entry of a beat to its stored state."""
    store = open_store(store_url, "kv_store", 5.0)
    try:
        return decode_rows(store.entries.load(f"singleton-beat:{beat}:"))
    finally:
        store.close()


def complaints(fleet: Fleet, beat: str, entry: str, state: EntryState) -> list[str]:
    """Return a line for each fault of the ticks of an entry that have run."""
    ran = ticks_of(fleet, beat, entry)
    dues = [note["due"] for note in ran]
    found = [f"{beat} {entry}: {due} ran {n} times" for due, n in Counter(dues).items() if n > 1]
    found += [f"{beat} {entry}: {due} had no tick" for due in dues if due is None]
    if entry == "once":
        # An ``enqueue_once`` tick is not sent while the previous tick is queued.
        return found if 0 < len(ran) <= state.total_run_count + 1 else [*found, "once: not sent"]
    # When the beat was stopped, it may have sent its last tick without recording it.
    if len(ran) - state.total_run_count not in (0, 1):
        found.append(f"{beat} {entry}: {state.total_run_count} were sent, and {len(ran)} ran")
    if entry != "retried" and any(a > b for a, b in pairwise(dues)):
        found.append(f"{beat} {entry}: not in order")
    return found


def errors(output: str) -> list[str]:
    """Return the lines in which this package logged an error."""
    return [
        line
        for line in output.splitlines()
        if "celery_singleton_state" in line and (": ERROR/" in line or ": CRITICAL/" in line)
    ]


def tracebacks(output: str) -> list[str]:
    """Return the first line of each traceback, whichever package logged it."""
    return [line for line in output.splitlines() if line.startswith("Traceback")]
