"""Connections to MariaDB and MySQL, by PyMySQL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pymysql
from pymysql.constants import CLIENT
from sqlalchemy import URL, Engine, event

from .pooled import APPLICATION_NAME, pooled


class Connection(pymysql.connections.Connection):  # type: ignore[misc]
    """A connection whose patience with a server that stays silent can be changed.

    It knows whether it was broken off in mid-statement, by a time limit say.
    """

    is_in_mid_statement = False

    def query(self, *args: Any, **kwargs: Any) -> Any:
        return self._whole(super().query, *args, **kwargs)

    def next_result(self, *args: Any, **kwargs: Any) -> Any:
        return self._whole(super().next_result, *args, **kwargs)

    def _whole(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.is_in_mid_statement = True
        try:
            result = step(*args, **kwargs)
        except pymysql.MySQLError:
            self.is_in_mid_statement = not self.open
            raise
        self.is_in_mid_statement = False
        return result

    def leave_to_parent(self) -> None:
        """In a forked child. The session's end is not sent."""
        self._force_close()

    @property
    def patience(self) -> float | None:
        patience: float | None = self._read_timeout
        return patience

    @patience.setter
    def patience(self, seconds: float | None) -> None:
        self._read_timeout = seconds


def make(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    """An engine."""
    engine = pooled(
        url,
        pool_size,
        io_timeout,
        connect_args={
            "charset": "utf8mb4",
            "client_flag": CLIENT.MULTI_STATEMENTS | CLIENT.FOUND_ROWS,
            "connect_timeout": connect_timeout,
            "read_timeout": io_timeout,
            "write_timeout": io_timeout,
            "program_name": APPLICATION_NAME,
            # Times are UTC, and a text that is too long is an error.
            "init_command": "SET time_zone = '+00:00', sql_mode = 'TRADITIONAL',"
            f" innodb_lock_wait_timeout = {math.ceil(io_timeout)}",
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, args: Any, kwargs: Any) -> Connection:
        return Connection(*args, **kwargs)

    return engine
