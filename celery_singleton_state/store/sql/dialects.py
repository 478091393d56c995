"""The databases that can be a store."""

from __future__ import annotations

from sqlalchemy import Dialect, Table

from .mysql_statements import MySqlStatements
from .returning import PostgresqlStatements, SqliteStatements
from .statements import Statements

_STATEMENTS: dict[str, type[Statements]] = {
    "postgresql": PostgresqlStatements,
    "sqlite": SqliteStatements,
    "mysql": MySqlStatements,
}

#: Names that a URL may begin with.
DIALECTS = ("postgresql", "sqlite", "mariadb", "mysql")


def statements_for(table: Table, dialect: Dialect) -> Statements:
    """The statements for a table on a database."""
    return _STATEMENTS[dialect.name](table, dialect)
