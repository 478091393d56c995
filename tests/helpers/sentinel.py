"""Servers for failovers of Redis leases: a replica of a master, and a Sentinel that watches both
servers.
"""

from __future__ import annotations

import redis

from tests.helpers.servers import Server, Valkey
from tests.helpers.waiting import wait_until

NAME = "leases"


class Replica(Valkey):
    """A server that replicates another server.

    :param port: the port of the other server.
    """

    def __init__(self, port: int) -> None:
        self._followed = port
        super().__init__()

    def start(self) -> None:
        super().start()
        with redis.Redis(port=self._followed) as client:
            # Without this setting the master waits for five seconds for more replicas.
            client.config_set("repl-diskless-sync-delay", 0)
        with redis.Redis(port=self.port) as client:
            client.replicaof("127.0.0.1", self._followed)
            wait_until(lambda: client.info()["master_link_status"] == "up", "the replica follows")


class Sentinel(Server):
    """A Sentinel that starts a failover without others, when its master has been silent for half a
    second.
    """

    def __init__(self, master: Valkey) -> None:
        super().__init__("sentinel")
        config = self.directory / "sentinel.conf"
        config.write_text(
            f"port {self.port}\n"
            f"dir {self.directory}\n"
            f"sentinel monitor {NAME} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {NAME} 500\n"
            f"sentinel failover-timeout {NAME} 2000\n"
        )
        self.spawn(Valkey._find(), str(config), "--sentinel")
        wait_until(self._knows_both, "the sentinel knows master and replica")

    @property
    def url(self) -> str:
        return f"sentinel://127.0.0.1:{self.port}/{NAME}/0"

    def master_port(self) -> int:
        """Return the port of the server that is the master according to the Sentinel."""
        with redis.Redis(port=self.port, decode_responses=True) as client:
            _, port = client.sentinel_get_master_addr_by_name(NAME)
        return int(port)

    def _knows_both(self) -> bool:
        try:
            with redis.Redis(port=self.port, decode_responses=True) as client:
                return len(client.sentinel_slaves(NAME)) == 1
        except redis.RedisError:
            return False
