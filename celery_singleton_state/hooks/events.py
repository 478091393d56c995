"""Send what happens to singletons as Celery events, if the worker's events are on.

An operator switches events on with ``-E``, ``worker_send_task_events`` or ``celery control
enable_events``. Only the worker's main process knows whether they are on. So it shares the switch
with its pool processes as one byte of memory, and updates this byte at each message that it
receives.
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

#: One byte of memory that a worker shares with its pool processes: 1 if Celery events are to be
#: sent. It is 0 in a process that belongs to no worker.
switch = mmap.mmap(-1, 1)
#: The worker's node name; ``None`` outside of a worker.
_hostname: str | None = None

_Any = KINDS[0]
for _kind in KINDS[1:]:
    _Any |= _kind  # type: ignore[assignment]


class EventsHook:
    """A hook that sends each event as a Celery event. A burst of events goes out in one message."""

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
        """Send the events that wait to be sent together. If the broker is unavailable, they are
        lost, and a warning is logged.
        """
        if self._dispatcher is None:
            return
        try:
            self._dispatcher.flush()
        except Exception as error:
            self._lose(error)
        else:
            self._logged = ""

    def close(self) -> None:
        """Close the connection to the broker. The next event opens a new one."""
        connection, self._connection, self._dispatcher = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except Exception as error:
                logger.debug("singletons: the connection for events was not closed: %s", error)

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
        """Log that events are lost, and close the connection, so that the next event opens a new
        one. Repeated errors of one type are logged once.
        """
        if (name := type(error).__name__) != self._logged:
            logger.warning(
                "singletons: Celery events are lost, because they cannot be sent: %s: %s",
                *(name, error),
            )
            self._logged = name
        self.close()


def details_of(event: dict[str, Any]) -> Details:
    """Return the details that a Celery event carries.

    :raises msgspec.ValidationError: the event is not one of this package's, or another release of
        the package sent it.
    """
    found: Details = msgspec.convert(event, _Any)
    return found


def follow(hostname: str) -> None:
    """Have a worker's switch for events copied to the shared byte from now on.

    Call it in the worker's main process before the pool is created.

    :param hostname: the worker's node name.
    """
    global _hostname
    _hostname = hostname
    switch[0] = 0
    signals.task_received.connect(_on_received)


def _on_received(sender: Any, **_: Any) -> None:
    dispatcher = sender.event_dispatcher
    groups = dispatcher.groups if dispatcher else ()
    switch[0] = bool(dispatcher and dispatcher.enabled and (not groups or "task" in groups))
