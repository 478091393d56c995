"""Receives the workers' events and hands them on as details; for as long as it takes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec
from celery import Celery

from celery_singleton_state.hooks import Details
from celery_singleton_state.hooks.events import details_of

logger = logging.getLogger(__name__)

#: Seconds between two tries to connect, and between two looks at whether to stop.
PAUSE = 1.0


class Receiver:
    """A thread that receives events, and connects again for ever.

    :param hook: told what each of our events tells.
    """

    def __init__(self, app: Celery, hook: Callable[[Details], None]) -> None:
        self._app = app
        self._hook = hook
        self._stop = threading.Event()
        self._said = ""
        #: Whether it is connected.
        self.is_up = False
        self._thread = threading.Thread(target=self._run, name="singleton-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5 * PAUSE)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._receive()
            except Exception as error:
                if (said := f"{type(error).__name__}: {error}") != self._said:
                    logger.warning("events are not received: %s", said)
                    self._said = said
            self.is_up = False
            self._stop.wait(PAUSE)

    def _receive(self) -> None:
        with self._app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            receiver = self._app.events.Receiver(connection, handlers={"*": self._on_event})
            with receiver.consumer_context(wakeup=False) as (consuming, *_):
                self.is_up, self._said = True, ""
                while not self._stop.is_set():
                    try:
                        consuming.drain_events(timeout=PAUSE)
                    except TimeoutError:
                        consuming.heartbeat_check()

    def _on_event(self, event: dict[str, Any]) -> None:
        if not event["type"].startswith("singleton-"):
            return
        try:
            self._hook(details_of(event))
        except msgspec.ValidationError as error:
            logger.debug("an event of another release: %s", error)
