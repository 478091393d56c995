"""``celery singleton migrate``."""

from __future__ import annotations

import click
from celery.bin.base import CeleryCommand

from celery_singleton_state.runtime import runtime_of

from .common import report_errors
from .terminal import say


@click.command(cls=CeleryCommand)
@click.pass_context
@report_errors
def migrate(context: click.Context) -> None:
    """Make the table, or upgrade it with its rows kept. Safe to run again."""
    # Alembic takes longer to import than all other commands to run.
    from celery_singleton_state.migrations.upgrade import migrate as make_table

    settings = runtime_of(context.obj.app).settings
    make_table(settings)
    say(f"table {settings.table} is ready")
