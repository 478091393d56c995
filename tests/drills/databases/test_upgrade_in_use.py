"""A table of a million rows is upgraded while programs that know only its three columns use it."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from celery_singleton_state import KeyValueStore
from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.all_verbs import use_all
from tests.helpers.fleet import Fleet
from tests.helpers.tables import ALL_COLUMNS, columns_and_indexes, execute, given_table
from tests.helpers.waiting import wait_until

ROWS = 1_000_000
#: The number of rows that the programs change during the upgrade: each contains a counter.
COUNTERS = 1_000

FILL = f"""
INSERT INTO kv_store (key, value, updated_at)
SELECT CASE WHEN n <= {COUNTERS} THEN 'counter-' ELSE 'old-' END || n,
  CASE WHEN n <= {COUNTERS} THEN '0' ELSE '{{"n":' || n || '}}' END,
  now() - n * interval '1 second'
FROM generate_series(1, {ROWS}) AS n
"""
#: A query for a checksum of the rows that must not change.
FINGERPRINT = """
SELECT count(*), sum(hashtextextended(concat(key, '|', value, '|', updated_at), 0))
FROM kv_store WHERE key LIKE 'old-%%'
"""
BUILT = """
SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('idx_kv_store_updated_at')
"""


class Users:
    """Two programs that know only three columns: one reads, one writes.

    A statement that waits for 20 s fails, because an upgrade may not make programs wait for so
    long.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._stop = threading.Event()
        #: How many seconds the slowest statement took.
        self.longest = 0.0
        self.reads = self.counted = 0
        #: Keys that the writer inserted and did not delete again.
        self.kept: list[str] = []

    def run(self) -> list[Callable[[], None]]:
        return [lambda: self._use(self._read), lambda: self._use(self._write)]

    def stop(self) -> None:
        self._stop.set()

    def _use(self, act: Callable[[Any, int], None]) -> None:
        options = "-c statement_timeout=20s"
        with psycopg.connect(self._dsn, autocommit=True, options=options) as connection:

            def timed(statement: str) -> Any:
                started = time.perf_counter()
                cursor = connection.execute(statement)
                rows = cursor.fetchall() if cursor.description else cursor.rowcount
                self.longest = max(self.longest, time.perf_counter() - started)
                return rows

            number = 0
            while not self._stop.is_set():
                number += 1
                act(timed, number)

    def _read(self, timed: Any, _number: int) -> None:
        n = random.randint(COUNTERS + 1, ROWS)
        assert timed(f"SELECT * FROM kv_store WHERE key = 'old-{n}'")[0][:2] == (
            f"old-{n}",
            f'{{"n":{n}}}',
        )
        self.reads += 1

    def _write(self, timed: Any, number: int) -> None:
        counter = f"counter-{random.randint(1, COUNTERS)}"
        changed = f"value = (value::int + 1)::text, updated_at = now() WHERE key = '{counter}'"
        assert timed(f"UPDATE kv_store SET {changed}") == 1
        self.counted += 1
        key = f"new-{number}"
        assert timed(f"INSERT INTO kv_store (key, value) VALUES ('{key}', '1')") == 1
        if number % 2:
            assert timed(f"DELETE FROM kv_store WHERE key = '{key}'") == 1
        else:
            self.kept.append(key)


@pytest.fixture
def watch(postgres_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("is_killed", [False, True], ids=["in one go", "killed in mid-build"])
def test_an_upgrade_loses_no_row_and_stops_no_program(
    make_fleet: Callable[..., Fleet],
    postgres_url: str,
    watch: psycopg.Connection[Any],
    is_killed: bool,
) -> None:
    """A reads and B writes during the whole test. The table has no index. The upgrade runs at once,
    or is killed while it builds the index and then started again.
    """
    execute(postgres_url, given_table(postgres_url), FILL.replace("%", "%%"))
    watch.execute("VACUUM ANALYZE kv_store")
    before = watch.execute(FINGERPRINT).fetchall()
    assert before[0][0] == ROWS - COUNTERS
    fleet = make_fleet(postgres_url, CELERY_SINGLETON_AUTO_MIGRATE="0")
    users = Users(postgres_url.replace("+psycopg", ""))
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(use) for use in users.run()]
        try:
            wait_until(
                lambda: users.reads > 100 and users.counted > 100, "both programs use the table"
            )
            if is_killed:
                kill_in_mid_build(fleet, postgres_url, watch)
            upgraded = fleet.command("singleton", "migrate")
            seen = users.counted
            wait_until(lambda: users.counted > seen + 100, "both programs go on afterwards")
        finally:
            users.stop()
        for each in running:
            each.result()
    # A figure for ``pytest -s``; it depends on the machine, so the test does not check it.
    print(f"of {users.reads + users.counted} reads and changes the longest took", end=" ")
    print(f"{users.longest * 1000:.1f} ms")

    assert upgraded.returncode == 0, upgraded.stderr
    assert upgraded.stdout == "table kv_store is ready\n"
    assert columns_and_indexes(postgres_url) == (
        ALL_COLUMNS,
        [("idx_kv_store_updated_at", ["updated_at"])],
    )
    assert watch.execute(BUILT).fetchall() == [(True,)]
    assert watch.execute(FINGERPRINT).fetchall() == before
    counted = watch.execute("SELECT sum(value::int) FROM kv_store WHERE key LIKE 'counter-%%'")
    assert counted.fetchall() == [(users.counted,)]
    kept = watch.execute("SELECT key FROM kv_store WHERE key LIKE 'new-%%'").fetchall()
    assert {key for (key,) in kept} == set(users.kept)
    with KeyValueStore(postgres_url) as kv:
        assert kv.get(f"old-{ROWS}") == {"n": ROWS}
        assert kv.get(users.kept[-1]) == 1
    store = open_store(postgres_url, "kv_store", 5.0)
    use_all(store)
    first = store.acquire(f"old-{ROWS}", "h", 60, None)
    store.close()
    assert first is not None
    assert first.value == f'{{"n":{ROWS}}}'


def kill_in_mid_build(fleet: Fleet, url: str, watch: psycopg.Connection[Any]) -> None:
    """Kill an upgrade while it builds the index. An open transaction that has changed the table
    keeps the build from finishing before the kill.
    """
    with psycopg.connect(url.replace("+psycopg", "")) as writer:
        writer.execute("INSERT INTO kv_store (key, value) VALUES ('slow', '1')")
        process = subprocess.Popen(
            fleet.celery("singleton", "migrate"), env=fleet.environment, start_new_session=True
        )
        try:
            building = "the index is being built"
            wait_until(lambda: watch.execute(BUILT).fetchall() == [(False,)], building)
        finally:
            process.kill()
            process.wait(timeout=10)
        assert watch.execute(BUILT).fetchall() == [(False,)]
