"""``SingletonTask``, the base class of singleton tasks."""

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
from .run.current import current_run
from .run.guard import deliver
from .run.interrupt import Unbreakable
from .run.run import ReplacedEagerly, Run
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
    """Base class of tasks that have at most one active run, which starts from the last saved state.

    Pass this class as ``base=SingletonTask`` to ``app.task``. :func:`singleton_task` does the same
    and keeps the types for a type checker. An option is an argument of the decorator or an
    attribute of a subclass. :class:`TaskOptions` explains the options; all of Celery's own task
    options apply, too. By default a delivery that finds the lease taken is skipped: it succeeds
    with the result ``None``.

    :raises ImproperlyConfigured: an option is not allowed. The error is raised when Celery makes
        the task.
    """

    abstract = True
    #: The broker keeps a message until its run has ended, so that a killed run is repeated.
    acks_late = True
    #: Has the worker retry the message of a killed pool process, up to ``max_retries`` times. The
    #: attribute is read by Celery 5.7 and later.
    retry_on_worker_lost = True
    #: Has the broker redeliver the message of a killed pool process before Celery 5.7, and when the
    #: worker cannot send a retry. ``message/poison.py`` ends a message that kills its process again
    #: and again.
    reject_on_worker_lost = True

    # bind() sets these attributes when Celery binds the task to its app.
    _options: ClassVar[Options]
    _codec: ClassVar[Codec[Any] | None]
    _binder: ClassVar[Binder]
    _convert: ClassVar[Converter | None]
    #: Whether a class with its own ``__call__`` stands before SingletonTask in the task's method
    #: resolution order, and whether one stands behind SingletonTask.
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
        """Handle a call that a user's own ``__call__`` has passed on to this class.

        :param body: the user's function, which is called only when the lease is acquired.
        """
        with in_guard(self):
            return self._handle(body, args, kwargs)

    def _handle(self, body: Callable[..., R | None], args: Any, kwargs: Any) -> R | None:
        """Handle one message or one direct call of the task.

        :param body: the user's function, which is called only when the lease is acquired.
        """
        with Unbreakable():
            request, is_own = _request_for(self, args, kwargs)
            try:
                result: R | None = self._deliver(request, body, args, kwargs)
                return result
            except ReplacedEagerly as ended:
                # An eager run's replacement is called here, after the run: within the body it would
                # find the lease taken. Celery waits for the replacement's result. In a task, Celery
                # forbids waiting unless it is allowed explicitly.
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
        """Send a message for the task. Arguments, result and errors are those of Celery's method.

        With the option ``enqueue_once``, nothing is sent while another message of this singleton
        is queued; the returned ``AsyncResult`` is that of the queued message. If ``on_conflict`` is
        ``"skip"`` or ``"raise"``, a message whose run is active counts like a queued one.

        These messages are sent in any case:

        - retries, and parts of a chain, group or chord,
        - messages with callbacks or with headers of the caller's own,
        - messages that a run of the same task sends,
        - messages that are sent while the store is unavailable.
        """
        named = {
            "task_id": task_id,
            "producer": producer,
            "link": link,
            "link_error": link_error,
            "shadow": shadow,
        }
        # These arguments are passed by name, because tracing tools that wrap `apply_async` read the
        # keyword arguments; and only if given, because the next class's `apply_async` need not
        # accept all of them.
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
        """Publish a message unless another message of the singleton is queued already.

        :param publish: sends the message. Its optional argument replaces the message's task id.
        :returns: the ``AsyncResult`` of the published message, or of the queued message.
        """
        known = {"expires": self.expires, **options}
        # A message that a run sends asks for the next run. The active run must not suppress it.
        is_own = current_run(self) is not None
        if not is_retry(known) and (is_own or not is_guarded(known)):
            return publish()
        try:
            name = self._name(tuple(args or ()), kwargs or {})
        except Exception as error:
            # Send the message: its arguments may still be right, because the body, or a `__call__`
            # around the body, may accept them. If they are wrong, Celery refuses them itself.
            logger.warning("task %s: sent without enqueue_once: %s", self.name, error)
            return publish()
        key = runtime_of(self.app).key_of(name)
        if is_retry(known):
            return publish_retry(self, key, known, publish)
        brings_another = self._options.on_conflict in BRING_ANOTHER_RUN
        sent = enqueue(self, key, known, publish, brings_another, self._has_ended)
        return self.AsyncResult(sent) if isinstance(sent, str) else sent

    def _has_ended(self, task_id: str) -> bool:
        """Whether the result backend has the result of the task with this id."""
        return is_recorded(self, Context()) and has_result(self, task_id)

    def retry(self, *args: Any, **options: Any) -> Any:
        """Retry the task. The arguments are those of Celery's ``Task.retry``.

        :raises Retry: the retry was sent.
        :raises Reject: the retry could not be sent. The broker redelivers the message, which Celery
            without this package would drop.
        :raises HeartbeatFailed: a newer message asked this run to hand over. A retry would compete
            with that newer message, so none is sent.
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
        """Return the signature with which Celery or this package retries or requeues a message.

        Unlike the signature that Celery itself makes, this signature

        - keeps this package's headers, even if a tracing tool hides them from Celery: without them
          the retry would lose its tick and could not be recognised as a retry,
        - delays the message in the broker if the broker can do that, and for no longer than the
          broker lets a message stay unacknowledged,
        - goes to the queue that the message came from, unless the caller names another queue.

        The parameters are those of Celery's method. Without ``request``, the current request is
        used.

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
        # Celery before 5.7 does not copy the `ignore_result` of the message's sender to a retry.
        if found.__dict__.get("ignore_result") is not None:
            own["ignore_result"] = options.get("ignore_result", found.ignore_result)
        signature = super().signature_from_request(found, args, kwargs, queue, **options | own)
        if is_message(found):
            said = [*options, *(["queue"] if queue else [])]
            try:
                prepare(self, found, signature, said)
            except OperationalError as error:
                # Celery's own retry() also raises Reject when it cannot send the retry.
                raise Reject(error, requeue=False) from error
            except Exception:
                signature.options["headers"].pop(PAUSE_LEFT, None)
                logger.exception(
                    "task %s[%s] is sent again by Celery's own rules, because its queue and delay "
                    "could not be prepared",
                    self.name,
                    found.id,
                )
        return signature

    subtask_from_request = signature_from_request

    def on_replace(self, sig: Any) -> Any:
        """Save the state, then let Celery's ``self.replace()`` send the replacement.

        :param sig: the signature of the task that replaces this one.
        :raises Ignore: the replacement was sent; the body must let this exception pass.
        :raises SingletonError: the state could not be saved; no replacement was sent.
        """
        run = current_run(self)
        if run is None:
            return super().on_replace(sig)
        with run.replacing():
            if self.request.is_eager:
                raise ReplacedEagerly(sig)
            mark_replacement(sig, self.request)
            return super().on_replace(sig)

    def on_become_leader(self) -> None:
        """Override to act at the start of each run.

        The method is called when the lease is acquired and the state is loaded, before the body. An
        error that the method raises ends the run like an error of the body.
        """

    def on_lose_leadership(self) -> None:
        """Override to act at the end of each run, however the run ends.

        The method is called exactly once for each call of :meth:`on_become_leader`, when the run
        ends. With ``on_lease_lost="finish"`` it is called as soon as the lease is lost, in a
        separate thread, while the body goes on. It is not called if the process dies. An error that
        the method raises is logged and does not fail the run.
        """

    def _name(self, args: Any, kwargs: Any) -> str:
        """Return the name of the singleton that these arguments belong to.

        :raises TypeError: the arguments do not fit the body, or cannot be written as JSON.
        """
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
        """Handle a message or a direct call; retry it after an error if the task's options say so.

        :raises SingletonError: the delivery failed. For an eager run that was repeated, this is the
            error of the last try in which the body ran.
        :raises Retry: the message was retried.
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
                    # If the error is of another singleton, the body has called that singleton
                    # directly, and the other singleton has handled its error already.
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
            # Break a reference cycle: the error's traceback refers to frames that refer to the
            # delivery, which would keep the run's state until garbage collection.
            earlier.error = earlier.result = None

    def _answer(self, error: SingletonError, delivery: Delivery) -> bool:
        """Retry the message after an error, if the task's options allow it for the error's reason.

        An eager run is repeated by :meth:`_deliver`, and not retried by Celery. Celery would raise
        ``Retry`` to the code that called the task and expects the error, and would recurse without
        end if ``max_retries`` is ``None``.

        :returns: true if the run is eager and must be repeated; false if the error is final.
        :raises Retry: the retry was sent.
        :raises Reject: the retry could not be sent; the broker redelivers the message.
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
        # A fanout exchange has copied the message. StateLoadFailed means that this copy has not
        # run. Any other error means that this copy has run and the other copies have not, so the
        # retry of this copy does not compete with the other copies.
        is_copy = delivery.is_copy and isinstance(error, StateLoadFailed)
        try:
            # answer_to() has checked the number of retries. Celery must not refuse this retry.
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
            # Celery leaves max_retries on the task, and the body's next retry() would use it.
            forget_max_retries(self)


def _of_run(run: Run, options: dict[str, Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the sending options of a message that a run sends for its own task.

    If the message has the run's task id, it continues the run's work, so the run is marked as not
    final. If the message replaces the run, it gets the run's headers and tick.
    """
    if run.request.id and options.get("task_id") == run.request.id:
        run.is_final = False
    if not run.is_replacing:
        return options
    headers = {**(options.get("headers") or {}), **run.headers, REPLACES: run.request.id}
    return options | {"headers": headers | _continued_tick(run, args, kwargs)}


def _continued_tick(run: Run, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the headers of a run's tick, for the message with which the run replaces itself.

    The tick then ends with that message and not with the run. The result is empty if the message
    is for another singleton of the task, because the tick ends with the run in that case.
    """
    try:
        is_same = run.task._name(tuple(args or ()), kwargs or {}) == run.name
    except Exception:  # the caller may pass arguments that do not fit the task
        is_same = False
    if not is_same:
        return {}
    found = {name: header(run.request, name) for name in (ENTRY, DUE, PREVIOUS, ONE_BY_ONE)}
    headers = {name: value for name, value in found.items() if value is not None}
    run.tick_continues = bool(headers)
    return headers


def _request_for(task: Any, args: Any, kwargs: Any) -> tuple[Context, bool]:
    """Return the request of a call of the task, and whether this function has made the request.

    A message has a request already. A direct call gets a new request, which must be popped at the
    end of the call. Otherwise a direct call from within the task's own body would see the request
    of the body's message, and would count as a second delivery of that message. Celery's
    ``push_request`` does not help: it copies the message's id to the new request.
    """
    request = task.request
    if not request.called_directly:
        run = current_run(task)
        # Compare the ids, because a user's `__call__` can have pushed a copy of the request.
        if run is None or run.request.id != request.id:
            return request, False
    own = Context(args=args, kwargs=kwargs, hostname=request.hostname, headers={})
    TASK_STACK.push(task)
    task.request_stack.push(own)
    return own, True
