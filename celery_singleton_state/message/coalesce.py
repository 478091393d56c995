"""The pending run of ``on_conflict="coalesce"``: how it is encoded, and how it is sent.

A delivery that conflicts notes one pending run in the singleton's row. The run that releases the
lease sends the pending run's message, and then removes the pending run from the row. If that
process dies before it has sent the message, the next release of the lease sends it. If it dies
between the two steps, the next release sends the message a second time. Both messages have the same
task id, so the second one is recognised as a duplicate.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import Celery

from celery_singleton_state.headers import SENT
from celery_singleton_state.store.base import Leases, Released
from celery_singleton_state.text.visible import logger_of

from .content import Content, dump, load, options_for_new
from .resend import send_as_it_is
from .routing import resolved

if TYPE_CHECKING:
    from .delivery import Delivery

logger = logger_of(__name__)


@dataclass(frozen=True)
class PendingRun:
    """A pending run: the message that will be sent when the lease is released.

    :param task: the name of the task.
    :param id: the task id of the message.
    :param content: the encoded arguments of the message.
    :param options: the options of Celery's ``apply_async`` with which the message is sent.
    """

    task: str
    id: str
    content: Content
    options: dict[str, Any]

    def encode(self) -> str:
        """Return the pending run as the text that the row stores."""
        own = {"task": self.task, "id": self.id, "options": self.options}
        return dump(own | vars(self.content))

    @classmethod
    def decode(cls, text: str) -> PendingRun:
        """Return the pending run that a text in the row describes."""
        found = load(text)
        task, task_id, options = found.pop("task"), found.pop("id"), found.pop("options")
        return cls(task, task_id, Content(**found), options)


def pending_run_for(delivery: Delivery, args: Any, kwargs: Any) -> str:
    """Return the encoded pending run for a delivery that conflicts.

    The pending run repeats the arguments and options of the delivery's message, under a new task
    id.

    :param args: the positional arguments of a direct call.
    :param kwargs: the keyword arguments of a direct call.
    :raises TypeError: the serializer of the message cannot encode an argument.
    """
    task, request = delivery.task, delivery.request
    content = Content.of(task, request, args, kwargs)
    return PendingRun(
        task.name, str(uuid.uuid4()), content, options_for_new(task, request)
    ).encode()


def send_pending_run(
    app: Celery, store: Leases, key: str, released: Released | None, task_id: str | None = None
) -> None:
    """Send the pending run that a release found in the row, if there is one.

    If the sending fails, the pending run stays in the row and the next release sends it.

    :param key: the key of the singleton's row.
    :param released: the store's answer to the release; ``None`` if the answer was lost.
    :param task_id: the task id of the run that has just ended. If the pending run has this id, its
        message has already been sent, so the pending run is only removed from the row.
    """
    try:
        written = released.wanted if released is not None else store.requests.wanted(key)
        if not written:
            return
        pending_run = PendingRun.decode(written)
        if pending_run.id == task_id:
            store.requests.pending_run_sent(key, written)
            return
        args, kwargs = pending_run.content.decode(app)
        # The header SENT tells messages with the same task id apart. Its value is always the id of
        # the pending run. So if the message is sent twice, the second one is recognised as a
        # duplicate.
        headers = {**(pending_run.options.get("headers") or {}), SENT: pending_run.id}
        options = resolved(app, pending_run.options) | {
            "task_id": pending_run.id,
            "headers": headers,
        }
        send_as_it_is(app.tasks[pending_run.task], args, kwargs, options)
        store.requests.pending_run_sent(key, written)
        logger.info("%s: the pending run was sent as task %s", key, pending_run.id)
    except Exception:
        logger.exception(
            "%s: the pending run could not be sent; the next release of the lease sends it", key
        )
