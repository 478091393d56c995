"""The command ``celery singleton prune``: remove the rows of keys that are no longer used.

The command first reads which keys are unused, to show them to the operator. The statement that
removes a row checks again that its key is still unused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import click
from celery import Celery
from celery.bin.base import CeleryCommand

from celery_singleton_state.config.options import options_of
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.text.visible import as_printed

from .change import YES, emit
from .common import load_tasks, one_of, report_errors
from .terminal import ask, print_json, say

#: Maps each unit in which an operator can write an age to the unit's length in seconds. The empty
#: unit belongs to an age without a unit, which is in seconds.
UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1, "": 1}
#: The longest age that the option ``--older-than`` takes, in days. Every database can still
#: subtract this age from the present time.
MAX_DAYS = 36_500


def as_seconds(_context: click.Context, _option: click.Parameter, value: str) -> float:
    """Convert an age such as ``30d``, ``12h``, ``90m``, ``45s`` or ``45`` to seconds.

    :raises click.BadParameter: the text is not an age; the message says what is allowed.
    """
    found = re.fullmatch(r"([0-9]{1,12})([dhms]?)", value)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= MAX_DAYS * UNITS["d"]:
        raise click.BadParameter(
            f"{value!r} is not an age; write days, hours, minutes or seconds as 30d, 12h, 90m, "
            f"45s or 45, above 0 and up to {MAX_DAYS}d"
        )
    return seconds


#: Maps the name of each task to the unused keys of the task.
Unused = Mapping[str, Sequence[str]]


@click.command(cls=CeleryCommand)
@click.option(
    "--older-than",
    required=True,
    metavar="AGE",
    callback=as_seconds,
    help="Remove keys that have been unused for this time: 30d, 12h, 90m, 45s or 45.",
)
@click.option("--task", "only", metavar="NAME", help="Remove keys of this task only.")
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=500,
    show_default=True,
    help="How many rows one statement removes.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@YES
@click.pass_context
@report_errors
def prune(
    context: click.Context,
    older_than: float,
    only: str | None,
    batch: int,
    dry_run: bool,
    as_json: bool,
    yes: bool,
) -> None:
    """Remove keys of tasks with unique_on that are no longer used, with their states.

    A key is unused from the end of its last run, or from the last change of its state if that is
    later. A key is never removed if it is held (even past its expiry), has a pending handoff or a
    pending run, or has a queued message. Rows of tasks without unique_on, and of tasks that this
    app does not know, stay.

    A key that is used again starts from its initial state and without a history, so a message that
    was done before would run again. The fence goes on growing, because a fence is never smaller
    than the database's clock in milliseconds. Choose an age that is longer than a message may run,
    be retried or be redelivered.
    """
    app: Celery = context.obj.app
    load_tasks(app, are_needed=False)
    runtime = runtime_of(app)
    only = only and one_of(app.tasks, only)
    unused = find_unused(runtime, older_than, only)
    if not as_json:
        print_unused(unused)
    removed = None
    if unused and not dry_run:
        if not yes:
            ask(f"Remove {_keys(_counts(unused).total())}, and their states?", err=as_json)
        removed = remove(runtime, unused, older_than, batch)
    if as_json:
        print_json(_as_object(unused, removed))
    elif removed is not None:
        print_removed(unused, removed)


def find_unused(runtime: Runtime, older_than: float, only: str | None) -> Unused:
    """Return the unused keys of each task, to show them before they are removed.

    :param older_than: seconds for which a key must have been unused.
    :param only: the name of the task whose keys to return; ``None``: all tasks with ``unique_on``.
    :raises click.ClickException: there is no such singleton task, or it has no ``unique_on``.
    :raises StoreError: the store is unavailable.
    """
    prefix = runtime.settings.key_prefix
    by_task: dict[str, list[str]] = {}
    own_stores = {
        task: runtime.store_of_task(task) for task in _tasks_with_unique_on(runtime, only)
    }
    for store in runtime.stores:
        for key, task in store.unused(prefix, older_than).items():
            # Leave two kinds of old rows alone: the row whose key is the task's name alone, from
            # the time before the task had unique_on; and rows in a store that the task no longer
            # uses, from the time before the task was given a state or its state was removed.
            if task in own_stores and key != prefix + task and store is own_stores[task]:
                by_task.setdefault(task, []).append(key)
    return dict(sorted(by_task.items()))


def remove(runtime: Runtime, unused: Unused, older_than: float, batch: int) -> Counter[str]:
    """Remove the keys that are still unused, and emit a log line and an event for each task.

    :param unused: the keys to remove.
    :param older_than: seconds for which a key must have been unused.
    :param batch: how many keys one statement removes.
    :returns: how many keys of each task were removed.
    :raises StoreError: the store is unavailable. If keys were removed before this error, the log
        lines and events about them have been emitted.
    """
    removed: Counter[str] = Counter()
    for task, keys in unused.items():
        removed[task], store = 0, runtime.store_of_task(task)
        try:
            for start in range(0, len(keys), batch):
                some = keys[start : start + batch]
                removed[task] += len(store.prune(some, older_than))
        finally:
            if removed[task]:
                emit(runtime, task, task, f"{_keys(removed[task])} pruned")
    return removed


def print_unused(unused: Unused) -> None:
    """Print, for people, how many keys of each task are unused."""
    for task, keys in unused.items():
        say(f"{as_printed(task)}: {_keys(len(keys), 'unused ')}")
    if not unused:
        say("there is nothing to remove")


def print_removed(unused: Unused, removed: Counter[str]) -> None:
    """Print, for people, how many keys were removed and how many are no longer unused."""
    done, left = removed.total(), (_counts(unused) - removed).total()
    say(f"{_keys(done)} removed" + (f"; {_keys(left)} in use again or gone" if left else ""))


def _tasks_with_unique_on(runtime: Runtime, only: str | None) -> set[str]:
    """Return the names of the tasks whose keys can be removed.

    :param only: the name of a single task; ``None``: all tasks.
    :raises click.ClickException: the keys of that task cannot be removed.
    """
    tasks = runtime.app.tasks
    if only is None:
        every = {name: options_of(task) for name, task in tasks.items()}
        return {name for name, own in every.items() if own and own.unique_on is not None}
    options = options_of(tasks.get(only))
    if options is None:
        raise click.ClickException(f"this app has no singleton task {only!r}")
    if options.unique_on is None:
        raise click.ClickException(f"task {only} has no unique_on, and so no keys to remove")
    return {only}


def _counts(unused: Unused) -> Counter[str]:
    """Return how many keys of each task are unused."""
    return Counter({task: len(keys) for task, keys in unused.items()})


def _as_object(unused: Unused, removed: Counter[str] | None) -> dict[str, Any]:
    """Return the result of the command for ``--json``.

    :param removed: how many keys of each task were removed. ``None`` if no key was to be removed,
        for example in a dry run. Then the result says how many keys of each task are unused.
    """
    return {
        "removed": 0 if removed is None else removed.total(),
        "by_task": _counts(unused) if removed is None else removed,
    }


def _keys(count: int, kind: str = "") -> str:
    """Return a number of keys in words, such as ``1 key`` or ``2 unused keys``."""
    return f"1 {kind}key" if count == 1 else f"{count} {kind}keys"
