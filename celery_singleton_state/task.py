"""The task base class."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from celery import Celery, Task
from celery.app.task import Context
from celery.exceptions import Reject
from celery.result import allow_join_result
from kombu.exceptions import OperationalError
from typing_extensions import ParamSpec, TypeVar

from .compat import TASK_STACK, forget_max_retries
from .config.options import Options, find_misspelled, read_options, run_signature
from .config.retry import RetryAfter
from .errors import SingletonError, StateLoadFailed
from .headers import (
    COPY,
    DUE,
    ENTRY,
    OF_ONE_TRY,
    ONE_BY_ONE,
    PAUSE_LEFT,
    PREVIOUS,
    REPLACES,
    RETRIES,
    custom_headers,
    header,
    own_headers,
)
from .hooks import Failed
from .keys import Binder, singleton_name
from .message.content import encoding_of
from .message.delay import prepare
from .message.delivery import Delivery, is_message
from .message.dropped import settle
from .message.enqueue_once import (
    BRING_ANOTHER_RUN,
    dequeue,
    enqueue,
    is_guarded,
    is_retry,
    publish_retry,
)
from .message.place import note_sending
from .message.resend import (
    UNSENDABLE,
    can_be_sent_again,
    leave_with_broker,
    reject_if_killed,
)
from .message.results import has_result, is_recorded
from .message.reused_ids import mark_replacement, marking
from .run.calls import guard_calls, has_call_behind, in_guard, keep_class_of_app
from .run.converted import Converter, converter_of
from .run.guard import deliver
from .run.interrupt import Unbreakable
from .run.run import ReplacedEagerly, Run, current_run
from .run.task_api import InRun
from .runtime import runtime_of
from .state.codec import Codec
from .text.visible import logger_of
from .worker.steps import watch_over

logger = logger_of(__name__)

S = TypeVar("S", default=Any)
P = ParamSpec("P", default=...)
R = TypeVar("R", default=Any)

if TYPE_CHECKING:

    class _TypedTask(Task[P, R | None], InRun[S], Generic[S, P, R]):
        pass
else:

    class _TypedTask(Task, InRun):
        def __class_getitem__(cls, _types: Any) -> type:
            return cls


class SingletonTask(_TypedTask[S, P, R]):
    """A task of which one run at most is active, and which starts where the last run stopped.

    Use it as the ``base`` of a task, or through :func:`singleton_task`, which keeps the types.
    All options of Celery's own apply. A delivery that is skipped ends with ``None``.

    Each option of :class:`TaskOptions` is a class attribute, or an argument of the decorator.

    :raises ImproperlyConfigured: when the task is made, for an option that is not allowed.
    """

    abstract = True
    #: A message is insurance for its run, so it is kept until the run is over ...
    acks_late = True
    #: ... and sent again, up to ``max_retries`` times, if the process that ran it died.
    retry_on_worker_lost = True
    #: Before Celery 5.7, and where that cannot be sent, its broker gives it out again. What ends
    #: it for a task that kills is in the module poison.
    reject_on_worker_lost = True

    # Made by bind().
    _options: ClassVar[Options]
    _codec: ClassVar[Codec[Any] | None]
    _binder: ClassVar[Binder]
    _convert: ClassVar[Converter | None]
    #: Whether a base class with a ``__call__`` of its own stands before, or behind, this one.
    _has_call_before: ClassVar[bool]
    _has_call_behind: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        keep_class_of_app(cls)
        super().__init_subclass__(**kwargs)
        find_misspelled(str(cls.__dict__.get("name") or cls.__name__), cls.__dict__)

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        bound = super().bind(app)
        cls._has_call_before = guard_calls(cls, SingletonTask)
        cls._has_call_behind = has_call_behind(cls, SingletonTask)
        cls._options = read_options(cls)
        cls._codec = cls._options.codec()
        cls._binder = Binder(run_signature(cls))
        cls._convert = converter_of(cls)
        watch_over(app)
        return bound

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R | None:
        body = super().__call__ if self._has_call_behind else self.run
        if self._has_call_before:
            return self._run_guarded(body, args, kwargs)
        return self._handle(body, args, kwargs)

    def _run_guarded(self, body: Callable[..., R | None], args: Any, kwargs: Any) -> R | None:
        """Come to the guard from a ``__call__`` before this one."""
        with in_guard(self):
            return self._handle(body, args, kwargs)

    def _handle(self, body: Callable[..., R | None], args: Any, kwargs: Any) -> R | None:
        """Handle a delivery, or a direct call; ``body`` is called under the lease."""
        with Unbreakable():
            request, is_own = _request_for(self, args, kwargs)
            try:
                result: R | None = self._deliver(request, body, args, kwargs)
                return result
            except ReplacedEagerly as ended:
                # It would have met the lease in the body. Celery denies the waiting for results in
                # what `task_always_eager` calls.
                with allow_join_result():
                    return super().on_replace(ended.signature)
            except BaseException as error:
                reject_if_killed(error, request)
                raise
            finally:
                if is_own:
                    self.pop_request()
                    TASK_STACK.pop()

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> Any:
        """Send the task, as Celery does.

        With ``enqueue_once`` the result of the message that is queued is returned, and none is
        sent, if there is one; where ``on_conflict`` is ``"skip"`` or ``"raise"``, also of the one
        that is running. Retries, chains, groups and chords are always sent, and so is a message
        with callbacks or headers, one that a run of the task sends, and one sent while the store
        is out of reach.
        """
        named = {
            "task_id": task_id,
            "producer": producer,
            "link": link,
            "link_error": link_error,
            "shadow": shadow,
        }
        # By name, and only what was given: the next class's method need not know all of them, and
        # tools that wrap it read them so.
        options |= {name: value for name, value in named.items() if value is not None}
        send = marking(self, task_id, super().apply_async)

        def publish(own_id: str | None = task_id) -> Any:
            chosen = options if own_id is None else {**options, "task_id": own_id}
            if self._options.on_conflict == "replace":
                chosen = note_sending(chosen)
            return send(args, kwargs, **chosen)

        run = current_run(self)
        if run is not None:
            options = _of_run(run, options, args, kwargs)
        if not self._options.enqueue_once or self.app.conf.task_always_eager:
            return publish()
        return self._send_once(args, kwargs, options, publish)

    def _send_once(
        self, args: Any, kwargs: Any, options: dict[str, Any], publish: Callable[..., Any]
    ) -> Any:
        """Publish a message unless one is queued; returns the result of whichever it is.

        :param publish: sends the message, under another id if it is given one.
        """
        known = {"expires": self.expires, **options}
        # A run stands for what others send, and not for its own next one.
        is_own = current_run(self) is not None
        if not is_retry(known) and (is_own or not is_guarded(known)):
            return publish()
        try:
            name = self._name(tuple(args or ()), kwargs or {})
        except Exception as error:
            # Celery sends it, or refuses it itself; the body, or a `__call__` around it, may
            # understand its arguments.
            logger.warning("task %s: sent without enqueue_once: %s", self.name, error)
            return publish()
        key = runtime_of(self.app).key_of(name)
        if is_retry(known):
            return publish_retry(self, key, known, publish)
        brings_another = self._options.on_conflict in BRING_ANOTHER_RUN
        sent = enqueue(self, key, known, publish, brings_another, self._has_ended)
        return self.AsyncResult(sent) if isinstance(sent, str) else sent

    def _has_ended(self, task_id: str) -> bool:
        return is_recorded(self, Context()) and has_result(self, task_id)

    def retry(self, *args: Any, **options: Any) -> Any:
        """Retry the task, as Celery does.

        :raises Retry: the message was sent again.
        :raises Reject: it could not be sent; the broker keeps it, where Celery would drop it.
        :raises HeartbeatFailed: the run was asked to hand over to a newer message, which it must
            not replace in turn.
        """
        run = current_run(self)
        if run is not None:
            run.refuse_if_handoff_requested()
            if run.headers:
                headers = options.get("headers") or custom_headers(self.request)
                options["headers"] = {**headers, **run.headers}
        try:
            retry = super().retry(*args, **{**encoding_of(self.request), **options})
        except Reject as rejected:
            error = rejected.args[0]
            if isinstance(error, Exception) and not isinstance(error, UNSENDABLE):
                leave_with_broker(self.request, run.name if run else self.name, error)
            raise
        if run is not None:
            run.is_final = False
        return retry

    def signature_from_request(
        self,
        request: Context | None = None,
        args: Any = None,
        kwargs: Any = None,
        queue: Any = None,
        **options: Any,
    ) -> Any:
        """The message with which Celery and this package retry a message, or send it again.

        It keeps this package's own headers, also if a tracing tool hides them from Celery, so that
        what a retry is known by, and its tick, are not lost. It waits where and for as long as the
        broker allows, and goes into the queue that the first one came from, unless the caller says
        another one.

        :raises Reject: the broker is unavailable.
        """
        found = self.request if request is None else request
        if "headers" in options:
            headers = own_headers(found) | (options["headers"] or {})
        else:
            headers = custom_headers(found)
        if (options.get("retries") or 0) > (found.retries or 0):
            headers = {name: value for name, value in headers.items() if name not in OF_ONE_TRY}
        own: dict[str, Any] = {"headers": headers}
        # Celery before 5.7 forgets what the sender said of the result.
        if found.__dict__.get("ignore_result") is not None:
            own["ignore_result"] = options.get("ignore_result", found.ignore_result)
        signature = super().signature_from_request(found, args, kwargs, queue, **options | own)
        if is_message(found):
            said = [*options, *(["queue"] if queue else [])]
            try:
                prepare(self, found, signature, said)
            except OperationalError as error:
                # As Celery's retry does when it cannot send.
                raise Reject(error, requeue=False) from error
            except Exception:
                signature.options["headers"].pop(PAUSE_LEFT, None)
                logger.exception("task %s[%s] is sent again as Celery does", self.name, found.id)
        return signature

    subtask_from_request = signature_from_request

    def on_replace(self, sig: Any) -> Any:
        """Replace the task, as Celery does, when the state is saved."""
        run = current_run(self)
        if run is None:
            return super().on_replace(sig)
        with run.replacing():
            if self.request.is_eager:
                raise ReplacedEagerly(sig)
            mark_replacement(sig, self.request)
            return super().on_replace(sig)

    def on_become_leader(self) -> None:
        """Called in each run when the lease is acquired and the state loaded."""

    def on_lose_leadership(self) -> None:
        """Called exactly once for each :meth:`on_become_leader`, however the run ends.

        That is when the run ends; with ``on_lease_lost="finish"`` it is when the lease is lost,
        in a thread of its own, while the body goes on. A process that dies calls nothing.
        """

    def _name(self, args: Any, kwargs: Any) -> str:
        unique_on = self._options.unique_on
        convert = type(self)._convert
        if convert is not None and unique_on is not None:
            args, kwargs = convert(args, kwargs)
        return singleton_name(self.name, unique_on, self._binder, args, kwargs)

    def _delivery(self, request: Context, args: Any, kwargs: Any) -> Delivery:
        name = self.name if self._options.unique_on is None else self._name(args, kwargs)
        runtime = runtime_of(self.app)
        key = runtime.key_of(name)
        return Delivery(self, request, name, key, self._options, self._codec, runtime)

    def _deliver(self, request: Context, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Deliver a message, or a call, and answer what goes wrong.

        :raises SingletonError: what went wrong; of an eager run that was repeated, in the last try
            whose body ran.
        """
        delivery = self._delivery(request, args, kwargs)
        if self._options.enqueue_once:
            settle(request)
        earlier = delivery.earlier
        try:
            while True:
                try:
                    return deliver(delivery, body, args, kwargs)
                except SingletonError as error:
                    # One that a nested singleton raised is its own affair.
                    if error.singleton != delivery.name:
                        raise
                    delivery.emit(Failed, reason=error.reason, detail=error.detail)
                    if self._answer(error, delivery):
                        logger.info("%s; the eager run is repeated", error)
                        earlier.note(error)
                        continue
                    if not isinstance(error, StateLoadFailed):
                        raise
                    dequeue(delivery)
                    if earlier.error is None:
                        raise
                    raise earlier.error from earlier.error.__cause__
        finally:
            # The error has the frames that it passed, and these have the delivery.
            earlier.error = earlier.result = None

    def _answer(self, error: SingletonError, delivery: Delivery) -> bool:
        """Retry the message if the error is one to retry; come back if not.

        Celery's own retry of an eager run raises ``Retry`` to a caller that wants the error, and
        calls itself without end where the number of retries has no limit.

        :returns: whether the run is an eager one, and is to be repeated within its call.
        :raises Retry: the message was sent again.
        """
        request = delivery.request
        answer = delivery.answer_to(error)
        if not isinstance(answer, RetryAfter) or delivery.place.handoff_to is not None:
            return False
        if request.is_eager:
            return True
        if delivery.is_copy and not can_be_sent_again(self, request):
            logger.warning(
                "singleton %s: task %s is not retried, because it came through a fanout exchange",
                delivery.name,
                request.id,
            )
            return False
        # Of all copies one alone has run.
        is_copy = delivery.is_copy and isinstance(error, StateLoadFailed)
        try:
            # The answer has judged the count already.
            raise self.retry(
                exc=error,
                countdown=answer.seconds,
                max_retries=delivery.retries + 1,
                headers=custom_headers(request)
                | delivery.resent
                | ({COPY: int(is_copy)} if delivery.is_copy else {})
                | {RETRIES: delivery.own_retries + 1},
            )
        except Reject as rejected:
            requeue: bool = rejected.requeue  # type: ignore[attr-defined]  # missing in celery-types
            cause = rejected.args[0]
            if requeue or not isinstance(cause, Exception):
                raise
            leave_with_broker(request, delivery.name, cause)
        finally:
            # Celery leaves it on the task, where the next retry of its own would find it.
            forget_max_retries(self)


def _of_run(run: Run, options: dict[str, Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The options of a message of its own task that a run sends."""
    if run.request.id and options.get("task_id") == run.request.id:
        run.is_final = False
    if not run.is_replacing:
        return options
    headers = {**(options.get("headers") or {}), **run.headers, REPLACES: run.request.id}
    return options | {"headers": headers | _continued_tick(run, args, kwargs)}


def _continued_tick(run: Run, args: Any, kwargs: Any) -> dict[str, Any]:
    """The headers of a run's tick, for a message that replaces the run in the same singleton.

    The tick ends with that message.
    """
    try:
        is_same = run.task._name(tuple(args or ()), kwargs or {}) == run.name
    except Exception:  # a body's arguments can be anything
        is_same = False
    if not is_same:
        return {}
    found = {name: header(run.request, name) for name in (ENTRY, DUE, PREVIOUS, ONE_BY_ONE)}
    headers = {name: value for name, value in found.items() if value is not None}
    run.tick_continues = bool(headers)
    return headers


def _request_for(task: Any, args: Any, kwargs: Any) -> tuple[Context, bool]:
    """The request of this call: the message's, or a new one for a direct call; and whether it is
    new, so that the caller is to pop it.

    A body that calls its own task finds its message's request still there, and must not be
    taken for that message; Celery's ``push_request`` would hand it the message's id.
    """
    request = task.request
    if not request.called_directly:
        run = current_run(task)
        # A class's `__call__` can have put a copy of the message's request in its place.
        if run is None or run.request.id != request.id:
            return request, False
    own = Context(args=args, kwargs=kwargs, hostname=request.hostname, headers={})
    TASK_STACK.push(task)
    task.request_stack.push(own)
    return own, True
