"""``celery -A proj singleton …``: what an operator sees of the singletons and does to them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click
import msgspec
from celery import Celery
from celery.bin.base import CeleryCommand, handle_preload_options
from celery.exceptions import ImproperlyConfigured
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy.exc import SQLAlchemyError

from . import history
from .cli_next import overview, print_overview, print_times, times_of
from .keys import row_key
from .runtime import runtime_of
from .store.base import Row, StoreError

P = ParamSpec("P")
R = TypeVar("R")


def _says_why(command: Callable[P, R]) -> Callable[P, R]:
    """An error that an operator can mend is one line and exit status 1, not a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (StoreError, ImproperlyConfigured, SQLAlchemyError) as error:
            raise click.ClickException(str(error)) from error

    return run


@click.group(help="Look at the app's singletons and look after them.")
@click.pass_context
@handle_preload_options
def singleton(context: click.Context) -> None:
    """The group; celery's own options come before it."""


@singleton.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
@click.pass_context
@_says_why
def ls(context: click.Context, as_json: bool) -> None:
    """List the singletons that ever ran: lease, fence, runs and how the last one ended."""
    app: Celery = context.obj.app
    runtime = runtime_of(app)
    prefix = runtime.settings.key_prefix
    rows = runtime.store.list(prefix)
    if as_json:
        _print_json([_as_object(row, prefix) for row in rows])
        return
    # A name is what `show` takes, so it is folded and never cut.
    name = Column("singleton", overflow="fold")
    table = Table(name, "fence", "runs", "last", "finished (UTC)", "lease", box=None)
    for row in rows:
        table.add_row(
            _name(row, prefix),
            str(row.fence),
            str(row.run_count),
            row.last_outcome or "-",
            _moment(row.last_finished_at) or "-",
            _lease(row),
        )
    Console().print(table if rows else "no singleton has run yet")


@singleton.command(cls=CeleryCommand)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@click.pass_context
@_says_why
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Show one singleton: its lease, its state and its last runs.

    NAME is as `ls` prints it.
    """
    app: Celery = context.obj.app
    runtime = runtime_of(app)
    prefix = runtime.settings.key_prefix
    row = runtime.store.peek(row_key(prefix, name))
    if row is None:
        raise click.ClickException(
            _unknown(name, [_name(row, prefix) for row in runtime.store.list(prefix)])
        )
    entries = history.decode(row.history, name)
    if as_json:
        runs = [
            msgspec.structs.asdict(run)
            | {"started": _iso(run.started), "finished": _iso(run.finished)}
            for run in entries
        ]
        _print_json(_as_object(row, prefix) | {"value": _value(row), "history": runs})
        return
    _print_row(row, prefix)
    _print_runs(entries)


@singleton.command("next", cls=CeleryCommand)
@click.argument("entry", required=False)
@click.option(
    *("-n", "--count"),
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="How many times of ENTRY.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@click.pass_context
@_says_why
def next_(context: click.Context, entry: str | None, count: int, as_json: bool) -> None:
    """Show which beat leads, and what it sends when; or when ENTRY of beat_schedule is due."""
    app: Celery = context.obj.app
    found = overview(app) if entry is None else times_of(app, entry, count)
    if as_json:
        _print_json(found)
    elif entry is None:
        print_overview(found)
    else:
        print_times(found)


@singleton.command(cls=CeleryCommand)
@click.pass_context
@_says_why
def migrate(context: click.Context) -> None:
    """Make the table, or upgrade it with its rows kept. Safe to run again."""
    from .migrate import migrate as make_table

    settings = runtime_of(context.obj.app).settings
    make_table(settings)
    click.echo(f"table {settings.table} is ready")


def _print_row(row: Row, prefix: str) -> None:
    table = Table(box=None, show_header=False)
    for title, value in (
        ("singleton", _name(row, prefix)),
        ("key", row.key),
        ("lease", _lease(row)),
        ("task", row.task_id or "-"),
        ("fence", str(row.fence)),
        ("runs", str(row.run_count)),
        ("state", row.value),
        ("schema version", str(row.schema_version or "-")),
        ("state changed", _moment(row.updated_at) or "-"),
    ):
        table.add_row(title, value)
    Console().print(table)


def _print_runs(entries: Sequence[history.Entry]) -> None:
    table = Table("started (UTC)", "seconds", "fence", "outcome", "error", box=None)
    for run in reversed(entries):
        table.add_row(
            _moment(run.started),
            f"{run.finished - run.started:.1f}",
            str(run.fence),
            run.outcome,
            run.error or "",
        )
    if entries:
        Console().print(table)


def _as_object(row: Row, prefix: str) -> dict[str, Any]:
    return {
        "singleton": _name(row, prefix),
        "key": row.key,
        "fence": row.fence,
        "holder": row.holder,
        "task_id": row.task_id,
        "expires_in": row.expires_in,
        "schema_version": row.schema_version,
        "run_count": row.run_count,
        "last_outcome": row.last_outcome,
        "last_finished_at": _iso(row.last_finished_at),
    }


def _name(row: Row, prefix: str) -> str:
    return row.key.removeprefix(prefix)


def _lease(row: Row) -> str:
    if row.expires_in is None:
        return "free"
    if row.held:
        return f"{row.holder}, {row.expires_in:.0f} s left"
    return f"{row.holder}, ran out {-row.expires_in:.0f} s ago"


def _value(row: Row) -> Any:
    """The state as JSON; as a text where it cannot be read."""
    try:
        return json.loads(row.value)
    except ValueError:
        return row.value


def _iso(epoch: float | None) -> str | None:
    return None if epoch is None else datetime.fromtimestamp(epoch, UTC).isoformat()


def _moment(epoch: float | None) -> str | None:
    """For people: UTC, to the second."""
    return None if epoch is None else f"{datetime.fromtimestamp(epoch, UTC):%Y-%m-%d %H:%M:%S}"


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"singleton {name!r} has not run yet{hint}"


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=datetime.isoformat))
