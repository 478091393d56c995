"""What the commands share."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Collection, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import click
from celery import Celery
from celery.app.utils import find_app
from celery.exceptions import ImproperlyConfigured
from sqlalchemy.exc import SQLAlchemyError

from celery_singleton_state.keys import row_key
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.store.base import Row, Store, StoreError, one_line
from celery_singleton_state.text.visible import as_printed, names_meant

from .terminal import say

P = ParamSpec("P")
R = TypeVar("R")


def report_errors(command: Callable[P, R]) -> Callable[P, R]:
    """An error that an operator can mend is one line and exit status 1, not a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (StoreError, ImproperlyConfigured) as error:
            raise click.ClickException(str(error)) from error
        except SQLAlchemyError as error:
            raise click.ClickException(one_line(error)) from error

    return run


def load_tasks(app: Celery, are_needed: bool = True) -> None:
    """Have all tasks of the app made, as a worker has: also those of its ``imports`` and
    ``include``, and those that it discovers.

    :param are_needed: whether what the command says is wrong without one of them. A command that
        is not says what is missing, and does what it can.
    :raises ImproperlyConfigured: a module cannot be imported, and its tasks are needed.
    """
    try:
        app.loader.import_default_modules()
    except Exception as error:
        why = str(error) if isinstance(error, ImportError) else one_line(error)
        text = f"a module of the app cannot be imported: {why}"
        if are_needed:
            raise ImproperlyConfigured(text) from error
        say(f"warning: {text}", err=True)
    app.finalize(auto=True)


def complete_name(context: click.Context, _argument: click.Parameter, begun: str) -> list[str]:
    """For a shell: the singletons whose names begin so, as `ls` prints them.

    Bash inserts what it is offered as it is, so a name with other than plain characters is offered
    in quotes; other shells quote it by themselves. None where the app or its store cannot be had: a
    shell has no place for an error.
    """
    try:
        app = find_app(context.find_root().params["app"])
        app.finalize(auto=True)
        runtime = runtime_of(app)
        prefix = runtime.settings.key_prefix
        found = {
            row.key: as_printed(row.key.removeprefix(prefix))
            for name in names_meant(begun)
            for row in runtime.rows(prefix + name)
        }
    except Exception:
        return []
    return [shlex.quote(name) if _is_bash() else name for name in found.values()]


def _is_bash() -> bool:
    """Whether it is bash that asks: click's variable is named after the program."""
    asked = (value for name, value in os.environ.items() if name.endswith("COMPLETE"))
    return any(value.startswith("bash_") for value in asked)


def find(runtime: Runtime, name: str) -> tuple[Row, Store]:
    """The row of a singleton, by its name as ``ls`` prints it, and the store that has the row.

    :raises click.ClickException: it has none; with names that are like it.
    """
    found = _row(runtime, name)
    if found is None:
        prefix = runtime.settings.key_prefix
        known = [row.key.removeprefix(prefix) for row in runtime.rows(prefix)]
        raise click.ClickException(unknown(name, known))
    return found


def name_and_task(runtime: Runtime, typed: str) -> tuple[str, str | None]:
    """The name of a singleton that may have no row yet, from its name as it would be printed; and
    the name of its task, which a singleton without ``unique_on`` shares.
    """
    found = _row(runtime, typed)
    if found is None:
        name = one_of(runtime.app.tasks, typed)
        return name, name if name in runtime.app.tasks else None
    name = found[0].key.removeprefix(runtime.settings.key_prefix)
    return name, found[0].task or name


def one_of(known: Collection[str], typed: str) -> str:
    """Which of the known names is meant; what was typed if it is none of them."""
    return next((name for name in names_meant(typed) if name in known), typed)


def unknown(name: str, known: Iterable[str]) -> str:
    return f"singleton '{as_printed(name)}' has not run yet{like(name, known)}"


def like(name: str, known: Iterable[str]) -> str:
    """A question for the names that are like one."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(as_printed, near))}?" if near else ""


def _row(runtime: Runtime, typed: str) -> tuple[Row, Store] | None:
    for name in names_meant(typed):
        key = row_key(runtime.settings.key_prefix, name)
        rows = [(row, store) for store in runtime.stores if (row := store.peek(key)) is not None]
        # Another store may have a row of before the task had a state, or lost it.
        rows.sort(key=lambda found: runtime.store_of_task(found[0].task) is not found[1])
        if rows:
            row, store = rows[0]
            return row, cast(Store, store)
    return None
