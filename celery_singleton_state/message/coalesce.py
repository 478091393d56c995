"""The wish for one more run: noted by a delivery that found the lease taken, granted at release.

It stays in the row until the message is sent, so that it outlives a holder that dies: whoever
releases the lease next sends it. One that dies between sending and striking it out leaves it to be
sent again, with the same task id, by which it is known as a duplicate.
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
    """A pending run, as the row keeps it: the message that is to be sent.

    :param options: of Celery's ``apply_async``.
    """

    task: str
    id: str
    content: Content
    options: dict[str, Any]

    def encode(self) -> str:
        """The text that is kept."""
        own = {"task": self.task, "id": self.id, "options": self.options}
        return dump(own | vars(self.content))

    @classmethod
    def decode(cls, text: str) -> PendingRun:
        """The pending run that is kept."""
        found = load(text)
        task, task_id, options = found.pop("task"), found.pop("id"), found.pop("options")
        return cls(task, task_id, Content(**found), options)


def pending_run_for(delivery: Delivery, args: Any, kwargs: Any) -> str:
    """The pending run for a delivery: its message, sent anew.

    :raises TypeError: an argument cannot be encoded as the message was.
    """
    task, request = delivery.task, delivery.request
    content = Content.of(task, request, args, kwargs)
    return PendingRun(
        task.name, str(uuid.uuid4()), content, options_for_new(task, request)
    ).encode()


def send_pending_run(
    app: Celery, store: Leases, key: str, released: Released | None, task_id: str | None = None
) -> None:
    """Send what a release found wanted, if anything; if that fails, the next release does it.

    :param released: the answer to the release; ``None`` where it was lost.
    :param task_id: of the run that has ended. A wish with this id has been sent, and its sender has
        died, or has not struck it out yet.
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
        # Sent a second time, it is a copy.
        headers = {**(pending_run.options.get("headers") or {}), SENT: pending_run.id}
        options = resolved(app, pending_run.options) | {
            "task_id": pending_run.id,
            "headers": headers,
        }
        send_as_it_is(app.tasks[pending_run.task], args, kwargs, options)
        store.requests.pending_run_sent(key, written)
        logger.info("%s: one more run was wanted; sent as task %s", key, pending_run.id)
    except Exception:
        logger.exception("%s: the run that is wanted could not be sent; it stays wanted", key)
