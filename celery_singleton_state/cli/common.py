"""What the commands share."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click
from celery import Celery
from celery.app.utils import find_app
from celery.exceptions import ImproperlyConfigured
from sqlalchemy.exc import SQLAlchemyError

from celery_singleton_state.keys import row_key
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.store.base import Row, StoreError

P = ParamSpec("P")
R = TypeVar("R")


def says_why(command: Callable[P, R]) -> Callable[P, R]:
    """An error that an operator can mend is one line and exit status 1, not a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (StoreError, ImproperlyConfigured, SQLAlchemyError) as error:
            raise click.ClickException(str(error)) from error

    return run


def load_tasks(app: Celery) -> None:
    """Have all tasks of the app made, as a worker has: also those of its ``imports`` and
    ``include``, and those that it discovers.

    :raises ImproperlyConfigured: a module cannot be imported.
    """
    try:
        app.loader.import_default_modules()
    except ImportError as error:
        raise ImproperlyConfigured(f"a module of the app cannot be imported: {error}") from error
    app.finalize(auto=True)


def complete_name(context: click.Context, _argument: click.Parameter, begun: str) -> list[str]:
    """For a shell: the singletons whose names begin so, and need no quotes.

    None where the app or its store cannot be had: a shell has no place for an error.
    """
    try:
        app = find_app(context.find_root().params["app"])
        app.finalize(auto=True)
        runtime = runtime_of(app)
        prefix = runtime.settings.key_prefix
        names = [row.key.removeprefix(prefix) for row in runtime.store.list(prefix + begun)]
    except Exception:
        return []
    return [name for name in names if shlex.quote(name) == name]


def find(runtime: Runtime, name: str) -> Row:
    """The row of a singleton, by its name as ``ls`` prints it.

    :raises click.ClickException: it has none; with names that are like it.
    """
    prefix = runtime.settings.key_prefix
    row = runtime.store.peek(row_key(prefix, name))
    if row is None:
        raise click.ClickException(
            unknown(name, [row.key.removeprefix(prefix) for row in runtime.store.list(prefix)])
        )
    return row


def unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"singleton {name!r} has not run yet{hint}"


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=datetime.isoformat))


def iso(epoch: float | None) -> str | None:
    return None if epoch is None else datetime.fromtimestamp(epoch, UTC).isoformat()


def moment(epoch: float | None) -> str | None:
    """For people: UTC, to the second."""
    return None if epoch is None else f"{datetime.fromtimestamp(epoch, UTC):%Y-%m-%d %H:%M:%S}"


def short_moment(epoch: float | None, now: float) -> str:
    """The same, without what goes without saying: the day where it is today's."""
    if epoch is None:
        return "-"
    at, today = datetime.fromtimestamp(epoch, UTC), datetime.fromtimestamp(now, UTC).date()
    return f"{at:%H:%M:%S}" if at.date() == today else f"{at:%Y-%m-%d %H:%M}"
