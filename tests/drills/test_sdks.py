"""Tools that trace a project wrap Celery's methods and add to its messages: workers and beats of
such a project do all that they do elsewhere.

A tool that is not installed is skipped, unless ``SINGLETON_TEST_SDKS=required`` is in the
environment, as in the environment ``sdks`` of tox.
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
#: By name, the package, and whether its folder ``bootstrap`` switches it on.
SDKS = {
    "sentry-sdk": ("sentry_sdk", False),
    "ddtrace": ("ddtrace", True),
    "newrelic": ("newrelic", True),
    "elastic-apm": ("elasticapm", False),
    "opentelemetry-instrumentation-celery": ("opentelemetry.instrumentation.celery", False),
}
#: Those that send what they collect.
SENDING = ("sentry-sdk", "ddtrace", "elastic-apm")
#: Nothing leaves this host, and nobody asks a cloud what it is.
SETTINGS = {
    "DD_CELERY_DISTRIBUTED_TRACING": "true",
    "DD_CRASHTRACKING_ENABLED": "false",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "NEW_RELIC_APP_NAME": "shop",
    "NEW_RELIC_DEVELOPER_MODE": "true",
    "NEW_RELIC_LICENSE_KEY": "0" * 40,
    "NEW_RELIC_LOG_LEVEL": "warning",
    # As its own command says which Python it is for.
    "NEW_RELIC_PYTHON_PREFIX": os.path.realpath(sys.prefix),
    "NEW_RELIC_PYTHON_VERSION": "{}.{}".format(*sys.version_info),
}

pytestmark = pytest.mark.fleet(store="postgresql", app=APP, **SETTINGS)
#: Beats by their schedulers.
SCHEDULERS = {"own": "singleton", "persistent": f"{APP}:LeadingScheduler"}
#: Ticks of an entry that is due each second.
TICKS = int(os.environ.get("SINGLETON_TEST_SDK_SECONDS", "60"))


class Collector(BaseHTTPRequestHandler):
    """Takes what tools send, and knows nothing better."""

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
    """The paths that tools have asked for."""
    return set()


@pytest.fixture
def collector(seen: set[str]) -> Iterator[str]:
    """A URL at which tools are answered."""
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
    """The name of a tool that is installed."""
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


def test_a_traced_project(
    traced: Fleet, client: Callable[[], Celery], sdk: str, postgres_url: str, seen: set[str]
) -> None:
    """A worker and two beats, ours and Celery's own with leadership, run for a minute: every tick
    is sent once and runs once, messages that wait for one another do so, and one that waits in vain
    ends; none of our lines is an error, and nobody's has a traceback.
    """
    worker = traced.start("-c", "4")
    beats = {
        name: traced.start_beat(
            scheduler=scheduler, host=name, TEST_BEAT=name, CELERY_SINGLETON_BEAT_NAME=name
        )
        for name, scheduler in SCHEDULERS.items()
    }
    meet_each_other(traced, client())
    wait_until(
        lambda: all(len(ticks_of(traced, beat, "ticked")) >= TICKS for beat in beats),
        f"{TICKS} ticks",
        2 * TICKS + 60,
    )
    # A beat that is stopped while it sends has Celery log what its broker's client makes of that.
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
        "all that was sent has run",
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


def meet_each_other(fleet: Fleet, app: Celery) -> None:
    """Messages that wait: four for one another, one in vain, and one that is not sent twice."""
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
        "the one that was queued has run",
    )


def ticks_of(fleet: Fleet, beat: str, entry: str) -> list[dict[str, Any]]:
    """What an entry's bodies wrote down, in order."""
    return [note for note in fleet.notes("tick") if (note["beat"], note["entry"]) == (beat, entry)]


def states_of(store_url: str, beat: str) -> dict[str, EntryState]:
    """What the store has of a beat's entries."""
    store = open_store(store_url, "kv_store", 5.0)
    try:
        return decode_rows(store.entries.load(f"singleton-beat:{beat}:"))
    finally:
        store.close()


def complaints(fleet: Fleet, beat: str, entry: str, state: EntryState) -> list[str]:
    """What is wrong with the ticks of an entry that have run."""
    ran = ticks_of(fleet, beat, entry)
    dues = [note["due"] for note in ran]
    found = [f"{beat} {entry}: {due} ran {n} times" for due, n in Counter(dues).items() if n > 1]
    found += [f"{beat} {entry}: {due} had no tick" for due in dues if due is None]
    if entry == "once":
        # A tick is not sent while the one before is queued.
        return found if 0 < len(ran) <= state.total_run_count + 1 else [*found, "once: not sent"]
    # The last one can have been on its way when the beat was told to stop.
    if len(ran) - state.total_run_count not in (0, 1):
        found.append(f"{beat} {entry}: {state.total_run_count} were sent, and {len(ran)} ran")
    if entry != "retried" and any(a > b for a, b in pairwise(dues)):
        found.append(f"{beat} {entry}: not in order")
    return found


def errors(output: str) -> list[str]:
    """Our lines that are errors."""
    return [
        line
        for line in output.splitlines()
        if "celery_singleton_state" in line and (": ERROR/" in line or ": CRITICAL/" in line)
    ]


def tracebacks(output: str) -> list[str]:
    """Everybody's tracebacks."""
    return [line for line in output.splitlines() if line.startswith("Traceback")]
