"""What a task's body has of its run, and what it is told of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Generic

from sqlalchemy import Connection
from typing_extensions import TypeVar

from celery_singleton_state.ticks import due_of

from .run import Run, current_run, why_no_run

S = TypeVar("S", default=Any)


class InRun(Generic[S]):
    """The part of a task that is there while its body runs.

    A task instance is shared by threads, so what belongs to a run is found in its context. What a
    body starts in another thread or greenlet has it by ``contextvars.copy_context().run``.
    """

    name: str

    @property
    def state(self) -> S:
        """The state of this run: loaded before it, saved when it succeeds.

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
        """This run's fence: larger than that of any earlier run of the same singleton.

        A body that writes elsewhere lets that place refuse a smaller number than the largest
        it has seen. It is never smaller than the store's clock in milliseconds since 1970, so it
        goes on growing after `celery singleton prune`, a restored backup or a fail-over that lost
        commits, unless the new server's clock is behind by more than what was lost.

        :raises RuntimeError: outside a run.
        """
        return self._run_for("fence").held.lease.fence

    @property
    def lease_remaining(self) -> float:
        """Seconds that this run may still count on its lease; 0 when it is lost.

        :raises RuntimeError: outside a run.
        """
        return self._run_for("lease_remaining").held.remaining

    @property
    def tick(self) -> datetime | None:
        """When the schedule's entry that this run is for was due, in UTC; ``None`` for a run that
        no :class:`~celery_singleton_state.beat.SingletonScheduler` or ``LeaderMixin`` asked for.

        :raises RuntimeError: outside a run.
        """
        return due_of(self._run_for("tick").request)

    def checkpoint(self) -> None:
        """Save the state now. It stays saved if the body raises later.

        :raises HeartbeatFailed: the lease was lost; nothing was saved.
        :raises StatePersistFailed: the store is out of reach, after three tries.
        :raises SchemaDecodeFailed: the state does not fit its schema; nothing was saved.
        :raises RuntimeError: outside a run, without state, or within :meth:`transaction`.
        """
        self._run_for("checkpoint()").checkpoint()

    def transaction(self) -> AbstractContextManager[Connection]:
        """A transaction on the store's database whose commit also saves the state, fenced.

        The block is given a SQLAlchemy connection. When it ends, the state is written and all
        is committed; when it raises, all is rolled back, and ``self.state`` is a new object with
        what it held before the block. On SQLite the block holds the file's
        only write lock, so keep it well below the lease's life.

        :raises HeartbeatFailed: the lease was lost; all was rolled back.
        :raises StatePersistFailed: the store went away, and all was rolled back; or the store does
            not tell whether all was committed. Then this run saves nothing any more, and the next
            one starts from what was committed.
        :raises SchemaDecodeFailed: the state does not fit its schema; all was rolled back.
        :raises RuntimeError: outside a run, without state, or within another transaction.
        """
        return self._run_for("transaction()").transaction()

    def _run_for(self, what: str) -> Run:
        run = current_run(self)
        if run is None:
            text = f"task {self.name}: {what} is there only while its body runs"
            why = why_no_run(self)
            raise RuntimeError(f"{text}: {why}" if why else text)
        return run
