"""Promise P2: no fence is given twice, even if the database loses data or its clock is wrong."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa
from celery import Celery

from tests.helpers.fences import are_growing
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres, Proxy, Standby, Valkey
from tests.helpers.shop import APP, Shop
from tests.helpers.waiting import wait_until


def run(app: Celery, times: int, name: str = "stateless steps") -> None:
    """Run a task ``times`` times, one run after the other. Each run notes its fence."""
    for _ in range(times):
        outcome(app.send_task(name, (["note_fence"],)))


def copy(source: Path, target: Path) -> None:
    """Copy a database with SQLite's own backup, which works while both files are in use."""
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as written:
        read.backup(written)


def fences(fleet: Fleet) -> list[int]:
    return [note["fence"] for note in fleet.notes("fence")]


def test_a_sqlite_file_that_is_restored_from_a_backup(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """One run is made, and then a backup. Two runs are made. The backup is restored. Two more runs
    are made, with new fences.
    """
    store, backup = tmp_path / "store.db", tmp_path / "backup.db"
    fleet = make_fleet(f"sqlite:///{store}")
    app = client()
    fleet.start("-c", "1", app=APP)
    run(app, 1)
    copy(store, backup)
    run(app, 2)
    copy(backup, store)
    run(app, 2)
    assert are_growing(fences(fleet), 5)


def test_a_database_that_is_restored_from_a_backup(
    own_postgres: Postgres, make_shop: Callable[..., Shop], client: Callable[[], Celery]
) -> None:
    """One run is made, and then a dump. Two runs are made. The dump is restored on PostgreSQL while
    the worker goes on. Two more runs are made, with new fences.
    """
    shop = make_shop(own_postgres)
    app = client()
    shop.start()
    dump = own_postgres.directory / "dump"
    run(app, 1)
    own_postgres.tool("pg_dump", "-Fc", "-f", str(dump), "shop")
    run(app, 2)
    own_postgres.tool("pg_restore", "--clean", "-d", "shop", str(dump))
    run(app, 2)
    assert are_growing(fences(shop.fleet), 5)


def test_a_row_that_was_removed(
    own_server: Postgres | MariaDB, make_shop: Callable[..., Shop], client: Callable[[], Celery]
) -> None:
    """The row is deleted between runs, as by ``prune`` or by hand."""
    shop = make_shop(own_server)
    app = client()
    shop.start()
    run(app, 2)
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM kv_store")
    run(app, 2)
    assert are_growing(fences(shop.fleet), 4)


def test_a_redis_that_was_wiped(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    own_valkey: Valkey,
    tmp_path: Path,
) -> None:
    """FLUSHALL removes all data between two runs of a singleton without a state, whose lease is in
    Redis.
    """
    fleet = make_fleet(f"sqlite:///{tmp_path}/store.db", CELERY_SINGLETON_LEASE_URL=own_valkey.url)
    app = client()
    fleet.start("-c", "1", app=APP)
    run(app, 2)
    with redis.Redis(port=own_valkey.port) as server:
        assert server.keys("*stateless steps*")
        server.flushall()
    run(app, 2)
    assert are_growing(fences(fleet), 4)


def test_a_clock_that_was_set_back(
    own_server: Postgres | MariaDB, make_shop: Callable[..., Shop], client: Callable[[], Celery]
) -> None:
    """The server's clock is an hour behind the newest fence. The next fences grow by one from the
    newest fence, and no run waits for the clock.
    """
    shop = make_shop(own_server)
    app = client()
    shop.start()
    run(app, 1)
    with shop.engine.begin() as connection:
        connection.execute(sa.text("UPDATE kv_store SET fence = fence + 3600 * 1000"))
    run(app, 2)
    first, *later = fences(shop.fleet)
    assert later == [first + 3_600_001, first + 3_600_002]


def test_a_failover_that_lost_commits(
    own_postgres: Postgres,
    make_shop: Callable[..., Shop],
    make_standby: Callable[[], Standby],
    link: Proxy,
    client: Callable[[], Celery],
) -> None:
    """An asynchronous standby does not receive two runs. The primary is cut off, and the standby
    takes its place. The two runs and their rows are lost together, but their fences are not given
    again.
    """
    shop = make_shop(own_postgres)
    app = client()
    shop.start()
    steps: Any = (["copy"], ["note_fence"])
    copied = "SELECT n FROM copied ORDER BY n"
    assert outcome(app.send_task("steps", steps)) == 1
    standby = make_standby()
    assert outcome(app.send_task("steps", steps)) == 2
    wait_until(lambda: standby.column("shop", copied) == [1, 2], "the standby follows")
    link.mode = "mute"
    assert [outcome(app.send_task("steps", steps)) for _ in range(2)] == [3, 4]
    standby.promote()
    shop.proxy.target = standby.port
    shop.proxy.cut()
    assert [outcome(app.send_task("steps", steps)) for _ in range(2)] == [3, 4]
    assert standby.column("shop", copied) == [1, 2, 3, 4]
    assert are_growing(fences(shop.fleet), 6)
