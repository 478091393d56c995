"""The commands ``celery singleton ls`` and ``show``: print all singletons, or one in detail."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec
from celery import Celery
from celery.bin.base import CeleryCommand
from rich.live import Live
from rich.table import Table

from celery_singleton_state import history, ticks_done
from celery_singleton_state.health import evaluate
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.store.base import Listed, Row
from celery_singleton_state.text.moments import iso, moment, seconds, short_moment
from celery_singleton_state.text.visible import as_printed

from .common import complete_name, find, load_tasks, report_errors
from .terminal import plain_console, print_json, print_table, say, shown_json, table

#: The seconds between two updates of the table of ``ls --watch``.
WATCH = 2.0
NONE = "no singleton has run yet"
LISTED = ("singleton", "fence", "runs", "last", "at (UTC)", "healthy", "lease")
RUNS = ("started (UTC)", "seconds", "fence", "outcome", "error")


@click.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
@click.option("-w", "--watch", is_flag=True, help="Update the list every 2 s until interrupted.")
@click.pass_context
@report_errors
def ls(context: click.Context, as_json: bool, watch: bool) -> None:
    """List all singletons, with lease, fence, number of runs, last outcome and health."""
    if as_json and watch:
        raise click.UsageError("--watch and --json cannot be used together")
    app: Celery = context.obj.app
    load_tasks(app, are_needed=False)
    runtime = runtime_of(app)
    if as_json:
        print_json(_objects(runtime, runtime.rows(runtime.settings.key_prefix)))
    elif watch:
        _watch(runtime)
    elif rows := runtime.rows(runtime.settings.key_prefix):
        print_table(_listed(runtime, rows))
    else:
        say(NONE)


@click.command(cls=CeleryCommand)
@click.argument("name", shell_complete=complete_name)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@click.pass_context
@report_errors
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Show the lease, the state and the last runs of singleton NAME.

    NAME is written as `ls` prints it. Write -- before a name that begins with a dash.
    """
    app: Celery = context.obj.app
    load_tasks(app, are_needed=False)
    runtime = runtime_of(app)
    prefix = runtime.settings.key_prefix
    row, _ = find(runtime, name)
    entries = history.decode(row.history, name)
    if as_json:
        runs = [_run_as_object(run) for run in entries]
        (found,) = _objects(runtime, [row])
        known = ticks_done.decode(row.ticks_done, name)
        # Leave ticks_done out of the output for a singleton that no beat sends.
        ticks = {"ticks_done": {entry: _ticks_as_object(own) for entry, own in known.items()}}
        print_json(found | {"value": _value(row), "history": runs} | (ticks if known else {}))
        return
    _print_row(row, prefix)
    _print_runs(entries)


def _watch(runtime: Runtime) -> None:
    with Live(_seen_now(runtime), console=plain_console(), auto_refresh=False) as screen:
        try:
            while True:
                time.sleep(WATCH)
                screen.update(_seen_now(runtime), refresh=True)
        except KeyboardInterrupt:
            return


def _seen_now(runtime: Runtime) -> Table | str:
    rows = runtime.rows(runtime.settings.key_prefix)
    return _listed(runtime, rows) if rows else NONE


def _listed(runtime: Runtime, rows: Sequence[Listed]) -> Table:
    prefix = runtime.settings.key_prefix
    healthy = _healthy(runtime, rows)
    return table(
        LISTED,
        (
            (
                as_printed(_name(row, prefix)),
                str(row.fence),
                str(row.run_count),
                row.last_outcome or "-",
                "-"
                if row.last_finished_at is None
                else short_moment(row.last_finished_at, row.read_at),
                "yes" if healthy[_name(row, prefix)] else "no",
                _lease(row),
            )
            for row in rows
        ),
        folded="lease",
    )


def _healthy(runtime: Runtime, rows: Sequence[Listed]) -> dict[str, bool]:
    return {each.singleton: each.healthy for each in evaluate(runtime, rows).singletons}


def _objects(runtime: Runtime, rows: Sequence[Listed]) -> list[dict[str, Any]]:
    prefix, healthy = runtime.settings.key_prefix, _healthy(runtime, rows)
    return [_as_object(row, prefix) | {"healthy": healthy[_name(row, prefix)]} for row in rows]


def _print_row(row: Row, prefix: str) -> None:
    """Print a row, one line for each field. Lines are not folded, so that a state can be copied."""
    for title, value in (
        ("singleton", as_printed(_name(row, prefix))),
        ("key", as_printed(row.key)),
        ("lease", _lease(row)),
        ("task", row.task_id or "-"),
        ("fence", str(row.fence)),
        ("runs", str(row.run_count)),
        ("state", shown_json(row.value)),
        ("schema version", str(row.schema_version or "-")),
        ("state changed", "-" if row.updated_at is None else moment(row.updated_at)),
    ):
        say(f" {title:<14}  {value} ")


def _print_runs(entries: Sequence[history.Entry]) -> None:
    rows = [
        (
            moment(run.started),
            _tenths(run.finished - run.started),
            str(run.fence),
            run.outcome,
            run.error or "",
        )
        for run in reversed(entries)
    ]
    if rows:
        print_table(table(RUNS, rows))


def _as_object(row: Listed, prefix: str) -> dict[str, Any]:
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


def _run_as_object(run: history.Entry) -> dict[str, Any]:
    tick = run.tick and {"entry": run.tick.entry, "due": iso(run.tick.due)}
    times = {"started": iso(run.started), "finished": iso(run.finished)}
    fields: dict[str, Any] = msgspec.to_builtins(msgspec.structs.asdict(run))
    return fields | times | {"tick": tick}


def _ticks_as_object(known: ticks_done.EntryTicks) -> dict[str, Any]:
    return {
        "done": [{"after": iso(start), "until": iso(end)} for start, end in known.done],
        "failed": [iso(due) for due in known.failed],
        "retried": [iso(due) for due in known.retried],
    }


def _name(row: Listed, prefix: str) -> str:
    return row.key.removeprefix(prefix)


def _lease(row: Listed) -> str:
    if row.expires_in is None:
        # If the row has a holder, its stored expiry is not a time, but for example infinity.
        return "free" if row.holder is None else f"{row.holder}, with an unreadable expiry"
    if row.held:
        return f"{row.holder or 'hold period'}, {seconds(row.expires_in)} left"
    return f"{row.holder}, expired {seconds(-row.expires_in)} ago"


def _iso(epoch: float | None) -> str | None:
    return None if epoch is None else iso(epoch)


def _tenths(length: float) -> str:
    return f"{length:.1f}" if abs(length) < 1e9 else f"{length:g}"


def _value(row: Row) -> Any:
    """Return the state for ``--json``: parsed, or as text if parsing fails or would change it."""
    try:
        return json.loads(row.value, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return row.value


def _finite(number: str) -> float:
    """Parse a JSON number for ``--json``, which can print only finite numbers.

    :raises ValueError: the number is NaN, infinite, or too large for a float.
    """
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(number)
    return found
