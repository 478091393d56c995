"""The command ``celery singleton migrate``: create or upgrade the store's table."""

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
    """Create the table, or upgrade it and keep its rows. Safe to run again."""
    # Imported here, because Alembic takes longer to import than any other command takes to run.
    from celery_singleton_state.migrations.upgrade import migrate as make_table

    settings = runtime_of(context.obj.app).settings
    make_table(settings)
    say(f"table {settings.table} is ready")
