"""Copy a message: encode its arguments as its sender did, and collect its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.app.task import Context
from kombu import serialization
from kombu.utils import json

from celery_singleton_state.compat import serializer_names
from celery_singleton_state.config.options import options_of
from celery_singleton_state.headers import PREFIX, custom_headers

from .routing import address_of

#: Names of the options that a new message takes over from the message that it replaces.
_KEPT = ("expires", "time_limit", "soft_time_limit", "shadow")


@dataclass(frozen=True)
class Content:
    """The arguments of a message, encoded by one of kombu's serializers.

    :param content_type: the serializer's content type, for example ``application/json``.
    :param content_encoding: the encoding of the body, for example ``utf-8``.
    :param body: the encoded positional and keyword arguments.
    """

    content_type: str
    content_encoding: str
    body: str | bytes

    @classmethod
    def of(cls, task: Any, request: Context, args: Any, kwargs: Any) -> Content:
        """Encode the arguments of a message or a direct call, with the message's own serializer.

        A direct call has no serializer of its own. The task's serializer is used for it.

        :param args: the positional arguments of a direct call. They are ignored for a message: its
            request has the arguments that were sent, and a base class may have changed ``args``.
        :param kwargs: the keyword arguments of a direct call. They are ignored for a message, too.
        :raises TypeError: an argument cannot be encoded.
        """
        if not request.called_directly:
            args, kwargs = request.args, request.kwargs
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        serializer = serializer_of(request) or task.serializer or task.app.conf.task_serializer
        try:
            return cls(*serialization.dumps((args, kwargs, {}), serializer))
        except Exception as error:  # a serializer can raise anything
            raise TypeError(
                f"task {task.name}: on_conflict='coalesce' stores the arguments of the pending run "
                f"as {serializer}, and {_unencoded(args, kwargs, serializer)} cannot be encoded "
                f"as {serializer}: {error}"
            ) from error

    def decode(self, app: Celery) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the decoded positional and keyword arguments.

        :raises ContentDisallowed: the app's ``accept_content`` does not allow this content type.
        """
        accept = serialization.prepare_accept_content(app.conf.accept_content)
        args, kwargs, _ = serialization.loads(
            self.body, self.content_type, self.content_encoding, accept=accept
        )
        return tuple(args), dict(kwargs)


def note_content(sender: Any, request: Any, **_: Any) -> None:
    """Note in a message's properties how the message is encoded, so that its task can see this.

    Celery itself shows a task the encoding of its message only if the broker is RabbitMQ. Celery's
    signal ``task_received`` calls this function.
    """
    if options_of(request.task) is None:
        return
    message, known = request.message, request.request_dict
    found = {"content_type": message.content_type, "content_encoding": message.content_encoding}
    known["properties"] = found | (known.get("properties") or {})


def serializer_of(request: Context) -> str | None:
    """Return the name of the serializer that encoded a message.

    :returns: ``None`` if the message's content type is not known, or if this process has no
        serializer for it.
    """
    properties: Any = request.properties or {}
    return serializer_names().get(str(properties.get("content_type")))


def encoding_of(request: Context) -> dict[str, Any]:
    """Return the options that encode a new message with the serializer and the compression of the
    message that it replaces.
    """
    found = {
        "serializer": serializer_of(request),
        "compression": request.__dict__.get("compression"),
    }
    return {name: value for name, value in found.items() if value is not None}


def options_for_new(task: Any, request: Context) -> dict[str, Any]:
    """Return the options with which a new message is sent in place of an earlier message.

    The new message takes over the options that the sender chose. It does not take over callbacks, a
    chain, a group or a chord, because they belong to the earlier message. It does not take over
    ``eta`` or ``countdown`` either, because that time has passed.
    """
    if request.called_directly or request.is_eager or not request.id:
        return {}
    has: Any = request.as_execution_options()
    stamps = has.get("stamped_headers") or ()
    found = {name: has.get(name) for name in (*_KEPT, *stamps)}
    found["ignore_result"] = request.__dict__.get("ignore_result")
    found["delivery_mode"] = (request.properties or {}).get("delivery_mode")
    found["stamped_headers"] = list(stamps) or None
    headers = custom_headers(request).items()
    found["headers"] = {
        name: value for name, value in headers if not name.startswith(PREFIX)
    } or None
    found["root_id"], found["parent_id"] = request.root_id or request.id, request.id
    found |= address_of(task.app, request) | encoding_of(request)
    return {name: value for name, value in found.items() if value is not None}


def _unencoded(args: tuple[Any, ...], kwargs: dict[str, Any], serializer: str) -> str:
    """Return the name of the first argument that cannot be encoded, for an error message."""
    numbered = {f"argument {number}": value for number, value in enumerate(args, 1)}
    named = {f"argument {name!r}": value for name, value in kwargs.items()}
    for name, value in (numbered | named).items():
        try:
            serialization.dumps(((value,), {}, {}), serializer)
        except Exception:
            return name
    return "one of them"


def dump(document: Mapping[str, Any]) -> str:
    """Encode a document as JSON text, such that :func:`load` also restores bytes and times."""
    return str(json.dumps(document))


def load(text: str) -> dict[str, Any]:
    """Return the document that :func:`dump` encoded."""
    document: dict[str, Any] = json.loads(text)
    return document
