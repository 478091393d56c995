"""The commands ``celery singleton state`` and ``release``: change a state, or release a lease.

An operator's change is fenced like a run's write: the store refuses the change if a new run has
begun since the command read the row. After a change the command emits a log line and an event, even
if the workers' events are switched off.
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

#: The option ``--yes`` of commands that ask before they change something.
YES = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
#: The option ``--force`` of commands that are refused while a run is active.
FORCE = click.option("--force", is_flag=True, help="First release the lease of an active run.")


@click.command(cls=CeleryCommand)
@click.argument("name", shell_complete=complete_name)
@YES
@click.pass_context
@report_errors
def release(context: click.Context, name: str, yes: bool) -> None:
    """Release the lease of singleton NAME in place of its holder.

    Use this command when the holder is dead or hangs. A holder that is alive learns at its next
    heartbeat that its run is lost. Until then its body goes on, while another run may begin; only
    its writes of the state are refused at once.
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
    ended = f"its lease was held by {row.holder}" if row.holder else "its hold period was ended"
    say(f"{printed} is free; {ended}, with fence {row.fence}")


@click.command(cls=CeleryCommand)
@click.argument("name", shell_complete=complete_name)
@click.pass_context
@report_errors
def get(context: click.Context, name: str) -> None:
    """Print the state of singleton NAME as JSON, or null if it has no state."""
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
    """Replace the state of singleton NAME by the JSON document VALUE.

    VALUE must fit the task's state_schema. With - as VALUE, the document is read from standard
    input. The command is refused while a run is active, unless --force is given.
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
    """Reset singleton NAME: its next run starts from the initial state.

    The command is refused while a run is active, unless --force is given.
    """
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
    """Print or change the state of a singleton."""


for command in (get, set_, reset):
    state.add_command(command)


def _app(context: click.Context) -> Celery:
    app: Celery = context.obj.app
    load_tasks(app, are_needed=False)
    return app


def _fitting(runtime: Runtime, name: str, task: str | None, text: str) -> NewValue:
    """Check a JSON document, and return it as a new state of a singleton.

    :param name: the singleton's name.
    :param task: the name of the singleton's task; ``None`` if the task is not known.
    :param text: the JSON document.
    :raises click.ClickException: the document does not fit the schema, there is no such singleton,
        or the singleton has no state.
    """
    codec = _codec(runtime, name, task)
    try:
        return NewValue(codec.encode(codec.decode(text, codec.version)), codec.version)
    except StateError as error:
        raise click.ClickException(f"not a state of {as_printed(name)}: {error}") from error


def _codec(runtime: Runtime, name: str, task: str | None) -> Codec[Any]:
    """Return the codec that checks and encodes a singleton's state.

    :raises click.ClickException: there is no such singleton, or it has no state.
    """
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
        # The singleton must have a row already: an operator could spell a name with arguments in
        # another way than a run does, and the new state would then never be used.
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
    """Write a state into a singleton's row, after asking the operator.

    :param what: the change, for the log line, such as ``"state set"``.
    :param force: true: if the lease is held, release it first.
    :param yes: true: do not ask the operator.
    :raises click.ClickException: the lease is held and ``force`` is false, or a run has just begun.
    """
    key = row_key(runtime.settings.key_prefix, name)
    row = store.peek(key)
    if row is not None and row.in_hold_period and not force:
        raise click.ClickException(
            f"{as_printed(name)} is in the hold period after its last run; "
            "wait for its end, or end it with --force"
        )
    if row is not None and row.held and not force:
        raise click.ClickException(
            f"{as_printed(name)} has an active run of {row.holder}, which would not see a change; "
            "wait for its end, or release its lease first with --force"
        )
    if not yes:
        warning = _warning(runtime, row) if row is not None and row.held else ""
        ask(f"{warning}The state is {shown_json(row.value) if row else 'none'}. Replace it?")
    if row is not None and (row.holder is not None or row.held):
        # An expired lease is released, too: the run that had the lease can still save its state as
        # long as no other run has begun.
        _release(runtime, row, store)
        row = store.peek(key)
    if not store.requests.put(key, row, new, task):
        raise click.ClickException(
            f"a run of {as_printed(name)} has just begun; nothing was changed"
        )
    emit(runtime, task or name, name, what)


def _name(runtime: Runtime, row: Row) -> str:
    return row.key.removeprefix(runtime.settings.key_prefix)


def _release(runtime: Runtime, row: Row, store: Store) -> None:
    name = _name(runtime, row)
    if not end_for(runtime, row, 0, f"released by {_operator()}", store):
        ended = f"is no longer held by {row.holder}" if row.holder else "has no hold period now"
        raise click.ClickException(f"{as_printed(name)} {ended}; nothing was changed")
    emit(runtime, row.task or name, name, "released")


def _warning(runtime: Runtime, row: Row) -> str:
    """Return a warning for the operator: what can still happen after the lease is released."""
    if not row.held:
        return f"The lease of {row.holder} has expired, and no run has begun since. "
    left = seconds(row.expires_in or 0.0)
    if row.in_hold_period:
        return f"The last run has ended, and its hold period lasts for {left} more. "
    interval = f"{runtime.settings.heartbeat_interval:g} s"
    return (
        f"{row.holder} may be alive: its lease has {left} left unless renewed. Its body goes on "
        f"until its next heartbeat, within {interval}, while another run may begin; its writes of "
        "the state are refused. "
    )


def emit(runtime: Runtime, task: str, name: str, what: str) -> None:
    """Emit a log line and an event about a change that this operator has made.

    :param task: the name of the task.
    :param name: the singleton's name, or the task's if the change is about several singletons.
    :param what: the change, such as ``"state set"``.
    """
    runtime.dispatcher.publish(Changed(singleton=task, key=name, what=what, by=_operator()))


def _operator() -> str:
    return f"{getpass.getuser()}@{gethostname()}"
