"""Messages without a broker: each is kept when it is sent, and delivered when the test says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer


@dataclass
class Message:
    """A message as its sender has sent it."""

    app: Celery
    headers: dict[str, Any]
    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]

    @property
    def task_id(self) -> str:
        return str(self.headers["id"])

    def deliver(self, redelivered: bool = False, **request: Any) -> Any:
        """Have Celery run the task, as a worker's child does; return its state and its result."""
        task = self.app.tasks[self.headers["task"]]
        info = {"exchange": "", "routing_key": "celery", "redelivered": redelivered}
        request = {**self.headers, "delivery_info": info, "properties": {}} | request
        build_tracer(task.name, task, app=self.app)(
            self.task_id, list(self.args), dict(self.kwargs), request
        )
        result = task.AsyncResult(self.task_id)
        return result.state, result.result


@dataclass
class Broker:
    """Stands for a broker: it keeps the messages that an app sends."""

    app: Celery
    sent: list[Message] = field(default_factory=list)

    def keep(self, producer: Any, name: str, message: Any, **options: Any) -> None:
        headers, _, (args, kwargs, embedded), _ = message
        headers = {**headers, **(options.pop("headers", None) or {}), **embedded}
        self.sent.append(Message(self.app, headers, list(args), kwargs, options))

    def pop(self) -> Message:
        """Return the only message that is kept, and keep it no longer."""
        (message,) = self.sent
        self.sent.clear()
        return message


def broker_of(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker(app)
    monkeypatch.setattr(app.amqp, "send_task_message", broker.keep)
    return broker
