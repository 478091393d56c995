"""``celery -A proj singleton …``: commands with which an operator inspects and changes singletons.

The exit status of a command:

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
    # Use vars() to set the message: from click 8.4 on the attribute is declared final, so mypy
    # would refuse an assignment.
    vars(error)["message"] = visible(error.message)


@click.group(cls=Commands, help="Inspect and change the app's singletons.")
@click.pass_context
@handle_preload_options
def singleton(context: click.Context) -> None:
    """The group of all commands. Celery's options, such as ``-A``, come before ``singleton``."""


for command in (ls, show, state, release, prune, health, next_, migrate, exporter):
    singleton.add_command(command)
