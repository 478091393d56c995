"""The attributes and methods of a task that work only while its body runs: ``self.state`` etc."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Generic

from sqlalchemy import Connection
from typing_extensions import TypeVar

from celery_singleton_state.ticks import due_of

from .current import current_run, why_no_run
from .run import Run

S = TypeVar("S", default=Any)


class InRun(Generic[S]):
    """The part of :class:`SingletonTask` that works only while the task's body runs.

    Several threads share one task object, so a run is found through its context variables. Code
    that a body starts in another thread or greenlet has these variables only if it is started by
    ``contextvars.copy_context().run``.
    """

    name: str

    @property
    def state(self) -> S:
        """The singleton's state, a value of the type ``state_schema``.

        It is loaded before the body begins, and saved when the run succeeds. The body can change it
        in place or assign a new value.

        :raises RuntimeError: outside a run, or without a ``state_schema``.
        """
        found = self._run_for("state").state
        found.need("state")
        value: S = found.value
        return value

    @state.setter
    def state(self, value: S) -> None:
        found = self._run_for("state").state
        found.need("state")
        found.value = value

    @property
    def fence(self) -> int:
        """This run's fence: an integer larger than the fence of any earlier run of the singleton.

        If the body writes to another system, pass the fence along, and let that system refuse each
        write with a smaller fence than the largest that it has seen. Then a run that lost its lease
        cannot overwrite what a later run wrote.

        The fence is at least the store's clock in milliseconds since 1970. So it keeps growing
        after `celery singleton prune`, a restored backup or a fail-over that lost commits, unless
        the new server's clock is behind by more than the time that was lost.

        :raises RuntimeError: outside a run.
        """
        return self._run_for("fence").held.lease.fence

    @property
    def lease_remaining(self) -> float:
        """Seconds for which this run may still trust its lease; 0 when the lease is lost.

        Each renewal of the lease, by the heartbeat or by a save, increases this time again.

        :raises RuntimeError: outside a run.
        """
        return self._run_for("lease_remaining").held.remaining

    @property
    def tick(self) -> datetime | None:
        """The due time in UTC of the tick that this run is for; ``None`` if it is for no tick.

        Only messages from a :class:`~celery_singleton_state.beat.SingletonScheduler`, or from a
        scheduler with ``LeaderMixin``, have a tick.

        :raises RuntimeError: outside a run.
        """
        return due_of(self._run_for("tick").request)

    def checkpoint(self) -> None:
        """Save the state now, so that it stays saved even if the body raises later.

        :raises HeartbeatFailed: the lease was lost, and nothing was saved; or the state was saved,
            and the run must end because a newer message asked for its lease.
        :raises StatePersistFailed: the store is unavailable, after three tries; or it is unknown
            whether an earlier :meth:`transaction` was committed.
        :raises SchemaDecodeFailed: the state does not fit its schema; nothing was saved.
        :raises RuntimeError: outside a run, without state, or within :meth:`transaction`.
        """
        self._run_for("checkpoint()").checkpoint()

    def transaction(self) -> AbstractContextManager[Connection]:
        """Open a transaction on the store's database whose commit also saves the state, fenced.

        Use it in a ``with`` statement, which gives a SQLAlchemy connection for the body's own
        statements. When the block ends, the state is written, and all is committed together. When
        the block raises, all is rolled back, and ``self.state`` becomes a new object with the state
        as it was before the block. On SQLite the block holds the file's only write lock, so it must
        take much less time than the lease's life.

        :raises HeartbeatFailed: the lease was lost, and all was rolled back; or all was committed,
            and the run must end because a newer message asked for its lease.
        :raises StatePersistFailed: the store became unavailable, and all was rolled back; or it is
            unknown whether all was committed. Then this run saves nothing more, and the next run
            starts from the state in the row.
        :raises SchemaDecodeFailed: the state does not fit its schema; all was rolled back.
        :raises RuntimeError: outside a run, without state, or within another transaction.
        """
        return self._run_for("transaction()").transaction()

    def _run_for(self, what: str) -> Run:
        run = current_run(self)
        if run is None:
            text = f"task {self.name}: {what} is available only while its body runs"
            why = why_no_run(self)
            raise RuntimeError(f"{text}: {why}" if why else text)
        return run
