"""Every use of a private or undocumented part of another library, in one place.

Each entry, a constant or a function, uses such a part. The entry says what happens if a release of
the library lacks the part. When a library has a new release, run
tests/unit/test_compat.py with that release: the test of an entry fails if the release lacks the
part. Unless an entry says otherwise, its part was read in the source of these releases:

- Celery 5.4.0, 5.5.3, 5.6.2 and 5.7.0; kombu 5.4.2, 5.5.4, 5.6.2 and 5.7.0,
- billiard 4.2.0, 4.2.1, 4.2.2 and 4.3.2; django-celery-beat 2.7.0 and 2.9.0,
- SQLAlchemy 2.0.36, 2.0.44 and 2.1.9; Alembic 1.13.3, 1.16.5 and 1.20.1,
- PyMySQL 1.1.1, 1.1.2 and 1.2.4; psycopg 3.2.9 and 3.3.9; redis-py 5.2.1, 6.4.0 and 8.1.0.

Two undocumented parts of Celery are used outside this module, because a function in this module
would cost each run one more call: ``task.request_stack``, and the ``__dict__`` of a request, in
which Celery keeps a message's headers as attributes. test_compat.py tests both, too.

Undocumented parts of CPython are not in this module either, because they change with Python and not
with a library: ``run/interrupt.py`` uses asynchronous exceptions, frames and the locks of
``logging``, and ``store/sql/sqlite.py`` adds a reference to an object and never releases it.
"""

from __future__ import annotations

import heapq
import re
import traceback
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from operator import attrgetter
from types import CellType, CodeType, FunctionType
from typing import Any

from celery import beat, schedules
from celery._state import _task_stack  # type: ignore[attr-defined]  # missing in celery-types
from celery.app import base, utils
from celery.canvas import _chain
from celery.concurrency.base import BasePool
from kombu import serialization

try:
    from kombu.transport import native_delayed_delivery
except ImportError:  # before kombu 5.5
    native_delayed_delivery = None  # type: ignore[assignment]

#: Maps each library class from which this package derives a class to the private or undocumented
#: attributes that the derived class overrides or sets, each with the reason. If a release of the
#: library lacks such an attribute: the library ignores the derived class's attribute.
OVERRIDDEN: Mapping[str, Mapping[str, str]] = {
    "celery.beat:Scheduler": {
        "_heap": "None has Celery sort its entries again; SingletonScheduler's items are different",
        "_do_sync": "an error while the schedule is stored must not end a tick that was sent",
        "_ensure_connected": "tries each address of the broker once instead of for minutes",
    },
    "celery.events.receiver:EventReceiver": {
        "_receive": "an event that cannot be read must not end the receiver",
    },
    "pymysql.connections:Connection": {
        "query": "records whether a statement was interrupted; public, but not documented",
        "next_result": "records whether a further statement of one text was interrupted",
    },
    "psycopg:Connection": {
        "wait": "notices when the server does not answer; public, but not documented",
    },
}

# -- Celery: tasks and messages

#: Celery's stack of the tasks that this thread runs, the innermost last. A direct call pushes its
#: task, so that ``current_task`` is the called task. If a Celery release lacks ``_task_stack``:
#: this package cannot be imported.
TASK_STACK = _task_stack

#: The class of all chains, for ``isinstance``: ``chain(...)`` and ``a | b`` return its instances,
#: and never instances of its subclass ``celery.chain``. If a Celery release lacks ``_chain``: this
#: package cannot be imported.
Chain = _chain


def custom_attributes(request: Any) -> dict[str, Any]:
    """Return the attributes of a request that Celery does not define.

    These are the message's custom headers, and attributes that user code has set.

    If a Celery release lacks ``Context._get_custom_headers``: a message cannot be sent again.
    """
    return request._get_custom_headers(request.__dict__) or {}


def sending_options(task: Any) -> dict[str, Any]:
    """Return the sending options that ``apply_async`` takes from the task, such as its queue.

    If a Celery release lacks ``Task._get_exec_options``: a message cannot be sent again.
    """
    options: dict[str, Any] = task._get_exec_options()
    return options


def forget_max_retries(task: Any) -> None:
    """Remove the limit that ``Task.retry(max_retries=...)`` leaves on the task.

    Celery would apply this limit to later retries. If a Celery release lacks
    ``Task.override_max_retries``: there is no limit to remove.
    """
    vars(task).pop("override_max_retries", None)


def is_made_by_decorator(task: type) -> bool:
    """Whether the decorator ``@app.task`` has made this task class, and not a ``class`` statement.

    The decorator sets the attribute ``_decorated`` (in ``Celery._task_from_fun``). If a Celery
    release does not set ``_decorated``: the result is false, and a task with ``base=SingletonTask``
    does not inherit from the app's own task class.
    """
    return "_decorated" in vars(task)


def without_app(of_app: Any, app: Any) -> Any:
    """Return the task class from which Celery has derived ``app.Task``: the app's ``task_cls``.

    Celery sets the attribute ``_app`` in the derived class. If a Celery release does not set
    ``_app``: ``app.Task`` itself is returned.

    :param of_app: ``app.Task``.
    """
    return of_app.__bases__[0] if vars(of_app).get("_app") is app else of_app


def converter_in(wrapper: Any) -> Callable[..., Any] | None:
    """Return a function that converts arguments as Celery does for a task with ``pydantic=True``.

    Celery wraps the body of such a task: the wrapper converts the arguments and calls ``task_fun``,
    a variable in its closure that holds the body. The returned function is a copy of the wrapper
    with another ``task_fun``, which returns the converted arguments. A wrapper is recognised by its
    globals, which are the globals of ``celery.app.base``.

    Celery 5.4 has no such wrapper. The wrapper was read in Celery 5.5.3 to 5.7.0.

    :param wrapper: the ``run`` of a task, which need not be a wrapper.
    :returns: ``None`` if ``wrapper`` is not such a wrapper.
    :raises LookupError: the closure of the wrapper has no ``task_fun``.
    """
    code = getattr(wrapper, "__code__", None)
    if code is None or wrapper.__globals__ is not vars(base):
        return None
    cells = dict(zip(code.co_freevars, wrapper.__closure__ or (), strict=True))
    if "task_fun" not in cells:
        raise LookupError("task_fun")
    cells["task_fun"] = CellType(lambda *args, **kwargs: (args, kwargs))
    return FunctionType(code, wrapper.__globals__, closure=tuple(cells.values()))


def serializer_names() -> Mapping[str, str]:
    """Return a dict that maps content types to the names of kombu's serializers.

    If a kombu release lacks ``registry.type_to_name``: a message cannot be sent again.
    """
    registry: Any = serialization.registry  # type: ignore[attr-defined]  # missing in celery-types
    names: Mapping[str, str] = registry.type_to_name
    return names


# -- Celery: workers and their pools


def cannot_end_jobs(error: NotImplementedError) -> bool:
    """Whether an error comes from a pool of Celery's that cannot end a running job.

    The error is recognised by the function that raised it, ``BasePool.terminate_job``. If a Celery
    release lacks that function: an ``AttributeError`` is raised.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_code is BasePool.terminate_job.__code__


def process_pool(worker: Any) -> Any:
    """Return billiard's pool of a prefork worker; ``None`` before Celery has made the pool.

    If a Celery release lacks ``TaskPool._pool``: the result is ``None``, and the worker cannot
    start.
    """
    return getattr(worker.pool, "_pool", None)


def processes_of(worker: Any) -> list[Any]:
    """Return the processes of a prefork worker's pool; none before its start and after its end.

    If a billiard release lacks ``Pool._pool``: the result is empty, and the processes renew their
    own leases.
    """
    return list(getattr(process_pool(worker), "_pool", None) or ())


def watch_processes(pool: Any, watch: Callable[[Any], object]) -> None:
    """Call a function with each present and each future process of billiard's pool.

    The method ``Pool._create_worker_process`` is replaced in this pool, and ``Pool._pool`` is read.
    If a billiard release lacks one of the two: the worker cannot start.
    """
    make = pool._create_worker_process

    def make_and_watch(i: int) -> Any:
        process = make(i)
        watch(process)
        return process

    pool._create_worker_process = make_and_watch
    for process in list(pool._pool):
        watch(process)


def replace_dead(pool: Any) -> None:
    """Make billiard's pool replace its dead processes now, and not only at its next check.

    If a billiard release lacks ``Pool.maintain_pool``: the worker ends when a process of its pool
    has died.
    """
    pool.maintain_pool()


def call_when_readable(hub: Any, descriptor: int, callback: Callable[..., Any], *args: Any) -> None:
    """Make a worker's event loop call a function when a file descriptor is readable.

    Celery passes the event loop, kombu's ``Hub``, to the method ``register_with_event_loop`` of a
    worker's step. The function is for a descriptor that becomes readable when a process of the pool
    has died. If a Celery release does not call the step's method: a dead process is replaced only
    at Celery's own next check. If a kombu release lacks ``Hub.add_reader``: the worker cannot
    start.
    """
    hub.add_reader(descriptor, callback, *args)


def before_growth(pool: Any, callback: Callable[[int], object]) -> None:
    """Call a function with the new size of a pool of greenlets, each time before the pool grows.

    Celery calls the pool's method ``grow`` for ``--autoscale`` and for the remote control command
    ``pool_grow``. The method is replaced in this pool; ``num_processes`` is the pool's present
    size. If a Celery release lacks ``grow``: the function is never called. If the release lacks
    ``num_processes``: an error is raised when the pool should grow.
    """
    grow = getattr(pool, "grow", None)
    if grow is None:
        return  # a pool of threads, which has no grow() because it cannot grow

    def call_and_grow(n: int = 1) -> Any:
        callback(pool.num_processes + n)
        return grow(n)

    pool.grow = call_and_grow


# -- Celery's beat and its schedules

#: The code of Celery's functions that evaluate an entry's lazy arguments (``BeatLazyFunc``). An
#: error that this code raises is the entry's fault, and not the broker's. If a Celery release lacks
#: the functions: beat tries the failed tick of such an entry again and again, and does not go on
#: to the entry's next tick.
LAZY_ARGUMENTS: frozenset[CodeType] = frozenset(
    getattr(beat, name).__code__
    for name in ("_evaluate_entry_args", "_evaluate_entry_kwargs")
    if hasattr(beat, name)
)

#: The methods with which Celery computes the next due time of a crontab. A subclass that overrides
#: one of them has due times of its own. If a Celery release lacks a method: no subclass counts as
#: overriding it.
CRONTAB_METHODS = ("remaining_estimate", "remaining_delta", "_delta_to_next", "now")

#: Attributes that a schedule gets from its app. A schedule's canonical text leaves them out,
#: because they do not make two schedules differ. If a Celery release renames or adds such an
#: attribute: beats treat all schedules as changed, once.
SCHEDULE_OF_APP = frozenset({"app", "_app", "nowfun", "tz", "utc_enabled"})
_CRON_FIELDS = ("minute", "hour", "day_of_week", "day_of_month", "month_of_year")
#: Maps each schedule class of Celery's to the attributes that a schedule computes from its
#: arguments. The canonical text of a schedule leaves these attributes out, because the text
#: contains the arguments. If a Celery release renames or adds such an attribute: beats treat all
#: schedules as changed, once.
SCHEDULE_ATTRIBUTES: Mapping[Any, frozenset[str]] = {
    schedules.crontab: frozenset(
        {*_CRON_FIELDS, *(f"_orig_{field}" for field in _CRON_FIELDS), "_orig_kwargs"}
    ),
    schedules.solar: frozenset(
        {"event", "lat", "lon", "ephem", "cal", "method", "use_center"},
    ),
    schedules.schedule: frozenset({"run_every", "relative"}),
}


def put_off(scheduler: Any, wait_for: Callable[[str], float]) -> None:
    """Postpone entries in the heap of Celery's scheduler.

    If a Celery release lacks ``Scheduler._heap`` or ``Scheduler._when``: an error is raised each
    time the scheduler looks for due entries.

    :param wait_for: a function that takes an entry's name and returns the seconds from now until
        the entry is checked again; 0 leaves the entry where it is.
    """
    heap = scheduler._heap
    for index, event in enumerate(heap):
        if wait := wait_for(event.entry.name):
            heap[index] = event._replace(time=scheduler._when(event.entry, wait))
    heapq.heapify(heap)


def take_connection(scheduler: Any) -> Any:
    """Remove a scheduler's connection and producer, so that the next message makes new ones.

    Both are cached properties of the scheduler, whose values kombu keeps in the scheduler's
    ``__dict__``. If a kombu release keeps them elsewhere: ``None`` is returned, and the old
    connection stays in use.

    :returns: the removed connection; ``None`` if there was none.
    """
    vars(scheduler).pop("producer", None)
    return vars(scheduler).pop("connection", None)


def read_schedule_anew(scheduler: Any) -> None:
    """Make django-celery-beat's scheduler, or a scheduler derived from it, reload its database.

    If a django-celery-beat release lacks ``_initial_read``: the scheduler reloads its database only
    when it notices a change.
    """
    scheduler._initial_read = True


def note_changed(scheduler: Any, name: str) -> None:
    """Make django-celery-beat's scheduler write an entry at its next ``sync``.

    Nothing happens if the scheduler is of another kind, or if a django-celery-beat release lacks
    ``_dirty``.
    """
    changed: set[str] = getattr(scheduler, "_dirty", set())
    changed.add(name)


# -- kombu: brokers

#: kombu's module for delayed messages that RabbitMQ keeps until they are due, so that no worker has
#: to keep them; ``None`` before kombu 5.5. The names ``MAX_NUMBER_OF_BITS_TO_USE``, ``MAX_LEVEL``,
#: ``level_name``, ``calculate_routing_key`` and ``CELERY_DELAYED_DELIVERY_EXCHANGE`` of the module
#: are used. If a kombu release lacks one of the names: for each delayed message an error is logged.
#: A retry is then delayed by Celery's own rules, and a message that was to be sent again is
#: redelivered by its broker.
native_delays = native_delayed_delivery
#: Matches the names of the exchanges through which RabbitMQ delays messages. Since kombu 5.7 an app
#: can choose a prefix for the names. If a kombu release names the exchanges differently: a delayed
#: message that is sent again goes to the default queue.
DELAYING_EXCHANGE = re.compile(r"(?:.+_)?celery_delayed_(?:\d+|delivery)")
#: Matches the part of a delayed message's routing key in which kombu writes the delay, in bits. If
#: a kombu release writes the delay differently: a delayed message that is sent again goes to the
#: default queue.
DELAY = re.compile(r"(?:[01]\.){28}")


def broker_of(app: Any) -> Any:
    """Return a connection of an app that is not opened, to read the app's broker configuration.

    If a kombu release lacks ``ProducerPool.connections`` or ``ConnectionPool.connection``: when a
    message is sent again, an error is logged, and the message is sent by Celery's own rules.
    """
    return app.producer_pool.connections.connection


def transport_of(connection: Any) -> str:
    """Return the name of a connection's transport, such as ``redis``.

    If a kombu release lacks ``Connection.transport_cls``: the result is an empty text.
    """
    return str(getattr(connection, "transport_cls", ""))


def hide_in_reports(names: re.Pattern[str]) -> None:
    """Make ``celery report`` hide the values of settings whose names match a pattern.

    Celery's own filter, ``celery.app.utils.filter_hidden_settings``, does not hide a value that is
    a dict: it hides an item of the dict only if the item's own name matches. So the filter is
    replaced by a function that hides such values, too. If a Celery release does not call the
    filter: a URL that was set as a dict by mistake is shown in the report. If a Celery release
    lacks the filter: this package cannot be imported.
    """
    others = utils.filter_hidden_settings

    @wraps(others)
    def filter_hidden_settings(conf: Any) -> Any:
        found = {
            name: "********" if isinstance(name, str) and names.search(name) else value
            for name, value in conf.items()
        }
        return others(found)

    utils.filter_hidden_settings = filter_hidden_settings


# -- Stores


def allow_connections(pool: Any, connections: int) -> None:
    """Raise the size of a connection pool of SQLAlchemy's (``QueuePool``).

    If an SQLAlchemy release lacks the pool's ``_overflow_lock``, ``_pool.maxsize`` or
    ``_overflow``: an error is raised when a worker starts.

    :param connections: the new size; a size that is smaller than the present one changes nothing.
    """
    with pool._overflow_lock:
        more = max(0, connections - pool.size())
        pool._pool.maxsize += more
        # SQLAlchemy computes the number of open connections as size + overflow. The size has grown
        # and the number has not, so the overflow must shrink.
        pool._overflow -= more


def refuse_returns(pool: Any) -> None:
    """Have a connection pool of SQLAlchemy's (``QueuePool``) close each connection that is returned
    from now on.

    The pool keeps returned connections in a queue. If the queue is full, the pool closes the
    connection instead. This function replaces the queue's method ``_full``, so that the queue
    counts as full from now on. The queue calls ``_full`` while it holds its lock, so no connection
    slips in.

    If an SQLAlchemy release lacks ``_full``: a connection that is returned to a disposed pool stays
    open until Python collects the pool as garbage.
    """
    pool._pool._full = lambda: True


def upgrade_steps(script: Any, revision: Any) -> Any:
    """Return the migration steps from a revision to the newest one.

    The steps are for Alembic's ``EnvironmentContext(fn=...)``. The method that returns them,
    ``ScriptDirectory._upgrade_revs``, is also used by ``alembic.command.upgrade``. If an Alembic
    release lacks the method: ``celery singleton migrate`` fails.
    """
    return script._upgrade_revs("head", revision)


def close_silently(connection: Any) -> None:
    """Close the socket of a PyMySQL connection without sending the server anything.

    If a PyMySQL release lacks ``Connection._force_close``: a forked child keeps its copy of the
    socket open, without using it.
    """
    connection._force_close()


#: A property for PyMySQL's connections: the seconds for which a statement waits for its answer;
#: ``None``: no limit. The limit can be changed between two statements. If a PyMySQL release lacks
#: ``Connection._read_timeout``: a body's own statements in ``transaction()`` have the time limit of
#: the store's statements.
read_timeout = property(
    attrgetter("_read_timeout"),
    lambda connection, seconds: setattr(connection, "_read_timeout", seconds),
)


def redis_connection(client: Any, left_out: Collection[str] = ()) -> Any:
    """Make a new connection with the options of a redis-py client, outside the client's pool.

    The function reads the pool's ``connection_class`` and ``connection_kwargs``. The callers use
    the connection's ``connect``, ``send_command``, ``read_response``, ``can_read`` and
    ``disconnect``. If a redis-py release lacks one of these: an error is raised, and no lease in
    Redis can be acquired.

    :param left_out: names of the client's options that the connection is made without.
    """
    pool = client.connection_pool
    given = {name: own for name, own in pool.connection_kwargs.items() if name not in left_out}
    return pool.connection_class(**given)
