"""A shop: a store on a server, a proxy that can stall a request, and workers behind the proxy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.base import Row
from tests.apps.copied import copied
from tests.helpers.fleet import Fleet, Worker
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres, Proxy
from tests.helpers.waiting import wait_until
from tests.storm.fleet import through

APP = "tests.apps.step_app"


class Shop:
    """A database, and workers of :mod:`tests.apps.step_app` that reach the database through a
    proxy.

    :param database: the database's URL without the proxy.
    """

    def __init__(
        self,
        server: Postgres | MariaDB,
        make_fleet: Callable[..., Fleet],
        proxy: Proxy,
        **settings: object,
    ) -> None:
        self.server, self.proxy = server, proxy
        self.database = server.create_database_for_shop("shop")
        migrate_url(self.database, "kv_store")
        self.engine = sa.create_engine(self.database, poolclass=sa.NullPool)
        copied.metadata.create_all(self.engine)
        # Without prepared statements each request is one message, whose text the proxy can
        # recognise.
        more = "?prepare_threshold=none" if isinstance(server, Postgres) else ""
        self.fleet = make_fleet(through(proxy, self.database) + more, **settings)
        self._store = open_store(self.database, "kv_store", io_timeout=5.0, pool_size=1)

    def close(self) -> None:
        self._store.close()
        self.engine.dispose()

    def start(self, *options: str) -> Worker:
        return self.fleet.start(*(options or ("-c", "1")), app=APP)

    def wait_reached(self, place: str) -> dict[str, Any]:
        """Wait until a body has reached a place; return its note."""

        def reached() -> dict[str, Any] | None:
            notes = (note for note in self.fleet.notes("reached") if note["place"] == place)
            return next(notes, None)

        found: dict[str, Any] | None = wait_until(reached, f"a body reaches {place}")
        assert found is not None
        return found

    def row(self, name: str) -> Row | None:
        return self._store.peek(f"singleton-state:{name}")

    def rows(self) -> list[int]:
        """Return the numbers that the bodies have copied, from the shop's own table."""
        with self.engine.begin() as connection:
            return list(connection.scalars(sa.select(copied.c.n).order_by(copied.c.n)))

    def wait_released(self, name: str, deadline: float) -> None:
        """Wait until the lease is released. An expired lease does not count: its row still has a
        holder.
        """

        def is_free() -> bool:
            row = self.row(name)
            return row is None or row.holder is None

        wait_until(is_free, f"the lease of {name} is released", deadline)


class Gate:
    """A file that bodies wait for: the test opens the gate by making the file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self._file = name, folder / name

    @property
    def step(self) -> list[str]:
        """The step of a body (see step_app) that waits for this gate."""
        return ["reach", self.name, str(self._file)]

    def open(self) -> None:
        self._file.touch()


class StoppedBackends:
    """The server's processes for the workers' connections, paused, so that they read no request."""

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self._pids = server.backends()
        assert self._pids
        for pid in self._pids:
            os.kill(pid, signal.SIGSTOP)

    def deliver(self) -> None:
        """Resume the processes, and wait until each has carried out its request and exited."""
        for pid in self._pids:
            os.kill(pid, signal.SIGCONT)
        wait_until(
            lambda: not set(self._pids) & set(self._server.backends()), "the late backends end"
        )
