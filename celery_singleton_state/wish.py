"""The wish for one more run: noted by a delivery that found the lease taken, granted at release.

It stays in the row until the message is sent, so that it outlives a holder that dies: whoever
releases the lease next sends it. One that dies between sending and striking it out leaves it to be
sent again, with the same task id, by which it is known as a duplicate.
"""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Any

import msgspec
from celery import Celery

from .headers import SENT
from .store.base import Leases, Released

if TYPE_CHECKING:
    from .delivery import Delivery

logger = logging.getLogger(__name__)


class Wish(msgspec.Struct, frozen=True):
    """A message to be sent, as the row keeps it."""

    task: str
    id: str
    args: list[Any]
    kwargs: dict[str, Any]
    routing: dict[str, Any]


def wish_for(delivery: Delivery, args: Any, kwargs: Any) -> str:
    """The wish for one more run with the arguments of this delivery, in its queue.

    :raises TypeError: an argument cannot be written as JSON.
    """
    info: Any = delivery.request.delivery_info or {}
    routing = {name: info[name] for name in ("exchange", "routing_key", "priority") if name in info}
    wish = Wish(delivery.task.name, str(uuid.uuid4()), list(args), dict(kwargs), routing)
    try:
        return msgspec.json.encode(wish).decode()
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise TypeError(
            f"task {delivery.task.name}: on_conflict='coalesce' keeps its arguments as JSON, "
            f"and one cannot be written so: {error}"
        ) from error


def grant(
    app: Celery, store: Leases, key: str, released: Released | None, task_id: str | None = None
) -> None:
    """Send what a release found wanted, if anything; if that fails, the next release does it.

    :param released: the answer to the release; ``None`` where it was lost.
    :param task_id: of the run that has ended. A wish with this id has been sent, and its sender has
        died, or has not struck it out yet.
    """
    try:
        written = released.wanted if released is not None else store.wishes.wanted(key)
        if not written:
            return
        wish = msgspec.json.decode(written, type=Wish)
        if wish.id == task_id:
            store.wishes.granted(key, written)
            return
        app.tasks[wish.task].apply_async(
            tuple(wish.args),
            wish.kwargs,
            task_id=wish.id,
            # Sent a second time, it is a copy.
            headers={SENT: wish.id},
            **wish.routing,
        )
        store.wishes.granted(key, written)
        logger.info("%s: one more run was wanted; sent as task %s", key, wish.id)
    except Exception:
        logger.exception("%s: the run that is wanted could not be sent; it stays wanted", key)
