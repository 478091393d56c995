"""Calls of scripts, over connections that are kept at hand.

Of redis-py's client only the way to connect is used. Its pool is not used, for three reasons:

- A time limit can interrupt a call after its request was sent. redis-py 8.1, as it is set by
  default, gives the connection to the next call, which reads the interrupted call's answer as its
  own.
- When a primary has become a replica, the pool finds out with each connection anew.
- With redis-py's client and its pool a run costs more. A no-op run in a worker takes 0.95 of that
  time, its two calls take 0.84 (prefork) or 0.77 (solo), and a pool's process uses 0.88 of the CPU
  time (``python -m benchmarks layers``; medians of 60 turns, on two busy cores).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha1
from typing import Any

from redis import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from celery_singleton_state.compat import redis_connection
from celery_singleton_state.store.connecting import connecting
from celery_singleton_state.store.options import LEASES

from .errors import is_elsewhere

#: Bytes: the server's default for the largest text, and the least that it can be set to.
DEFAULT_LARGEST, LEAST_LARGEST = 2**29, 2**20


class ScriptCalls:
    """Calls of any number of threads; each has a connection for itself meanwhile.

    :param make_client: makes a client that does not connect yet. It is called again in a forked
        process, which uses nothing of its parent's: neither sockets, nor locks that another
        thread of the parent may have held.
    """

    def __init__(self, make_client: Callable[[], Redis]) -> None:
        self._make_client = make_client
        self._mine = _Connections(make_client())
        #: Those of the processes that this one was forked from: never used, and never freed,
        #: because a client that is freed asks for its pool's lock.
        self._inherited: list[_Connections] = []

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

    def info(self) -> dict[str, str]:
        """What the server says of itself.

        :raises RedisError: whatever the client library raises.
        """
        lines = self._send("INFO").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def largest(self) -> int:
        """Bytes of the largest text that the server takes, if it says so; else its default.

        :raises RedisError: whatever the client library raises, but for a refusal.
        """
        try:
            answer = self._send("CONFIG", "GET", "proto-max-bulk-len")
            # A list by the older protocol, a dict by the newer one.
            found = answer.values() if isinstance(answer, dict) else answer[1:]
            return int(next(iter(found)))
        except (ResponseError, StopIteration, ValueError):
            return DEFAULT_LARGEST

    def close(self) -> None:
        """Close all connections; those in use are closed after their calls."""
        own = self._own()
        own.connect_anew(own.idle)

    def _send(self, *words: Any) -> Any:
        own = self._own()
        idle = own.idle
        connection = own.take(idle)
        try:
            connection.send_command(*words)
            answer = connection.read_response()
        except RedisError as error:
            if isinstance(error, ResponseError) and not is_elsewhere(error):
                own.give_back(connection, idle)
            else:
                connection.disconnect()
                own.connect_anew(idle)
            raise
        except BaseException:
            # Broken off, by a time limit say: the next call must not be given this answer.
            connection.disconnect()
            raise
        own.give_back(connection, idle)
        return answer

    def _own(self) -> _Connections:
        if self._mine.pid != os.getpid():
            self._inherited.append(self._mine)
            self._mine = _Connections(self._make_client())
        return self._mine


class _Connections:
    """The connections of one process to one server.

    A thread takes an idle connection out of the list and puts it back after an answer. A connection
    whose call was broken off is never put back. When the primary has become another server, the
    list is replaced, and a connection that was taken from an older list is closed instead of being
    put back: so one refusal is enough for all connections to be made anew.
    """

    def __init__(self, client: Redis) -> None:
        self.pid = os.getpid()
        self.idle: list[Any] = []
        self._client: Any = client

    def take(self, idle: list[Any]) -> Any:
        """A connection that is ready to be used; it may connect as it sends."""
        try:
            connection = idle.pop()
        except IndexError:
            connection = redis_connection(self._client)
        try:
            with connecting(LEASES, RedisError):
                connection.connect()
                if _is_spoilt(connection):
                    connection.disconnect()
                    connection.connect()
        except BaseException:
            # Half made: it may not have been told its database yet.
            connection.disconnect()
            raise
        return connection

    def give_back(self, connection: Any, idle: list[Any]) -> None:
        """:param idle: the list that it was taken from."""
        if idle is self.idle:
            idle.append(connection)
        else:
            connection.disconnect()

    def connect_anew(self, idle: list[Any]) -> None:
        """Have all later calls connect anew, unless another thread has done so meanwhile.

        :param idle: the list that was the present one when the caller took its connection.
        """
        if idle is self.idle:
            self.idle = []
        while idle:
            idle.pop().disconnect()


def _is_spoilt(connection: Any) -> bool:
    """Whether the server has closed it, or said something unasked."""
    try:
        return bool(connection.can_read())
    except (RedisError, OSError):
        return True


@cache
def _digest(script: str) -> str:
    return sha1(script.encode()).hexdigest()
