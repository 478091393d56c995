"""A beat's connection to its broker, which it gives up soon: another beat may reach it."""

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
    """The broker does not take messages from this beat."""


class BrokerConnection(_Base):
    """What a scheduler has of its connection, in Celery's own attributes."""

    def _connect(self) -> None:
        """:raises BrokerUnavailable: the broker cannot be reached."""
        try:
            _ = self.producer
        except self._errors_of_broker as error:
            raise BrokerUnavailable(str(error)) from error

    def _disconnect(self) -> None:
        """Let the next message have a new connection."""
        connection = take_connection(self)
        if connection is not None:
            with contextlib.suppress(*self._errors_of_broker):
                connection.release()

    def _ensure_connected(self) -> Any:
        # Once for each address. Celery's own tries go on for minutes.
        tries = max(1, len(self.connection.alt))
        return self.connection.ensure_connection(max_retries=tries, interval_start=0)

    @cached_property
    def _errors_of_broker(self) -> tuple[type[BaseException], ...]:
        return (OperationalError, *self.app.connection_for_write().recoverable_connection_errors)
