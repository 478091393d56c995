"""Calls of scripts: over one connection that is kept at hand, and over the client's pool.

What redis-py adds to a command beside sending it and reading its answer (the pool, tries, what it
tells of itself) costs more than the server's work. So the first caller has a connection for itself,
and who comes while it is in use goes the client's way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from hashlib import sha1
from typing import Any

from redis import Redis
from redis.exceptions import NoScriptError, RedisError


class ScriptCalls:
    """:param client: connects, at first use, and again whenever that is needed."""

    def __init__(self, client: Redis) -> None:
        self._client: Any = client
        #: Held by whoever uses the kept connection. One that a signal takes away before its
        #: release only sends all later callers to the pool.
        self._in_use = threading.Lock()
        #: A client of one of the pool's connections, and the process that it is of.
        self._kept: Any = None
        self._pid = 0

    def call(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Its answer, after one request; after two from a server that does not know the script.

        :raises RedisError: whatever the client library raises.
        """
        words = [len(keys), *keys, *arguments]
        try:
            return self._send("EVALSHA", _digest(script), *words)
        except NoScriptError:
            # New to this server, or its scripts were flushed.
            return self._send("EVAL", script, *words)

    def _send(self, *words: Any) -> Any:
        try:
            if not self._in_use.acquire(blocking=False):
                return self._client.execute_command(*words)
            try:
                return _ask(self._connection(), words)
            finally:
                self._in_use.release()
        except RedisError:
            raise
        except BaseException:
            # Broken off, by a time limit say: who asks next must be given neither this answer nor a
            # connection that was not told its database yet.
            self._client.connection_pool.disconnect()
            raise

    def _connection(self) -> Any:
        if self._kept is None or self._pid != os.getpid():
            # One that a fork left here is its parent's.
            self._kept, self._pid = self._client.client(), os.getpid()
        connection = self._kept.connection
        connection.connect()
        if _is_spoilt(connection):
            # Sending connects it again.
            connection.disconnect()
        return connection


def _ask(connection: Any, words: Sequence[Any]) -> Any:
    try:
        connection.send_command(*words)
        return connection.read_response()
    except NoScriptError:
        raise
    except RedisError:
        # It is in no state to be reused, or its server is one that may only be read.
        connection.disconnect()
        raise


def _is_spoilt(connection: Any) -> bool:
    """Whether the server has closed it, or said something unasked."""
    try:
        return bool(connection.can_read())
    except (RedisError, OSError):
        return True


@cache
def _digest(script: str) -> str:
    return sha1(script.encode()).hexdigest()
