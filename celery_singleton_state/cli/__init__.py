"""``celery -A proj singleton …``: what an operator sees of the singletons and does to them.

Exit statuses: 0 if it is done, or all is healthy; 1 if not, with one line that says why; 2 for
words that it does not understand, as everywhere in Celery.
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
    """Shows what users wrote safely in errors, too: of the commands, and of what was typed."""

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
    # Click declares the attribute as final from 8.4 on.
    vars(error)["message"] = visible(error.message)


@click.group(cls=Commands, help="Look at the app's singletons and look after them.")
@click.pass_context
@handle_preload_options
def singleton(context: click.Context) -> None:
    """The group; celery's own options come before it."""


for command in (ls, show, state, release, prune, health, next_, migrate, exporter):
    singleton.add_command(command)
