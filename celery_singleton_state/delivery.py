"""One delivery of a singleton's message: what it is, and for which singleton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery.app.task import Context

from . import history
from .headers import RETRIES, WAITED, count_in, header
from .hooks import Details
from .options import Options
from .runtime import Runtime
from .state import Codec
from .ticks import Tick, tick_of


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message, or a direct call, and the singleton that it is for.

    :param name: the singleton's name; ``key`` is its row's.
    :param codec: of the state; ``None`` for a singleton without one.
    """

    task: Any
    request: Context
    name: str
    key: str
    options: Options
    codec: Codec[Any] | None
    runtime: Runtime

    def tell(self, kind: type[Details], **fields: Any) -> None:
        """Tell those who look on that something happened to the singleton."""
        self.runtime.door.tell(
            kind(singleton=self.task.name, key=self.name, task_id=self.request.id, **fields)
        )

    @property
    def ttl(self) -> float:
        """Seconds that the lease lives without a renewal."""
        return self.options.lease_ttl or self.runtime.settings.lease_ttl

    @property
    def first_ttl(self) -> float:
        """Seconds that an acquisition takes the lease for; the run then confirms a longer life."""
        return min(self.ttl, self.runtime.settings.lease_ttl)

    @property
    def conflict_timeout(self) -> float:
        """Seconds that it waits for the lease, where its policy waits at all."""
        timeout = self.options.conflict_timeout
        return self.runtime.settings.conflict_timeout if timeout is None else timeout

    @property
    def waited(self) -> float:
        """Seconds that the message has waited for the lease before it came here."""
        return float(header(self.request, WAITED, 0.0))

    @property
    def retries(self) -> int:
        """How often the message was retried, whoever asked for it."""
        return self.request.retries or 0

    @property
    def own_retries(self) -> int:
        """How often this package asked for it, to repeat a run that failed over the store."""
        return count_in(self.request, RETRIES)

    @property
    def generation(self) -> int:
        """How often the body asked for it."""
        return self.retries - self.own_retries

    @property
    def tick(self) -> Tick | None:
        """The tick that the message is for, if a beat of ours sent it."""
        return tick_of(self.request)

    def done_by(self, entries: tuple[history.Entry, ...]) -> history.Entry | None:
        """The run that did what this message asks for, if the history knows one.

        A tick is known again by its task's id, which every beat makes the same.
        """
        task_id = self.request.id
        if not task_id or not self.deduplicates:
            return None
        return history.done_by(entries, task_id, self.generation)

    def is_past(self, entries: tuple[history.Entry, ...]) -> bool:
        """Whether the message is for a tick that is too old to be known as new.

        A retry is known as such.
        """
        if self.tick is None or self.retries or not self.deduplicates:
            return False
        return history.has_passed(entries, self.tick, self.runtime.settings.history)

    @property
    def deduplicates(self) -> bool:
        """Whether what was done is not done again: as told, else for ticks or if there is state."""
        told = self.options.deduplicate
        return self.options.deduplicates or (told is None and self.tick is not None)
