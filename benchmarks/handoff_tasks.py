"""The app of the ``handoff`` part. Its bodies note when they begin, and some never end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

from celery_singleton_state import singleton_task

app = Celery("handoff", broker=os.environ.get("BENCHMARK_BROKER", "redis://localhost/0"))
app.conf.task_ignore_result = True
app.conf.worker_prefetch_multiplier = 1
app.conf.singleton_store_url = os.environ.get("BENCHMARK_DATABASE", "memory://")


def body(self: Any, mark: str, ends: bool) -> None:
    """Write this process's id and the time to the file ``mark``; then end, or sleep for ever."""
    path = Path(os.environ["BENCHMARK_MARKS"], mark)
    path.with_suffix(".new").write_text(f"{os.getpid()} {time.monotonic()}")
    path.with_suffix(".new").rename(path)
    while not ends:
        time.sleep(60)


for policy in ("wait", "replace"):
    singleton_task(app, on_conflict=policy, conflict_timeout=60, name=policy)(body)
