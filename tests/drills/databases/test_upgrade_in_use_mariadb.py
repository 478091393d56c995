"""A table of a million rows on MariaDB is upgraded while programs that know only its three columns
use it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pymysql
import pytest
from sqlalchemy import make_url

from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.all_verbs import use_all
from tests.helpers.fleet import Fleet
from tests.helpers.mariadb import MariaDB
from tests.helpers.tables import ALL_COLUMNS, columns_and_indexes, execute
from tests.helpers.waiting import wait_until

ROWS = 1_000_000
MAKE = """
CREATE TABLE kv_store (
  `key` VARCHAR(255) PRIMARY KEY,
  value LONGTEXT NOT NULL,
  updated_at DATETIME(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6)
) CHARACTER SET utf8mb4 COLLATE {collation}
"""
FILL = f"""
INSERT INTO kv_store (`key`, value, updated_at)
SELECT CONCAT('old-', seq), CONCAT('{{"n":', seq, '}}'), SYSDATE(6) - INTERVAL seq SECOND
FROM seq_1_to_{ROWS}
"""
FINGERPRINT = """
SELECT COUNT(*), SUM(CRC32(CONCAT(`key`, '|', value, '|', updated_at))) FROM kv_store
WHERE `key` LIKE 'old-%'
"""


class Users:
    """Two programs that know only three columns: one reads, one writes."""

    def __init__(self, connect: Callable[[], pymysql.Connection]) -> None:
        self._connect = connect
        self._stop = threading.Event()
        self.reads = self.counted = 0
        #: How many seconds the slowest statement of each program took.
        self.longest_read = self.longest_write = 0.0

    def stop(self) -> None:
        self._stop.set()

    def read(self) -> None:
        with self._connect() as connection, connection.cursor() as cursor:
            while not self._stop.is_set():
                started = time.perf_counter()
                n = 1 + self.reads * 7919 % ROWS
                cursor.execute(f"SELECT value FROM kv_store WHERE `key` = 'old-{n}'")
                assert cursor.fetchall() == ((f'{{"n":{n}}}',),)
                self.longest_read = max(self.longest_read, time.perf_counter() - started)
                self.reads += 1

    def write(self) -> None:
        with self._connect() as connection, connection.cursor() as cursor:
            cursor.execute("INSERT INTO kv_store (`key`, value) VALUES ('counter', '0')")
            while not self._stop.is_set():
                started = time.perf_counter()
                changed = "value = value + 1, updated_at = SYSDATE(6) WHERE `key` = 'counter'"
                assert cursor.execute(f"UPDATE kv_store SET {changed}") == 1
                self.longest_write = max(self.longest_write, time.perf_counter() - started)
                self.counted += 1


@pytest.mark.parametrize("collation", ["utf8mb4_bin", "utf8mb4_general_ci"])
def test_an_upgrade_loses_nothing(
    make_fleet: Callable[..., Fleet], mariadb: MariaDB, mariadb_url: str, collation: str
) -> None:
    """A reads and B writes during the whole test. If the collation already compares keys by their
    bytes, the upgrade only adds columns, which is quick. Otherwise MariaDB rewrites the whole
    table, and writers wait for that.
    """
    execute(mariadb_url, MAKE.format(collation=collation), FILL)
    fleet = make_fleet(mariadb_url, CELERY_SINGLETON_AUTO_MIGRATE="0")
    database = make_url(mariadb_url).database
    users = Users(lambda: mariadb.connect(database))
    with mariadb.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute(FINGERPRINT)
        before = cursor.fetchall()
        assert before[0][0] == ROWS
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(users.read), pool.submit(users.write)]
            try:
                wait_until(lambda: users.reads > 100 < users.counted, "both programs use the table")
                upgraded = fleet.command("singleton", "migrate")
                seen = users.counted
                wait_until(lambda: users.counted > seen + 100, "both programs go on afterwards")
            finally:
                users.stop()
            for each in running:
                each.result()
        # A figure for ``pytest -s``; it depends on the machine, so the test does not check it.
        print(f"{collation}: longest read {users.longest_read * 1000:.1f} ms,", end=" ")
        print(f"longest write {users.longest_write * 1000:.1f} ms")
        assert (upgraded.returncode, upgraded.stdout) == (0, "table kv_store is ready\n")
        cursor.execute(FINGERPRINT)
        assert cursor.fetchall() == before
        cursor.execute("SELECT value FROM kv_store WHERE `key` = 'counter'")
        assert cursor.fetchall() == ((str(users.counted),),)
    assert columns_and_indexes(mariadb_url) == (
        ALL_COLUMNS,
        [("idx_kv_store_updated_at", ["updated_at"])],
    )
    store = open_store(mariadb_url, "kv_store", 5.0)
    use_all(store)
    first = store.acquire(f"old-{ROWS}", "h", 60, None)
    store.close()
    assert first is not None
    assert first.value == f'{{"n":{ROWS}}}'
