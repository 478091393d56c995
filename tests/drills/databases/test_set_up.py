"""Real workers on databases whose set-up has an error, or whose encoding lacks characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from celery import Celery

from celery_singleton_state import SchemaDecodeFailed
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.runtime import runtime_of
from tests.helpers.fleet import Fleet, outcome, refused
from tests.helpers.roles import of
from tests.helpers.servers import Postgres
from tests.helpers.tables import execute
from tests.helpers.waiting import wait_until

ROLE = "drill_worker"


@pytest.fixture
def role_url(postgres: Postgres, server_url: str) -> Iterator[str]:
    """The URL of a database whose owner is a role of the test's own."""
    database = server_url.rpartition("/")[2]
    postgres._admin(f"CREATE ROLE {ROLE} LOGIN")
    postgres._admin(f"ALTER DATABASE {database} OWNER TO {ROLE}")
    yield of(ROLE, server_url)
    execute(server_url, f"REASSIGN OWNED BY {ROLE} TO postgres")
    postgres._admin(f"DROP ROLE {ROLE}")


@pytest.mark.parametrize(
    ("away", "back", "message"),
    [
        (f"ALTER ROLE {ROLE} NOLOGIN", f"ALTER ROLE {ROLE} LOGIN", "is not permitted to log in"),
        ("ALTER DATABASE {0} RENAME TO {0}_old", "ALTER DATABASE {0}_old RENAME TO {0}", "exist"),
    ],
    ids=["login", "database"],
)
def test_a_set_up_that_an_administrator_repairs_fails_no_work(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    postgres: Postgres,
    role_url: str,
    away: str,
    back: str,
    message: str,
) -> None:
    database = role_url.rpartition("/")[2]
    fleet = make_fleet(role_url, CELERY_SINGLETON_HEARTBEAT_INTERVAL="2")
    app, worker = client(), fleet.start("-c", "1")
    assert outcome(app.send_task("increment")) == 1
    ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    if "RENAME" in away:
        postgres._admin(ended)
        wait_until(lambda: _did(postgres, away.format(database), ended), "the database is renamed")
    else:
        postgres._admin(away)
        postgres._admin(ended)
    result = app.send_task("increment")
    wait_until(
        lambda: "StateLoadFailed" in worker.output and message in worker.output, "the retry is sent"
    )
    postgres._admin(back.format(database))
    assert outcome(result) == 2
    assert len(fleet.notes("enter")) == 2


def _did(postgres: Postgres, statement: str, ended: str) -> bool:
    try:
        postgres._admin(statement)
    except Exception:  # another session has connected again
        postgres._admin(ended)
        return False
    return True


def test_a_state_that_the_encoding_lacks_runs_one_body(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], latin1_url: str
) -> None:
    fleet = make_fleet(latin1_url)
    app, worker = client(), fleet.start("-c", "1")
    assert "whose encoding is LATIN1" in worker.output
    outcome(app.send_task("remember", ("Köln",)))
    error = outcome(app.send_task("remember", ("Łódź",)))
    assert isinstance(error, SchemaDecodeFailed)
    assert "LATIN1" in str(error)
    outcome(app.send_task("remember", ("Bern",)))
    assert len(fleet.notes("enter")) == 3
    row = runtime_of(app).store.peek("singleton-state:remember")
    assert row is not None
    assert (row.value, row.last_outcome) == ('{"text":"Bern"}', "succeeded")


def test_a_worker_whose_rows_are_hidden_does_not_start(
    make_fleet: Callable[..., Fleet], postgres: Postgres, server_url: str
) -> None:
    migrate_url(server_url, "kv_store")
    postgres._admin(f"CREATE ROLE {ROLE} LOGIN")
    try:
        hide = f"GRANT ALL ON kv_store TO {ROLE}; ALTER TABLE kv_store ENABLE ROW LEVEL SECURITY"
        execute(server_url, hide)
        fleet = make_fleet(of(ROLE, server_url), CELERY_SINGLETON_AUTO_MIGRATE="0")
        assert "row-level security is active" in refused(fleet, "-P", "solo")
        code, message = _health(fleet)
        assert code == 1
        assert "row-level security is active" in message
    finally:
        execute(server_url, f"DROP OWNED BY {ROLE}")
        postgres._admin(f"DROP ROLE {ROLE}")


def _health(fleet: Fleet) -> tuple[int, str]:
    done = fleet.command("singleton", "health")
    return done.returncode, done.stdout + done.stderr
