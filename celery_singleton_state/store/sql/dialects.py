"""The databases that can be a store: each has an entry here, a module, and a ``.sql`` file.

A database's module, and file, have SQLAlchemy's name of the database. The module has two names that
are asked for:

- ``make(url, io_timeout, pool_size, connect_timeout)``, an engine;
- ``STATEMENTS``, a class of :class:`~celery_singleton_state.store.sql.statements.Statements`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from sqlalchemy import Dialect, Table

from .statements import Statements


@dataclass(frozen=True)
class Database:
    """How a database is named in URLs.

    :param drivers: whose URLs are understood. This package's own driver, which is the first, takes
        their place: people name drivers for Django, SQLAlchemy or Celery.
    :param names: that a URL may begin with; left out: SQLAlchemy's name alone.
    :param also: names that are understood and not offered.
    """

    drivers: tuple[str, ...]
    names: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


#: By SQLAlchemy's name.
DATABASES: Mapping[str, Database] = {
    "postgresql": Database(
        drivers=("psycopg", "psycopg_async", "psycopg2", "psycopg2cffi", "asyncpg", "pg8000"),
        also=("postgres",),
    ),
    "sqlite": Database(drivers=("pysqlite", "aiosqlite")),
    "mysql": Database(
        drivers=(
            "pymysql",
            "mysqldb",
            "mysqlconnector",
            "mariadbconnector",
            "aiomysql",
            "asyncmy",
            "cymysql",
        ),
        names=("mariadb", "mysql"),
    ),
}

#: Names that a URL may begin with, as they are offered.
DIALECTS = tuple(each for name, database in DATABASES.items() for each in database.names or (name,))


def backend_of(name: str) -> str:
    """SQLAlchemy's name of the database whose URLs begin with a name."""
    for backend, database in DATABASES.items():
        if name in database.names + database.also:
            return backend
    return name


@lru_cache
def module_of(backend: str) -> Any:
    """The module of a database. It is imported when it is needed, because it needs the driver.

    :raises ImportError: the driver is not installed.
    """
    return import_module(f".{backend}", __package__)


def class_of(dialect: Dialect) -> type[Statements]:
    """What a database's statements are made by."""
    found: type[Statements] = module_of(dialect.name).STATEMENTS
    return found


def statements_for(table: Table, dialect: Dialect) -> Statements:
    """The statements for a table on a database."""
    return class_of(dialect)(table, dialect)
