"""Call Lua scripts on a Redis or Valkey server, over connections that this module keeps open.

This module uses redis-py's client only to connect. It does not use the client's pool, for three
reasons:

- A time limit can interrupt a call after its request was sent. By default, redis-py 8.1 then gives
  the connection to the next call, and the next call takes the interrupted call's answer for its
  own.
- After a failover each connection of the pool would fail once.
- The pool is slower. With this module a no-op run in a worker takes 0.92 (prefork) or 0.96
  (solo) of the time that the run takes with the client's pool. The run's two calls take 0.79 or
  0.85 of their time, and a prefork child uses 0.86 of the CPU time (``python -m benchmarks
  layers``; medians of 60 turns on two cores).
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

#: The default and the smallest value of the server's setting proto-max-bulk-len: the size, in
#: bytes, of the largest text that a server accepts.
DEFAULT_LARGEST, LEAST_LARGEST = 2**29, 2**20


class ScriptCalls:
    """Calls scripts for any number of threads. Each call has a connection of its own.

    :param make_client: makes a client that does not connect yet. A forked process calls this
        function again, because the process must use neither its parent's sockets nor locks that
        another thread of the parent may have held during the fork.
    """

    def __init__(self, make_client: Callable[[], Redis]) -> None:
        self._make_client = make_client
        self._mine = _Connections(make_client())
        #: The connections that a forked process has inherited from its parents and never uses. This
        #: list keeps Python from freeing them, because a freed client asks for its pool's lock,
        #: which may be locked for ever in the forked process.
        self._inherited: list[_Connections] = []

    def call(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a script and return its answer.

        One request is enough if the server knows the script. Otherwise the first request fails, and
        a second request sends the script's text.

        :raises RedisError: any error of the client library.
        """
        parts = [len(keys), *keys, *arguments]
        try:
            return self._send("EVALSHA", _digest(script), *parts)
        except NoScriptError:
            # Send the script's text, because the server has not seen this script, or has lost it by
            # a restart or by SCRIPT FLUSH.
            return self._send("EVAL", script, *parts)

    def info(self) -> dict[str, str]:
        """Return the server's answer to INFO, as a dict from names to values.

        :raises RedisError: any error of the client library.
        """
        lines = self._send("INFO").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def largest(self) -> int:
        """Return the size of the largest text that the server accepts, in bytes.

        If the server refuses to tell the size, return Redis's default.

        :raises RedisError: the client library's error, if the server does not answer.
        """
        try:
            answer = self._send("CONFIG", "GET", "proto-max-bulk-len")
            # The answer is a list in protocol 2 (RESP2), and a dict in protocol 3.
            found = answer.values() if isinstance(answer, dict) else answer[1:]
            return int(next(iter(found)))
        except (ResponseError, StopIteration, ValueError):
            return DEFAULT_LARGEST

    def close(self) -> None:
        """Close all connections. A connection in use is closed after its call."""
        own = self._own()
        own.connect_anew(own.idle)

    def _send(self, *parts: Any) -> Any:
        own = self._own()
        idle = own.idle
        connection = own.take(idle)
        try:
            connection.send_command(*parts)
            answer = connection.read_response()
        except RedisError as error:
            if isinstance(error, ResponseError) and not is_elsewhere(error):
                own.give_back(connection, idle)
            else:
                connection.disconnect()
                own.connect_anew(idle)
            raise
        except BaseException:
            # The call was interrupted, for example by a time limit. So close the connection,
            # because the next call on it would receive this call's answer.
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

    A thread takes an idle connection out of a list, and returns the connection after the server has
    answered. A connection whose call was interrupted never returns to the list. When another server
    may have become the primary, a new list replaces the old one. A connection from the old list is
    closed instead of returned, so that one refused call is enough to renew all connections.
    """

    def __init__(self, client: Redis) -> None:
        self.pid = os.getpid()
        self.idle: list[Any] = []
        self._client: Any = client

    def take(self, idle: list[Any]) -> Any:
        """Take a connection out of the list, or make one, and connect it if necessary."""
        try:
            connection = idle.pop()
        except IndexError:
            connection = redis_connection(self._client)
        try:
            with connecting(LEASES, RedisError):
                connection.connect()
                if _is_unusable(connection):
                    connection.disconnect()
                    connection.connect()
        except BaseException:
            # Close the connection, because it may be half set up, for example without its database
            # selected.
            connection.disconnect()
            raise
        return connection

    def give_back(self, connection: Any, idle: list[Any]) -> None:
        """Return a connection to its list, or close the connection if its list has been replaced.

        :param idle: the list that the connection was taken from.
        """
        if idle is self.idle:
            idle.append(connection)
        else:
            connection.disconnect()

    def connect_anew(self, idle: list[Any]) -> None:
        """Close the idle connections, so that later calls connect anew.

        :param idle: the list that was in use when the caller took its connection. If another thread
            has replaced this list meanwhile, the connections in the new list stay open.
        """
        if idle is self.idle:
            self.idle = []
        while idle:
            idle.pop().disconnect()


def _is_unusable(connection: Any) -> bool:
    """Return whether a connection cannot be used, because the server has closed it or has sent data
    without a request.
    """
    try:
        return bool(connection.can_read())
    except (RedisError, OSError):
        return True


@cache
def _digest(script: str) -> str:
    return sha1(script.encode()).hexdigest()
