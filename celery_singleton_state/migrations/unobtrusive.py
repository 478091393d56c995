"""Upgrading a table of a server's while others read and write it.

A column that may be null is added at once, but by a statement that nobody may be beside: it waits
for the slowest reader, and all who come after wait behind it. So it waits for a moment only, lets
those go on, and asks again.

Nothing here outlives a transaction on PostgreSQL, so that a pooler may stand in between.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from celery_singleton_state.store.base import StoreMisconfigured, StoreUnavailable
from celery_singleton_state.store.sql.errors import is_forbidden, is_locked, is_undone
from celery_singleton_state.store.sql.schema import make_table
from celery_singleton_state.store.sql.store import open_transaction
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: Whole seconds that others wait at most behind a change that waits itself: less than a statement
#: of a singleton's may take (a quarter of a lease's life, 2 s by default).
LOCK_TIMEOUT = 1
#: Seconds between two tries, and until the last one.
PAUSE = 2.0
PATIENCE = 300.0
#: Seconds that a migration waits for another one.
LONGEST_MIGRATION = 1800

_GIVE_UP_SOON = {
    "postgresql": "SET LOCAL lock_timeout = '{seconds}s'",
    # What a metadata lock is waited for.
    "mysql": "SET SESSION lock_wait_timeout = {seconds}",
}

_HOLDERS = """
SELECT CASE WHEN pid IS NULL THEN 'a prepared transaction' ELSE
  concat_ws(', ', 'pid ' || pid, nullif(application_name, ''), 'role ' || usename,
    state || ' since ' || date_trunc('second', xact_start)) END
FROM (
  SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'relation' AND granted
  AND relation = to_regclass(:table)
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
) AS locks LEFT JOIN pg_stat_activity USING (pid) ORDER BY xact_start LIMIT 3
"""


def migrate(engine: Engine, table_name: str, upgrade: Callable[[], None]) -> None:
    """Upgrade, alone and patiently.

    :param upgrade: in a transaction that begins with :func:`give_up_soon`; may be called again
        after it gave up.
    :raises StoreMisconfigured: the role may not do it.
    :raises StoreUnavailable: the table was locked all the time; the message says by whom.
    """
    alone = _ALONE.get(engine.dialect.name)
    name = f"celery-singleton-state:{table_name}"
    try:
        with alone(engine, name) if alone else nullcontext():
            _patiently(engine, table_name, upgrade)
    except DBAPIError as error:
        if not is_forbidden(error):
            raise
        raise StoreMisconfigured(
            f"role {engine.url.username} may not make or upgrade table {table_name} "
            f"({error.orig}); run as the table's owner, or as a role that may make it: "
            "celery -A <your app> singleton migrate"
        ) from error


def give_up_soon(connection: Connection) -> None:
    """Let this transaction wait for a lock no longer than others may wait behind it."""
    setting = _GIVE_UP_SOON.get(connection.dialect.name)
    if setting is not None:
        connection.execute(sa.text(setting.format(seconds=LOCK_TIMEOUT)))


@contextmanager
def _alone_on_postgresql(engine: Engine, name: str) -> Iterator[None]:
    """One migration at a time.

    Who waits asks again and again, over no connection: one that waited in a statement would be
    waited for by an index that is being built.
    """
    lock = zlib.crc32(name.encode())
    while True:
        with open_transaction(engine) as connection:
            if connection.scalar(sa.func.pg_try_advisory_xact_lock(lock).select()):
                # It does nothing until the others' work is done.
                connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                yield
                return
        time.sleep(PAUSE / 10)


@contextmanager
def _alone_on_mysql(engine: Engine, name: str) -> Iterator[None]:
    """One migration at a time, by a lock of a connection's that uses no table."""
    with engine.connect() as connection:
        lock = sa.func.get_lock(name[-64:], LONGEST_MIGRATION).select()
        if connection.scalar(lock) != 1:
            raise StoreUnavailable(f"another migration goes on for {LONGEST_MIGRATION} s")
        try:
            yield
        finally:
            # It would end with the connection, which goes back to a pool.
            connection.invalidate()


#: How one migration at a time is seen to, by the database's name.
_ALONE = {"postgresql": _alone_on_postgresql, "mysql": _alone_on_mysql}


def _patiently(engine: Engine, table_name: str, upgrade: Callable[[], None]) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return upgrade()
        except OperationalError as error:
            if not (is_locked(error) or is_undone(error)):
                raise
            holders = _holders(engine, table_name)
            if time.monotonic() > until:
                raise StoreUnavailable(
                    f"table {table_name} could not be upgraded within {PATIENCE:g} s, as others "
                    f"have locked it: {holders}"
                ) from error
            logger.warning("table %s is locked, trying again: %s", table_name, holders)
        time.sleep(PAUSE)


def _holders(engine: Engine, table_name: str) -> str:
    if engine.dialect.name == "mysql":
        return "SHOW FULL PROCESSLIST and information_schema.innodb_trx tell by whom"
    if engine.dialect.name != "postgresql":
        return "the server's list of locks tells by whom"
    quoted = engine.dialect.identifier_preparer.format_table(make_table(table_name))
    with engine.connect() as connection:
        found = connection.scalars(sa.text(_HOLDERS), {"table": quoted})
        return "; ".join(found) or "by nobody any more"
