"""``celery singleton state`` and ``release``: what an operator changes.

Each change is fenced like a run's own. It leaves a line in the log and an event, whatever the
workers' switch for events says.
"""

from __future__ import annotations

import getpass
import sys
from typing import Any

import click
from celery import Celery
from celery.bin.base import CeleryCommand
from celery.utils.nodenames import gethostname

from celery_singleton_state.config.options import options_of
from celery_singleton_state.hooks import Changed
from celery_singleton_state.keys import row_key
from celery_singleton_state.recovery import end_for
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.state.codec import NO_STATE, Codec, StateError
from celery_singleton_state.store.base import NewValue, Row, Store
from celery_singleton_state.text.moments import seconds
from celery_singleton_state.text.visible import as_printed

from .common import complete_name, find, load_tasks, name_and_task, report_errors, unknown
from .terminal import ask, say, shown_json

YES = click.option("--yes", is_flag=True, help="Do not ask.")
FORCE = click.option("--force", is_flag=True, help="Take the lease away from a run first.")


@click.command(cls=CeleryCommand)
@click.argument("name", shell_complete=complete_name)
@YES
@click.pass_context
@report_errors
def release(context: click.Context, name: str, yes: bool) -> None:
    """Give back the lease of singleton NAME in its holder's place.

    A holder that is alive hears of it at its next heartbeat and loses its run; what it writes until
    then is refused. What it does elsewhere is not, and another run may begin beside it.
    """
    runtime = runtime_of(_app(context))
    row, store = find(runtime, name)
    printed = as_printed(_name(runtime, row))
    if row.holder is None and not row.held:
        say(f"{printed} is free")
        return
    if not yes:
        ask(f"{_warning(runtime, row)} Release it?")
    _release(runtime, row, store)
    had = f"{row.holder} had it" if row.holder else "its hold period is ended"
    say(f"{printed} is free; {had}, with fence {row.fence}")


@click.command(cls=CeleryCommand)
@click.argument("name", shell_complete=complete_name)
@click.pass_context
@report_errors
def get(context: click.Context, name: str) -> None:
    """Print the state of singleton NAME as JSON; null where there is none."""
    row, _ = find(runtime_of(_app(context)), name)
    say(shown_json(row.value))


@click.command("set", cls=CeleryCommand)
@click.argument("name", shell_complete=complete_name)
@click.argument("value")
@FORCE
@YES
@click.pass_context
@report_errors
def set_(context: click.Context, name: str, value: str, force: bool, yes: bool) -> None:
    """Make VALUE, as JSON, the state of singleton NAME; - reads it from standard input.

    It must fit the schema of the task's state. Refused while a run is active.
    """
    runtime = runtime_of(_app(context))
    name, task = name_and_task(runtime, name)
    text = sys.stdin.read() if value == "-" else value
    new = _fitting(runtime, name, task, text)
    _change(runtime, name, task, runtime.sql, new, "state set", force, yes)
    say(f"the state of {as_printed(name)} is set")


@click.command(cls=CeleryCommand)
@click.argument("name", shell_complete=complete_name)
@FORCE
@YES
@click.pass_context
@report_errors
def reset(context: click.Context, name: str, force: bool, yes: bool) -> None:
    """Have singleton NAME start from its initial state. Refused while a run is active."""
    runtime = runtime_of(_app(context))
    row, store = find(runtime, name)
    name = _name(runtime, row)
    if store is runtime.leases:
        raise click.ClickException(f"{as_printed(name)} has no state")
    new = NewValue(NO_STATE, 1)
    _change(runtime, name, row.task or name, store, new, "state reset", force, yes)
    say(f"{as_printed(name)} starts from its initial state")


@click.group()
def state() -> None:
    """Look at the state of a singleton, or change it."""


for command in (get, set_, reset):
    state.add_command(command)


def _app(context: click.Context) -> Celery:
    app: Celery = context.obj.app
    load_tasks(app, are_needed=False)
    return app


def _fitting(runtime: Runtime, name: str, task: str | None, text: str) -> NewValue:
    """:raises click.ClickException: it is no state of the singleton's."""
    codec = _codec(runtime, name, task)
    try:
        return NewValue(codec.encode(codec.decode(text, codec.version)), codec.version)
    except StateError as error:
        raise click.ClickException(f"not a state of {as_printed(name)}: {error}") from error


def _codec(runtime: Runtime, name: str, task: str | None) -> Codec[Any]:
    tasks = runtime.app.tasks
    options = options_of(tasks.get(task or ""))
    if options is None:
        known = [each for each in tasks if options_of(tasks[each])]
        raise click.ClickException(
            f"this app has no singleton task {task or name!r}"
            + ("" if task else f", and {unknown(name, known)}")
        )
    if options.unique_on is None and name != task:
        raise click.ClickException(f"task {task} has no unique_on, and so no singleton {name!r}")
    if options.unique_on is not None:
        # Its name is not to be made up by hand: only a run spells it right.
        find(runtime, name)
    codec = options.codec()
    if codec is None:
        raise click.ClickException(f"task {task} has no state_schema, and so no state")
    return codec


def _change(
    runtime: Runtime,
    name: str,
    task: str | None,
    store: Store,
    new: NewValue,
    what: str,
    force: bool,
    yes: bool,
) -> None:
    """Put a state into the row of a singleton that nobody holds."""
    key = row_key(runtime.settings.key_prefix, name)
    row = store.peek(key)
    if row is not None and row.in_hold_period and not force:
        raise click.ClickException(
            f"{as_printed(name)} is in the hold period after its last run; "
            "wait for its end, or end it with --force"
        )
    if row is not None and row.held and not force:
        raise click.ClickException(
            f"{as_printed(name)} has an active run, of {row.holder}, which would not know of it; "
            "wait for its end, or take its lease away with --force"
        )
    if not yes:
        warning = _warning(runtime, row) if row is not None and row.held else ""
        ask(f"{warning}The state is {shown_json(row.value) if row else 'none'}. Replace it?")
    if row is not None and (row.holder is not None or row.held):
        # Also one whose lease ran out: late and without a successor it could still save.
        _release(runtime, row, store)
        row = store.peek(key)
    if not store.requests.put(key, row, new, task):
        raise click.ClickException(
            f"a run of {as_printed(name)} has begun just now; nothing was changed"
        )
    emit(runtime, task or name, name, what)


def _name(runtime: Runtime, row: Row) -> str:
    return row.key.removeprefix(runtime.settings.key_prefix)


def _release(runtime: Runtime, row: Row, store: Store) -> None:
    name = _name(runtime, row)
    if not end_for(runtime, row, 0, f"released by {_operator()}", store):
        raise click.ClickException(
            f"{as_printed(name)} is held by {row.holder or 'nobody'} no more; nothing was changed"
        )
    emit(runtime, row.task or name, name, "released")


def _warning(runtime: Runtime, row: Row) -> str:
    if not row.held:
        return f"The lease of {row.holder} has run out, and no run has begun since. "
    left = seconds(row.expires_in or 0.0)
    if row.in_hold_period:
        return f"The run is over, and its lease is in its hold period for {left} more. "
    interval = f"{runtime.settings.heartbeat_interval:g} s"
    return (
        f"{row.holder} may be alive: its lease has {left} left unless renewed. Its body goes on "
        f"until its next heartbeat, within {interval}, while another run may begin; what it "
        "writes is refused. "
    )


def emit(runtime: Runtime, task: str, name: str, what: str) -> None:
    """Leave a line in the log and an event: what this operator has changed."""
    runtime.dispatcher.publish(Changed(singleton=task, key=name, what=what, by=_operator()))


def _operator() -> str:
    return f"{getpass.getuser()}@{gethostname()}"
