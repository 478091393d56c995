"""Functions that several commands of ``celery singleton`` use."""

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
    """Decorate a command to print errors of the store or the configuration as one line.

    After such an error the exit status is 1. Other errors are printed with a traceback.
    """

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
    """Import all task modules of an app, as a worker does, so that the app knows all its tasks.

    :param are_needed: true (the default): a module that cannot be imported is an error, because the
        command's output would be wrong without the module's tasks. False: a module that cannot be
        imported only causes a warning.
    :raises ImproperlyConfigured: a module cannot be imported, and ``are_needed`` is true.
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
    """Return the singletons' names that a shell offers to complete what the operator has typed.

    The names are spelled as ``celery singleton ls`` prints them. Bash inserts a completion without
    quoting it, so for bash the names are quoted if need be; other shells quote by themselves. If
    the app or its store cannot be used, the list is empty, because a shell cannot show an error.
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
    """Whether the shell that asks for completions is bash.

    An environment variable that click uses names the shell. The variable's name begins with the
    program's name and ends in ``COMPLETE``.
    """
    asked = (value for name, value in os.environ.items() if name.endswith("COMPLETE"))
    return any(value.startswith("bash_") for value in asked)


def find(runtime: Runtime, name: str) -> tuple[Row, Store]:
    """Return the row of a singleton, and the store that has the row.

    :param name: the singleton's name, as ``celery singleton ls`` prints it.
    :raises click.ClickException: there is no such row; the message suggests similar names.
    """
    found = _row(runtime, name)
    if found is None:
        prefix = runtime.settings.key_prefix
        known = [row.key.removeprefix(prefix) for row in runtime.rows(prefix)]
        raise click.ClickException(unknown(name, known))
    return found


def name_and_task(runtime: Runtime, typed: str) -> tuple[str, str | None]:
    """Return the name of a singleton and the name of its task.

    :param typed: the singleton's name, as ``celery singleton ls`` prints it. If the singleton has
        no row yet, it belongs to the task with the same name.
    :returns: the two names. The task's name is ``None`` if there is neither a row nor such a task.
    """
    found = _row(runtime, typed)
    if found is None:
        name = one_of(runtime.app.tasks, typed)
        return name, name if name in runtime.app.tasks else None
    name = found[0].key.removeprefix(runtime.settings.key_prefix)
    return name, found[0].task or name


def one_of(known: Collection[str], typed: str) -> str:
    """Return the known name that an operator means.

    :param typed: the name as the operator typed it. It may contain the escapes with which
        ``celery singleton`` prints a name.
    :returns: the known name; ``typed`` itself if no known name is meant.
    """
    return next((name for name in names_meant(typed) if name in known), typed)


def unknown(name: str, known: Iterable[str]) -> str:
    """Return the error text for a singleton without a row, with a question about similar names."""
    return f"singleton '{as_printed(name)}' has not run yet{like(name, known)}"


def like(name: str, known: Iterable[str]) -> str:
    """Return a question that suggests similar known names; empty if no known name is similar."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(as_printed, near))}?" if near else ""


def _row(runtime: Runtime, typed: str) -> tuple[Row, Store] | None:
    for name in names_meant(typed):
        key = row_key(runtime.settings.key_prefix, name)
        rows = [(row, store) for store in runtime.stores if (row := store.peek(key)) is not None]
        # Prefer the store that the task uses now. The other store can have an old row, from the
        # time before the task was given a state or its state was removed.
        rows.sort(key=lambda found: runtime.store_of_task(found[0].task) is not found[1])
        if rows:
            row, store = rows[0]
            return row, cast(Store, store)
    return None
