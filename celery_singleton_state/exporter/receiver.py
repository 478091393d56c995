"""Receives the workers' Celery events and calls a hook with the details of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.events.receiver import EventReceiver

from celery_singleton_state.hooks import Details
from celery_singleton_state.hooks.events import details_of
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: Seconds between two attempts to connect to the broker, and between two checks whether to stop.
PAUSE = 1.0


class Receiver:
    """A thread that receives Celery events. It reconnects until it is closed.

    An unreadable event is ignored, because every client of the broker can send one. An unreadable
    event must neither end the connection nor affect the other events of the same message.

    :param hook: called with the details of each event of this package.
    :param ignored: called for each unreadable message, and each unreadable event of this package.
    """

    def __init__(
        self,
        app: Celery,
        hook: Callable[[Details], object],
        ignored: Callable[[], object] = lambda: None,
    ) -> None:
        self._app = app
        self._hook = hook
        self._ignored = ignored
        self._stop = threading.Event()
        self._logged = ""
        #: Classes of errors that were logged once as a warning. Later errors of these classes are
        #: logged at DEBUG.
        self._kinds: set[type[Exception]] = set()
        #: Whether the thread is connected to the broker.
        self.is_up = False
        self._thread = threading.Thread(target=self._run, name="singleton-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2 * PAUSE)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._receive()
            except Exception as error:
                if (said := f"{type(error).__name__}: {error}") != self._logged:
                    logger.warning("events are not received, trying again: %s", said)
                    self._logged = said
            self.is_up = False
            self._stop.wait(PAUSE)

    def _receive(self) -> None:
        with self._app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            receiver: Any = _Events(connection, self._app, self._on_body, self._ignore)
            with receiver.consumer_context(wakeup=False) as (consuming, *_):
                self.is_up, self._logged = True, ""
                while not self._stop.is_set():
                    try:
                        consuming.drain_events(timeout=PAUSE)
                    except TimeoutError:
                        consuming.heartbeat_check()

    def _on_body(self, body: Any) -> None:
        """Call the hook with each event of a message's body: one event, or a list of events."""
        for event in body if isinstance(body, list) else [body]:
            try:
                if event["type"].startswith("singleton-"):
                    self._hook(details_of(event))
            except Exception as error:
                self._ignore(error)

    def _ignore(self, error: Exception) -> None:
        self._ignored()
        level = logging.DEBUG if type(error) in self._kinds else logging.WARNING
        self._kinds.add(type(error))
        logger.log(
            level,
            "an event is ignored because it is forged or of another release: %.200s; further "
            "errors of this class are only counted",
            repr(error),
        )


class _Events(EventReceiver):
    """Celery's event receiver, changed to call ``on_body`` with the whole body of each message.

    A message that cannot be decoded does not stop the receiver.
    """

    def __init__(
        self,
        connection: Any,
        app: Celery,
        on_body: Callable[[Any], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        super().__init__(connection, app=app)
        self._on_body = on_body
        self._on_error = on_error

    def _receive(self, body: Any, message: Any, *_: Any) -> None:
        self._on_body(body)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        # Celery's own method acknowledges the message. That must not happen, because the consumer
        # receives messages without acknowledgements (no_ack).
        self._on_error(exc)
