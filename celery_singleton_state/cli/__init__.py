"""``celery -A proj singleton …``: what an operator sees of the singletons and does to them.

Exit statuses: 0 if it is done, or all is healthy; 1 if not, with one line that says why; 2 for
words that it does not understand, as everywhere in Celery.
"""

from __future__ import annotations

import click
from celery.bin.base import handle_preload_options

from .change import release, state
from .exporter import exporter
from .health import health
from .look import ls, show
from .migrate import migrate
from .next import next_
from .prune import prune

__all__ = ["singleton"]


@click.group(help="Look at the app's singletons and look after them.")
@click.pass_context
@handle_preload_options
def singleton(context: click.Context) -> None:
    """The group; celery's own options come before it."""


for command in (ls, show, state, release, prune, health, next_, migrate, exporter):
    singleton.add_command(command)
