"""The hook that sends Celery's events, under Celery's own switch.

The worker's main process knows whether its events are on (``-E``, ``worker_send_task_events``, or
``celery control enable_events`` later on); the processes of its pool do not. So the switch is a
byte of memory that they share with it, set anew with each message that the worker receives.
"""

from __future__ import annotations

import mmap
import weakref
from typing import TYPE_CHECKING, Any

import msgspec
from celery import signals

from celery_singleton_state.text.visible import logger_of

from .details import KINDS, Details

if TYPE_CHECKING:
    from celery import Celery

logger = logger_of(__name__)

GROUP = "singleton"

#: Whether events are to be sent: shared by a worker and its pool; zero where there is no worker.
switch = mmap.mmap(-1, 1)
#: The worker's node name.
_hostname: str | None = None

_Any = KINDS[0]
for _kind in KINDS[1:]:
    _Any |= _kind  # type: ignore[assignment]


class EventsHook:
    """Sends each thing as an event; many that come together as one message, as Celery's own."""

    def __init__(self, app: Celery) -> None:
        self._app = weakref.ref(app)
        self._connection: Any = None
        self._dispatcher: Any = None
        self._logged = ""

    def __call__(self, details: Details) -> None:
        fields = msgspec.to_builtins(details)
        try:
            if self._dispatcher is None:
                self._connect()
            self._dispatcher.send(fields.pop("type"), **fields)
        except Exception as error:
            self._lose(error)

    def flush(self) -> None:
        """Send what was gathered. Where the broker is out of reach it is lost."""
        if self._dispatcher is None:
            return
        try:
            self._dispatcher.flush()
        except Exception as error:
            self._lose(error)
        else:
            self._logged = ""

    def close(self) -> None:
        """Close the connection; the next event makes it anew."""
        connection, self._connection, self._dispatcher = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except Exception as error:
                logger.debug("singletons: the events' connection was not closed: %s", error)

    def _connect(self) -> None:
        app = self._app()
        assert app is not None
        self._connection = app.connection_for_write()
        self._connection.ensure_connection(max_retries=1, interval_start=0)
        self._dispatcher = app.events.Dispatcher(
            self._connection,
            hostname=_hostname,
            buffer_group=frozenset({GROUP}),
            buffer_limit=1000,
            buffer_while_offline=False,
        )

    def _lose(self, error: Exception) -> None:
        """Say once that events are lost, and let the next have a new connection."""
        if (said := type(error).__name__) != self._logged:
            logger.warning("singletons: events are lost: %s: %s", said, error)
            self._logged = said
        self.close()


def details_of(event: dict[str, Any]) -> Details:
    """What an event tells.

    :raises msgspec.ValidationError: it is none of ours, or of another release.
    """
    found: Details = msgspec.convert(event, _Any)
    return found


def follow(hostname: str) -> None:
    """In a worker, before its pool is made: follow its switch from now on."""
    global _hostname
    _hostname = hostname
    switch[0] = 0
    signals.task_received.connect(_on_received)


def _on_received(sender: Any, **_: Any) -> None:
    dispatcher = sender.event_dispatcher
    groups = dispatcher.groups if dispatcher else ()
    switch[0] = bool(dispatcher and dispatcher.enabled and (not groups or "task" in groups))
