"""A real MariaDB server for the tests, from the system's packages: no wheel contains it.

If it is not installed, its tests are skipped; with ``SINGLETON_TEST_MARIADB=required`` in the
environment, as in CI, they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pymysql
import pytest

from tests.helpers.servers import Server
from tests.helpers.waiting import wait_until

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def find(*names: str) -> str:
    """Return the path of a program that may have several names; skip the test if it is not
    installed.
    """
    for name in names:
        if found := shutil.which(name, path=PATH):
            return found
    assert os.environ.get("SINGLETON_TEST_MARIADB") != "required", f"no {names[0]} here"
    pytest.skip(f"no {names[0]} here")


class MariaDB(Server):
    """A server with default settings, except that a commit does not wait for the disk."""

    def __init__(self) -> None:
        program = find("mariadbd", "mysqld")
        install = find("mariadb-install-db", "mysql_install_db")
        super().__init__("mariadb")
        self._program = program
        # Do without asynchronous writes, because the kernel allows a limited number of them, and
        # each server reserves many.
        self._options = ["--no-defaults", f"--datadir={self.directory}/data"]
        self._options += ["--innodb-use-native-aio=0"]
        # Give each server a temporary directory, because servers that are set up at the same time
        # in one such directory crash now and then.
        (self.directory / "tmp").mkdir()
        self._options.append(f"--tmpdir={self.directory}/tmp")
        if os.geteuid() == 0:
            self._options.append("--user=root")
        made = subprocess.run(
            [install, *self._options, "--auth-root-authentication-method=normal", "--skip-test-db"],
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        self.start()

    def start(self) -> None:
        self.spawn(
            self._program,
            *self._options,
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            f"--socket={self.directory}/socket",
            f"--pid-file={self.directory}/pid",
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-buffer-pool-size=32M",
            "--max-allowed-packet=64M",
        )
        wait_until(self._answers, f"MariaDB on port {self.port}")

    def url(self, database: str, port: int | None = None) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{port or self.port}/{database}"

    def create_database(self, name: str) -> str:
        self._admin(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        self._admin(f"DROP DATABASE {name}")

    def create_database_for_shop(self, name: str) -> str:
        """Create a database, and a user whom :meth:`make_read_only` keeps from writing, unlike
        root.
        """
        url = self.create_database(name)
        self._admin("CREATE USER shop@'%'")
        self._admin(f"GRANT ALL ON {name}.* TO shop@'%'")
        return url.replace("root@", "shop@")

    def make_read_only(self, whether: bool) -> None:
        """Have the server refuse writes, as a standby does, or accept them again. Root may always
        write.
        """
        self._admin(f"SET GLOBAL read_only = {int(whether)}")

    def connect(self, database: str | None = None) -> pymysql.Connection:
        return pymysql.connect(
            host="127.0.0.1", port=self.port, user="root", database=database, autocommit=True
        )

    def _admin(self, statement: str) -> None:
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement)

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"MariaDB did not start:\n{self.log.read_text()}")
        try:
            self.connect().close()
        except pymysql.OperationalError:
            return False
        return True
