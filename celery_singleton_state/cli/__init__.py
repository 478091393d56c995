"""``celery -A proj singleton …``: commands with which an operator inspects and changes singletons.

Exit statuses, as everywhere in Celery:

- 0: the command has succeeded, or all singletons are healthy.
- 1: the command has failed, with one line that says why, or a singleton is unhealthy.
- 2: the command line is wrong.
"""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import handle_preload_options

from celery_singleton_state.text.visible import visible

from .change import release, state
from .exporter import exporter
from .health import health
from .migrate import migrate
from .next import next_
from .prune import prune
from .show import ls, show

__all__ = ["singleton"]


class Commands(click.Group):
    """A group of commands whose errors are safe to print.

    An error can quote a name or an argument that contains control characters. The control
    characters are printed as escapes.
    """

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.ClickException as error:
            _make_visible(error)
            raise

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.ClickException as error:
            _make_visible(error)
            raise


def _make_visible(error: click.ClickException) -> None:
    # Use vars() to set the message, because click declares the attribute as final from 8.4 on.
    vars(error)["message"] = visible(error.message)


@click.group(cls=Commands, help="Inspect and change the app's singletons.")
@click.pass_context
@handle_preload_options
def singleton(context: click.Context) -> None:
    """Group the commands. Celery's own options, such as ``-A``, come before ``singleton``."""


for command in (ls, show, state, release, prune, health, next_, migrate, exporter):
    singleton.add_command(command)
