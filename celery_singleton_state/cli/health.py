"""The command ``celery singleton health``: list the singletons that did not run in time."""

from __future__ import annotations

from dataclasses import asdict

import click
from celery.bin.base import CeleryCommand

from celery_singleton_state.health import check_health
from celery_singleton_state.text.visible import as_printed

from .common import load_tasks, report_errors
from .terminal import print_json, say


@click.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@click.pass_context
@report_errors
def health(context: click.Context, as_json: bool) -> None:
    """List the singletons that did not run when they should have.

    A singleton is healthy if its last run finished no longer ago than its task's expected_interval
    times singleton_heartbeat_threshold. The exit status is 0 if all singletons are healthy, and 1
    if not or if the store is unavailable.
    """
    load_tasks(context.obj.app)
    found = check_health(context.obj.app)
    if as_json:
        print_json({"healthy": found.healthy, **asdict(found)})
    else:
        if found.error:
            say(f"the store is unavailable: {found.error}", err=True)
        for each in found.singletons:
            if not each.healthy:
                say(f"{as_printed(each.singleton)}: {each.reason}")
        if found.healthy:
            say(f"healthy: {len(found.singletons)} singletons")
    context.exit(0 if found.healthy else 1)
