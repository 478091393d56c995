"""Upgrade a table of a database server while other clients read and write it.

``ALTER TABLE`` adds a nullable column quickly, but needs an exclusive lock: it waits for the
slowest open transaction on the table, and all new queries on the table queue behind it. So an
upgrade waits for this lock for one second only. Then the upgrade gives up, lets the queued queries
run, and tries again.

On PostgreSQL the upgrade uses no lock and no setting that outlives a transaction, so that a pooler
such as PgBouncer may stand between this process and the server.
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

#: The longest time, in whole seconds, for which an upgrade waits for the table's lock. Meanwhile
#: other queries on the table queue behind the upgrade. So the time is shorter than the time limit
#: of a singleton's statement, which is a quarter of a lease's life (2 s by default).
LOCK_TIMEOUT = 1
#: Seconds between two attempts of an upgrade to get the table's lock.
PAUSE = 2.0
#: Seconds for which an upgrade is tried again while the table is locked. Then the upgrade fails.
PATIENCE = 300.0
#: The longest time, in seconds, for which a migration on MariaDB or MySQL waits for the end of
#: another migration.
LONGEST_MIGRATION = 1800

#: Maps SQLAlchemy's name of each database server to the statement that limits how long a
#: transaction waits for a lock.
_GIVE_UP_SOON = {
    "postgresql": "SET LOCAL lock_timeout = '{seconds}s'",
    # Set lock_wait_timeout, because innodb_lock_wait_timeout does not apply to the metadata lock
    # that ALTER TABLE waits for.
    "mysql": "SET SESSION lock_wait_timeout = {seconds}",
}

#: A PostgreSQL query that describes, for a log line or an error, the sessions that hold a lock on
#: the table. It returns one text for each session, for at most three sessions: the sessions with
#: the oldest transactions.
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
    """Run an upgrade of a table while no other process upgrades it, and repeat the upgrade while
    the table is locked.

    :param upgrade: upgrades the table in a transaction that begins with :func:`give_up_soon`. This
        function is called again if the transaction could not get a lock.
    :raises StoreMisconfigured: the role lacks a privilege.
    :raises StoreUnavailable: the table was locked for too long. The error says which sessions hold
        a lock, or how to list them.
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
            f"role {engine.url.username} may not create or upgrade table {table_name} "
            f"({error.orig}); run as the table's owner, or as a role that may create it: "
            "celery -A <your app> singleton migrate"
        ) from error


def give_up_soon(connection: Connection) -> None:
    """Let a connection's transaction wait for a lock no longer than ``LOCK_TIMEOUT``."""
    setting = _GIVE_UP_SOON.get(connection.dialect.name)
    if setting is not None:
        connection.execute(sa.text(setting.format(seconds=LOCK_TIMEOUT)))


@contextmanager
def _alone_on_postgresql(engine: Engine, name: str) -> Iterator[None]:
    """Let only one migration run at a time: hold an advisory lock of PostgreSQL during the block.

    A migration that waits for another one asks for the lock again and again, and has no open
    transaction meanwhile, because an index build of the other migration would wait for the end of
    such a transaction.
    """
    lock = zlib.crc32(name.encode())
    while True:
        with open_transaction(engine) as connection:
            if connection.scalar(sa.func.pg_try_advisory_xact_lock(lock).select()):
                # This transaction only holds the lock, and stays idle during the migration. So the
                # server must not end the transaction for its idleness.
                connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                yield
                return
        time.sleep(PAUSE / 10)


@contextmanager
def _alone_on_mysql(engine: Engine, name: str) -> Iterator[None]:
    """Let only one migration run at a time: hold a named lock of the server during the block."""
    with engine.connect() as connection:
        lock = sa.func.get_lock(name[-64:], LONGEST_MIGRATION).select()
        if connection.scalar(lock) != 1:
            raise StoreUnavailable(
                f"another migration of the table has not ended within {LONGEST_MIGRATION} s"
            )
        try:
            yield
        finally:
            # The lock lasts as long as the connection. So close the connection instead of returning
            # it to the pool, which would keep it open.
            connection.invalidate()


#: Maps SQLAlchemy's name of each database server to the context manager that lets only one
#: migration run at a time.
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
                    f"table {table_name} could not be upgraded within {PATIENCE:g} s, because it "
                    f"is locked: {holders}"
                ) from error
            logger.warning("table %s is locked, trying again: %s", table_name, holders)
        time.sleep(PAUSE)


def _holders(engine: Engine, table_name: str) -> str:
    if engine.dialect.name == "mysql":
        return "SHOW FULL PROCESSLIST and information_schema.innodb_trx list the sessions"
    if engine.dialect.name != "postgresql":
        return "see the server's list of locks for the sessions"
    quoted = engine.dialect.identifier_preparer.format_table(make_table(table_name))
    with engine.connect() as connection:
        found = connection.scalars(sa.text(_HOLDERS), {"table": quoted})
        return "; ".join(found) or "no session holds a lock any more"
