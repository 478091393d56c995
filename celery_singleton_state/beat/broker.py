"""Connect a beat to its broker, with few tries.

If a beat cannot connect, it soon hands over, because another beat may be able to connect.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from celery.beat import Scheduler
from kombu.exceptions import OperationalError
from kombu.utils.objects import cached_property

from celery_singleton_state.compat import take_connection

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class BrokerUnavailable(Exception):
    """The broker does not accept messages from this beat, or cannot be reached."""


class BrokerConnection(_Base):
    """The part of a scheduler that opens and closes the connection to the broker.

    Celery's scheduler keeps the connection in its attributes ``connection`` and ``producer``.
    """

    def _connect(self) -> None:
        """Connect to the broker, unless this beat is connected.

        :raises BrokerUnavailable: the broker cannot be reached.
        """
        try:
            _ = self.producer
        except self._errors_of_broker as error:
            raise BrokerUnavailable(str(error)) from error

    def _disconnect(self) -> None:
        """Close the connection. The next message opens a new one."""
        connection = take_connection(self)
        if connection is not None:
            with contextlib.suppress(*self._errors_of_broker):
                connection.release()

    def _ensure_connected(self) -> Any:
        # Try each address once. Celery itself would try for minutes, and this beat would keep the
        # lead meanwhile, although another beat may be able to send.
        tries = max(1, len(self.connection.alt))
        return self.connection.ensure_connection(max_retries=tries, interval_start=0)

    @cached_property
    def _errors_of_broker(self) -> tuple[type[BaseException], ...]:
        return (OperationalError, *self.app.connection_for_write().recoverable_connection_errors)
