"""A real PgBouncer for the tests, from the system's packages: no wheel contains it.

If it is not installed, its tests are skipped; with ``SINGLETON_TEST_PGBOUNCER=required`` in the
environment, as in CI, they fail.
"""

from __future__ import annotations

import os
import pwd
import shutil
from typing import Any

import psycopg
import pytest

from tests.helpers.servers import Server
from tests.helpers.waiting import wait_until

#: The folder in which Debian and Ubuntu install PgBouncer. Only root's path contains this folder.
SBIN = "/usr/sbin"
#: PgBouncer's connections to a database: fewer than a test has clients, so that clients share
#: connections and get a different one in mid-session.
SERVER_CONNECTIONS = 3


def find_pgbouncer() -> str:
    """Return the path of PgBouncer; skip the test if it is not installed."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:{SBIN}")
    if found:
        return found
    assert os.environ.get("SINGLETON_TEST_PGBOUNCER") != "required", "no pgbouncer here"
    pytest.skip("no pgbouncer here")


class PgBouncer(Server):
    """A pooler in transaction mode in front of all databases of a server on this host.

    Its settings are the defaults except where a test needs others. PgBouncer refuses to run as
    root, so tests that run as root start it as the user nobody.

    :param port: the port of the server behind the pooler.
    """

    def __init__(self, port: int) -> None:
        program = find_pgbouncer()
        super().__init__("pgbouncer")
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": SERVER_CONNECTIONS,
            # End idle connections soon: each test leaves a database behind, and together they would
            # keep more connections than the server allows.
            "server_idle_timeout": 5,
        }
        config = self.directory / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={port} user=postgres\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in settings.items())
        )
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        self.spawn(program, str(config), cwd=self.directory, **user)
        wait_until(self._answers, f"PgBouncer on port {self.port}")

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"PgBouncer did not start:\n{self.log.read_text()}")
        try:
            psycopg.connect(
                f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
            ).close()
        except psycopg.OperationalError:
            return False
        return True
