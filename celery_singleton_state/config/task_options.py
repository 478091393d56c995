"""What may be written as an option of a singleton task, for type checkers and for people."""

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
    """The options of ``app.task`` in Celery 5.4 to 5.7; its documentation says what they do.

    ``bind`` is not among them: a singleton task is always bound.
    """

    # The task, and how it is made.
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

    # Its messages.
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

    # Its runs.
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

    # Its retries and failures.
    max_retries: int | None
    default_retry_delay: float
    autoretry_for: Collection[type[BaseException]]
    dont_autoretry_for: Collection[type[BaseException]]
    retry_kwargs: Mapping[str, Any]
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    throws: tuple[type[BaseException], ...]

    # Its results.
    backend: Any
    ignore_result: bool | None
    store_eager_result: bool | None
    store_errors_even_if_ignored: bool | None
    resultrepr_maxsize: int

    # Its handlers, called as methods of the task.
    before_start: Callable[..., Any]
    after_return: Callable[..., Any]
    on_success: Callable[..., Any]
    on_retry: Callable[..., Any]
    on_failure: Callable[..., Any]
    on_replace: Callable[..., Any]


class TaskOptions(CeleryOptions, Generic[S], total=False):
    """The options of a singleton task. ``None`` is the same as leaving an option out.

    - ``unique_on``: names of arguments whose values tell singletons of this task apart;
      ``"*"`` for all arguments; a callable that is given the arguments. None: one for the task.
    - ``state_schema``: the type of the state. None: a singleton without state.
    - ``initial_state``: the first state, or a callable that makes it. None: ``state_schema()``.
    - ``state_version``: the version of the schema, from 1, the default.
    - ``state_migrations``: for version n a function from its raw value to that of n + 1.
    - ``state_round_trip``: whether a state is refused that the next load would change, such as a
      set in a field annotated ``list``. Default true. False: what fits the schema is saved, and
      the next run gets what comes of it.
    - ``on_decode_error``: ``"fail"`` (default), or ``"initial"`` to start anew and keep the old
      value under a key of its own.
    - ``persist_on_error``: whether a body that raises saves its state. Default false.
    - ``on_conflict``: what a delivery does that finds the lease taken. ``"skip"`` (default): it
      succeeds with ``None``. ``"raise"``: it fails. ``"wait"``: it is tried again until it gets the
      lease. ``"replace"``: the same, the holder is asked to stop, and a message that waits gives
      up when a newer one comes: it succeeds with ``None``. ``"coalesce"``: it succeeds with
      ``None``, and one more run, with the newest arguments, is sent at the release.
    - ``conflict_timeout``: seconds that a delivery waits for the lease, not counting queues, before
      it fails. None: the setting, 10 s. With ``"replace"`` never less than two heartbeats and 1 s.
    - ``hold_at_least``: seconds from its acquisition that the lease is kept when a run succeeds.
    - ``enqueue_once``: whether a message is not sent while another is queued, or, where
      ``on_conflict`` is ``"skip"`` or ``"raise"``, running. A queued one counts until it expires,
      or 300 s after it may run.
    - ``lease_ttl``: seconds that the lease lives without a renewal. None: heartbeat interval
      times threshold, 8 s by default. A longer life is confirmed before the body begins, by one
      statement more.
    - ``on_lease_lost``: ``"interrupt"`` (default) interrupts the body of a run that lost its lease,
      ``"finish"`` lets it go on. The run ends as :exc:`HeartbeatFailed`, and saves no state,
      either way.
    - ``deduplicate``: whether a message known as done is not run again. None: if there is state.
      A message that is sent anew with an id that was used before is another message.
    - ``retry_reasons``: the reasons that are retried. Default ``StateLoadFailed`` and
      ``StatePersistFailed``.
    - ``retry_policy``: a :class:`RetryPolicy` for single reasons. Others follow the task's
      ``max_retries``, ``retry_backoff``, ``retry_backoff_max`` and ``retry_jitter``.
    - ``expected_interval``: seconds, or a timedelta, between runs as they should be: one that has
      not finished within that, times ``singleton_heartbeat_threshold``, is not healthy. None: it
      is always healthy.

    All options of Celery's own (:class:`CeleryOptions`) apply, too. A type checker refuses other
    names; attributes of your own go into a base class, or into a subclass of this one.
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
    #: The hooks of the lease, called as methods of the task.
    on_become_leader: Callable[..., Any]
    on_lose_leadership: Callable[..., Any]
