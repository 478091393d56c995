"""The options of a singleton task as typed dictionaries, for type checkers and for readers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, Generic, Literal, TypedDict

from kombu import Exchange, Queue
from typing_extensions import TypeVar

from celery_singleton_state.state.codec import Migration

from .retry import RetryPolicy

S = TypeVar("S", default=Any)

OnConflict = Literal["skip", "wait", "raise", "replace", "coalesce"]
OnDecodeError = Literal["fail", "initial"]
OnLeaseLost = Literal["interrupt", "finish"]


class CeleryOptions(TypedDict, total=False):
    """The options of ``app.task`` in Celery 5.4 to 5.7. Celery's documentation explains them.

    ``bind`` is left out, because a singleton task is always bound.
    """

    # Options about the task itself, and about how Celery creates it.
    name: str
    shared: bool
    lazy: bool
    filter: Callable[[Any], Any] | None
    typing: bool | None
    pydantic: bool
    pydantic_strict: bool
    pydantic_context: dict[str, Any] | None
    pydantic_dump_kwargs: dict[str, Any] | None
    abstract: bool
    Strategy: str | Callable[..., Any]
    Request: str | type[Any]

    # Options of the task's messages.
    serializer: str | None
    compression: str | None
    queue: str | Queue | None
    exchange: str | Exchange | None
    exchange_type: str | None
    routing_key: str | None
    delivery_mode: int | str | None
    immediate: bool | None
    mandatory: bool | None
    priority: int | None
    expires: float | datetime | None

    # Options of the task's runs.
    rate_limit: str | float | None
    time_limit: float | None
    soft_time_limit: float | None
    acks_late: bool | None
    acks_on_failure_or_timeout: bool | None
    acks_on_failure: bool | None
    acks_on_timeout: bool | None
    reject_on_worker_lost: bool | None
    retry_on_worker_lost: bool | None
    track_started: bool | None
    send_events: bool
    trail: bool

    # Options of the task's retries and failures.
    max_retries: int | None
    default_retry_delay: float
    autoretry_for: Collection[type[BaseException]]
    dont_autoretry_for: Collection[type[BaseException]]
    retry_kwargs: Mapping[str, Any]
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    throws: tuple[type[BaseException], ...]

    # Options of the task's results.
    backend: Any
    ignore_result: bool | None
    store_eager_result: bool | None
    store_errors_even_if_ignored: bool | None
    resultrepr_maxsize: int

    # Handlers that Celery calls as methods of the task.
    before_start: Callable[..., Any]
    after_return: Callable[..., Any]
    on_success: Callable[..., Any]
    on_retry: Callable[..., Any]
    on_failure: Callable[..., Any]
    on_replace: Callable[..., Any]


class TaskOptions(CeleryOptions, Generic[S], total=False):
    """The options of a singleton task. An option that is ``None`` counts as left out.

    Which runs exclude each other:

    - ``unique_on``: names of arguments. Calls with different values of these arguments belong to
      different singletons. ``"*"``: all arguments. A callable: it is called with the task's
      arguments, and its result tells singletons apart. Left out: the task is one singleton.

    The state:

    - ``state_schema``: the type of the state. Left out: the singleton has no state.
    - ``initial_state``: the state of a singleton that has never saved one, or a callable that makes
      it. Left out: ``state_schema()``.
    - ``state_version``: the version of the schema, 1 or more. Left out: 1.
    - ``state_migrations``: a dict from versions to functions. The function for version n converts
      a raw value (decoded JSON) of version n to version n + 1.
    - ``state_round_trip``: true (the default) refuses a state that the next load would change, such
      as a set in a field annotated ``list``. False saves each state that fits the schema.
    - ``on_decode_error``: what happens if the stored value cannot be read. ``"fail"`` (the
      default): the run fails. ``"initial"``: the run begins with the initial state, and the old
      value is kept under another key.
    - ``persist_on_error``: whether the state is saved when the body raises. Default: false.

    Conflicts:

    - ``on_conflict``: what a delivery does if another run has the lease, or if the lease is kept
      for a hold period after a run (``hold_at_least``).

      - ``"skip"`` (the default): it succeeds with ``None``.
      - ``"raise"``: it fails.
      - ``"wait"``: it is tried again until it acquires the lease, or ``conflict_timeout`` is over.
      - ``"replace"``: it asks the holder to stop, and is tried again until it acquires the lease.
        When a newer message arrives, an older one that waits succeeds with ``None``.
      - ``"coalesce"``: it succeeds with ``None``. The holder sends one more run when it releases
        the lease, with the arguments of the newest message.

    - ``conflict_timeout``: seconds that a delivery waits for the lease before it fails; time in a
      queue does not count. Left out: ``singleton_conflict_timeout``, 10 s by default. With
      ``"replace"`` the timeout is at least two heartbeat intervals plus 1 s.
    - ``hold_at_least``: if the run succeeds, the lease is kept for at least this many seconds,
      counted from the acquisition. Left out: the lease is released at the end of the run.
    - ``enqueue_once``: if true, no message is sent while another message is queued. With
      ``on_conflict`` ``"skip"`` or ``"raise"``, no message is sent during a run, either. A message
      counts as queued until its run begins or it ends without a run, but not beyond its expiry, and
      for at most 300 s from the time when it may run. Default: false.

    The lease:

    - ``lease_ttl``: the life of the lease, in seconds: the lease expires after this time without a
      renewal. Left out: heartbeat interval times threshold, 8 s by default. If ``lease_ttl`` is
      longer than this product, each run needs one more statement before its body.
    - ``on_lease_lost``: what happens to the body of a run that has lost its lease. ``"interrupt"``
      (the default): the body is interrupted. ``"finish"``: the body goes on. In both cases the run
      saves no state and ends as :exc:`HeartbeatFailed`.

    Duplicates, retries and health:

    - ``deduplicate``: if true, a message whose work is already done does not run again. Left out:
      true for ticks of beat, and for a task with state. A new message that ``apply_async`` sends
      with an earlier message's task id is new work.
    - ``retry_reasons``: the names of the error reasons (:class:`SingletonErrorReason`) after which
      a message is retried. Left out: ``StateLoadFailed`` and ``StatePersistFailed``.
    - ``retry_policy``: a dict that maps the names of error reasons to :class:`RetryPolicy`. For all
      other reasons, the task's ``max_retries``, ``retry_backoff``, ``retry_backoff_max`` and
      ``retry_jitter`` apply.
    - ``expected_interval``: the time between two runs, in seconds or as a timedelta. A singleton
      that has not finished a run within this time, multiplied by
      ``singleton_heartbeat_threshold``, is unhealthy. Left out: the singleton is always healthy.

    All options of Celery itself (:class:`CeleryOptions`) apply, too. A type checker refuses other
    names. To use attributes of your own, put them into a base class of the task, or into a subclass
    of this typed dictionary.
    """

    unique_on: Collection[str] | Callable[..., Any] | None
    state_schema: type[S] | None
    initial_state: S | Callable[[], S] | None
    state_version: int | None
    state_migrations: Mapping[int, Migration] | None
    state_round_trip: bool | None
    on_decode_error: OnDecodeError | None
    persist_on_error: bool | None
    on_conflict: OnConflict | None
    conflict_timeout: float | None
    hold_at_least: float | None
    enqueue_once: bool | None
    lease_ttl: float | None
    on_lease_lost: OnLeaseLost | None
    deduplicate: bool | None
    retry_reasons: Collection[str] | None
    retry_policy: Mapping[str, RetryPolicy] | None
    expected_interval: float | timedelta | None
    #: A method of the task that is called when a run acquires its lease, and another one that is
    #: called when the run ends.
    on_become_leader: Callable[..., Any]
    on_lose_leadership: Callable[..., Any]
