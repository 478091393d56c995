"""What a message carries: its arguments, as its sender encoded them, and its options."""

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

#: Options of a message that the run which is sent in its place keeps.
_KEPT = ("expires", "time_limit", "soft_time_limit", "shadow")


@dataclass(frozen=True)
class Content:
    """Arguments of a message, encoded by a serializer of kombu's."""

    content_type: str
    content_encoding: str
    body: str | bytes

    @classmethod
    def of(cls, task: Any, request: Context, args: Any, kwargs: Any) -> Content:
        """Encode the arguments of a message or a direct call, as that message was encoded.

        :param args, kwargs: of a direct call. Those of a message are what the message has: a base
            class may have changed them before it called the task.
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
                f"task {task.name}: on_conflict='coalesce' keeps the arguments of the pending run "
                f"as {serializer}, and {_unencoded(args, kwargs, serializer)} cannot be encoded "
                f"so: {error}"
            ) from error

    def decode(self, app: Celery) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments.

        :raises ContentDisallowed: the app does not accept this type of content.
        """
        accept = serialization.prepare_accept_content(app.conf.accept_content)
        args, kwargs, _ = serialization.loads(
            self.body, self.content_type, self.content_encoding, accept=accept
        )
        return tuple(args), dict(kwargs)


def note_content(sender: Any, request: Any, **_: Any) -> None:
    """Note with a message how it is encoded. Celery's signal ``task_received`` calls it.

    A task does not see that otherwise, but for messages of RabbitMQ.
    """
    if options_of(request.task) is None:
        return
    message, known = request.message, request.request_dict
    found = {"content_type": message.content_type, "content_encoding": message.content_encoding}
    known["properties"] = found | (known.get("properties") or {})


def serializer_of(request: Context) -> str | None:
    """The name of the serializer that encoded a message, if it is known and there is one here."""
    properties: Any = request.properties or {}
    return serializer_names().get(str(properties.get("content_type")))


def encoding_of(request: Context) -> dict[str, Any]:
    """Options by which a message is encoded that is sent in place of another one."""
    found = {
        "serializer": serializer_of(request),
        "compression": request.__dict__.get("compression"),
    }
    return {name: value for name, value in found.items() if value is not None}


def options_for_new(task: Any, request: Context) -> dict[str, Any]:
    """Options with which a new message is sent in place of one: with what its sender gave it.

    What hangs on the message (callbacks, a chain, a group, a chord) ends with it and is not kept;
    nor is when it was to come, which it has done.
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
    """The name of the argument that cannot be encoded, for people."""
    numbered = {f"argument {number}": value for number, value in enumerate(args, 1)}
    named = {f"argument {name!r}": value for name, value in kwargs.items()}
    for name, value in (numbered | named).items():
        try:
            serialization.dumps(((value,), {}, {}), serializer)
        except Exception:
            return name
    return "one of them"


def dump(document: Mapping[str, Any]) -> str:
    """A document as text. Bytes, times and the like come back from it as they were."""
    return str(json.dumps(document))


def load(text: str) -> dict[str, Any]:
    """The document that :func:`dump` made a text."""
    document: dict[str, Any] = json.loads(text)
    return document
