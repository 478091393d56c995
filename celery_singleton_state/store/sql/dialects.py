"""The SQL databases that can be a store. Each database has an entry here, a module, and a ``.sql``
file.

The module and the file have the name that SQLAlchemy gives the database. The module must define:

- ``make(url, io_timeout, pool_size, connect_timeout)``, which returns an engine
  (:func:`~celery_singleton_state.store.sql.engine.make_engine` explains the arguments);
- ``STATEMENTS``, a subclass of :class:`~celery_singleton_state.store.sql.statements.Statements`.
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
    """The names by which a URL may refer to a database and its drivers.

    :param drivers: the drivers that a URL may name. This package always uses the first driver. The
        other ones are accepted because users copy URLs from Django, SQLAlchemy or Celery.
    :param names: the names with which a URL may begin. Left out: SQLAlchemy's name of the database.
    :param also: further names with which a URL may begin, but which no error suggests.
    """

    drivers: tuple[str, ...]
    names: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


#: Maps SQLAlchemy's name of each supported database to the names that a URL may use for it.
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

#: The names with which a URL may begin, for the error about a URL that is not supported.
DIALECTS = tuple(each for name, database in DATABASES.items() for each in database.names or (name,))


def backend_of(name: str) -> str:
    """Return SQLAlchemy's name of a database, given the name with which its URL begins.

    An unknown name is returned unchanged.
    """
    for backend, database in DATABASES.items():
        if name in database.names + database.also:
            return backend
    return name


@lru_cache
def module_of(backend: str) -> Any:
    """Import and return the module of a database.

    The import is postponed until the database is used, because the module imports the driver.

    :raises ImportError: the driver is not installed.
    """
    return import_module(f".{backend}", __package__)


def class_of(dialect: Dialect) -> type[Statements]:
    """Return the :class:`Statements` subclass of a database."""
    found: type[Statements] = module_of(dialect.name).STATEMENTS
    return found


def statements_for(table: Table, dialect: Dialect) -> Statements:
    """Return the statements for a table in a database."""
    return class_of(dialect)(table, dialect)
