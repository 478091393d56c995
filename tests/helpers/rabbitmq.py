"""A real RabbitMQ server for the tests, from the system's packages: no wheel contains it.

If it is not installed, its tests are skipped; with ``SINGLETON_TEST_RABBITMQ=required`` in the
environment, as in CI, they fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess

import pytest

from tests.helpers.servers import Server, free_port
from tests.helpers.waiting import wait_until

#: The places where Debian, Ubuntu and Fedora install the start script that keeps the user.
SCRIPTS = "/usr/lib/rabbitmq/bin"


def find_rabbitmq() -> str:
    """Return the path of RabbitMQ's start script; skip the test if it is not installed."""
    found = shutil.which("rabbitmq-server", path=f"{SCRIPTS}:{os.environ.get('PATH', '')}")
    if found:
        return found
    assert os.environ.get("SINGLETON_TEST_RABBITMQ") != "required", "no rabbitmq-server here"
    pytest.skip("no rabbitmq-server here")


class RabbitMQ(Server):
    """A server with an Erlang port mapper (epmd) of its own, so that no process is left behind."""

    def __init__(self) -> None:
        script = find_rabbitmq()
        super().__init__("rabbitmq")
        self._script = script
        mapper_port = free_port()
        (self.directory / "plugins").write_text("[].\n")
        self._environment = os.environ | {
            "HOME": str(self.directory),
            "ERL_EPMD_PORT": str(mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "test@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "data"),
            "RABBITMQ_LOG_BASE": str(self.directory),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "none"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        }
        self._mapper = subprocess.Popen(
            ["epmd", "-port", str(mapper_port)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.start()

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """Return the broker's URL with another port, for example a proxy's."""
        return f"amqp://guest:guest@127.0.0.1:{port}//"

    def start(self) -> None:
        self.spawn(self._script, env=self._environment, start_new_session=True)
        wait_until(self._answers, f"RabbitMQ on port {self.port}", deadline=90.0)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Kill the server and all its helper processes. The messages that it has confirmed are
        kept.
        """
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            self.process.wait(timeout=30)
            self.process = None
            wait_until(lambda: not self._listens(), "RabbitMQ's port is free")

    def close(self) -> None:
        self.stop()
        self._mapper.kill()
        self._mapper.wait()
        shutil.rmtree(self.directory)

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"RabbitMQ did not start:\n{self.log.read_text()}")
        return self._listens()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
