"""``celery singleton prune``: the rows of keys that nobody uses any more are removed.

Which they are is asked first, so that an operator can be told; the store asks it again of each row
as it removes it.
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

UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1, "": 1}
#: What every database can still count back.
MAX_DAYS = 36_500


def as_seconds(_context: click.Context, _option: click.Parameter, value: str) -> float:
    """An age as people write it.

    :raises click.BadParameter: it is none; with what is allowed.
    """
    found = re.fullmatch(r"([0-9]{1,12})([dhms]?)", value)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= MAX_DAYS * UNITS["d"]:
        raise click.BadParameter(
            f"{value!r} is no age; it takes days, hours, minutes or seconds, as 30d, 12h, 90m, "
            f"45s or 45, above 0 and up to {MAX_DAYS}d"
        )
    return seconds


#: The keys that nobody uses, by the name of their task.
Unused = Mapping[str, Sequence[str]]


@click.command(cls=CeleryCommand)
@click.option(
    "--older-than",
    required=True,
    metavar="AGE",
    callback=as_seconds,
    help="Unused for so long, as 30d, 12h, 90m, 45s or 45.",
)
@click.option("--task", "only", metavar="NAME", help="Keys of this task only.")
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=500,
    show_default=True,
    help="Rows that one statement removes.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and leave it.")
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
    """Remove keys of tasks with unique_on that nobody uses any more, and their states.

    A key is unused since its state changed last or a run of it ended. One that is held, by a late
    run even, or asked for, wanted or queued is never removed; nor is the row of a task without
    unique_on, or of a task that this app does not know.

    A key that is used again starts from its initial state, without a history, and with fence 1. A
    run from before is refused nevertheless, as no holder's name is given twice; but a place
    elsewhere that remembers a larger fence refuses the new runs. So choose an age that is longer
    than anything may run, be retried or be given out again.
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
    """The keys that nobody has used for so many seconds.

    :param only: of this task; of all that have ``unique_on`` where left out.
    :raises click.ClickException: it is no task whose keys could be removed.
    :raises StoreError: the store is out of reach.
    """
    prefix = runtime.settings.key_prefix
    by_task: dict[str, list[str]] = {}
    own_stores = {
        task: runtime.store_of_task(task) for task in _tasks_with_unique_on(runtime, only)
    }
    for store in runtime.stores:
        for key, task in store.unused(prefix, older_than).items():
            # The row under its task's bare name is from before the task had unique_on; and what is
            # left in another store is from before it had a state, or lost it.
            if task in own_stores and key != prefix + task and store is own_stores[task]:
                by_task.setdefault(task, []).append(key)
    return dict(sorted(by_task.items()))


def remove(runtime: Runtime, unused: Unused, older_than: float, batch: int) -> Counter[str]:
    """Remove those that nobody uses even now; returns how many, by task.

    :raises StoreError: the store is out of reach; what was removed before was told.
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
    """For people."""
    for task, keys in unused.items():
        say(f"{as_printed(task)}: {_keys(len(keys))} that nobody uses")
    if not unused:
        say("there is nothing to remove")


def print_removed(unused: Unused, removed: Counter[str]) -> None:
    """The same."""
    done, left = removed.total(), (_counts(unused) - removed).total()
    say(f"{_keys(done)} removed" + (f"; {_keys(left)} in use again or gone" if left else ""))


def _tasks_with_unique_on(runtime: Runtime, only: str | None) -> set[str]:
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
    """How many keys could be removed, by task."""
    return Counter({task: len(keys) for task, keys in unused.items()})


def _as_object(unused: Unused, removed: Counter[str] | None) -> dict[str, Any]:
    """For programs; where nothing was to be removed, by task what could be."""
    return {
        "removed": 0 if removed is None else removed.total(),
        "by_task": _counts(unused) if removed is None else removed,
    }


def _keys(count: int) -> str:
    return "1 key" if count == 1 else f"{count} keys"
