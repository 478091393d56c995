"""Every use of a private or undocumented part of another library, in one place.

When one of these libraries has a new release, read this module and run tests/unit/test_compat.py
with that release: the test of an entry fails if the release lacks the part. Each part was read in

- Celery 5.4.0, 5.5.3, 5.6.2 and 5.7.0; kombu 5.4.2, 5.5.4, 5.6.2 and 5.7.0,
- billiard 4.2.0, 4.2.1, 4.2.2 and 4.3.2; django-celery-beat 2.7.0 and 2.9.0,
- SQLAlchemy 2.0.36, 2.0.44 and 2.1.9; Alembic 1.13.3, 1.16.5 and 1.20.1,
- PyMySQL 1.1.1, 1.1.2 and 1.2.4; psycopg 3.2.9 and 3.3.9; redis-py 5.2.1, 6.4.0 and 8.1.0,

unless an entry says otherwise. An entry also says what happens if a release lacks its part.

Two undocumented parts of Celery are used outside this module, because a function here would cost
each run one more call: ``task.request_stack``, and the ``__dict__`` of a request, in which Celery
keeps a message's headers as attributes. test_compat.py tests them, too.

Undocumented parts of CPython are not here either, because they change with Python and not with a
library: ``run/interrupt.py`` uses asynchronous exceptions, frames and the locks of ``logging``,
and ``store/sql/sqlite.py`` relies on a reference that is never dropped.
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

#: By class of a library: the private or undocumented names that this package's subclass of it
#: overrides or sets, and why. (The code itself is in the subclasses.) If a release lacks a name,
#: the library no longer calls or reads it.
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
        "next_result": "records it for the further statements of one text",
    },
    "psycopg:Connection": {
        "wait": "notices when the server does not answer; public, but not documented",
    },
}

# -- Celery: tasks and messages

#: The stack of the tasks that this thread runs, the innermost last. A direct call pushes its task,
#: so that ``current_task`` is right. If a release lacks it: the package cannot be imported.
TASK_STACK = _task_stack

#: The class of the objects that ``chain(...)`` and ``a | b`` return; ``celery.chain`` is a subclass
#: without instances. If a release lacks it: the package cannot be imported.
Chain = _chain


def custom_attributes(request: Any) -> dict[str, Any]:
    """Return the attributes of a request that Celery does not define.

    These are the message's custom headers, and attributes that user code has set.
    (``Context._get_custom_headers``.)

    If a release lacks it: a message with custom headers cannot be sent again.
    """
    return request._get_custom_headers(request.__dict__) or {}


def sending_options(task: Any) -> dict[str, Any]:
    """Return the sending options that ``apply_async`` takes from the task, such as its queue.

    (``Task._get_exec_options``.) If a release lacks it: a message cannot be sent again.
    """
    options: dict[str, Any] = task._get_exec_options()
    return options


def forget_max_retries(task: Any) -> None:
    """Remove the number that ``Task.retry(max_retries=...)`` leaves on the task.

    Celery would apply it to later retries. (``Task.override_max_retries``.) If a release lacks it:
    there is nothing to remove.
    """
    vars(task).pop("override_max_retries", None)


def is_made_by_decorator(task: type) -> bool:
    """Whether the decorator ``@app.task`` has made this task class.

    The result is false for a class that a ``class`` statement has made. (``_decorated``, which
    ``Celery._task_from_fun`` sets.) If a release lacks it: false, and a task with
    ``base=SingletonTask`` does not inherit from the app's own task class.
    """
    return "_decorated" in vars(task)


def without_app(of_app: Any, app: Any) -> Any:
    """Return the task class from which Celery has derived an app's ``app.Task``.

    (``_app``.) If a release lacks it: ``app.Task`` itself.

    :param of_app: ``app.Task``.
    """
    return of_app.__bases__[0] if vars(of_app).get("_app") is app else of_app


def converter_in(wrapper: Any) -> Callable[..., Any] | None:
    """Return a function that converts arguments as Celery does for a task with ``pydantic=True``.

    Celery wraps the body of such a task in a function that converts the arguments and calls the
    body, which is ``task_fun`` in the wrapper's closure. This is a copy of that wrapper with
    another ``task_fun``, which returns the converted arguments. The wrapper is recognised by its
    globals, which are those of ``celery.app.base``. Read in Celery 5.5.3 to 5.7.0; Celery 5.4 has
    no such wrapper.

    :returns: ``None`` if the function is not such a wrapper.
    :raises LookupError: the wrapper's closure has no ``task_fun``.
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
    """Return the names of kombu's serializers by content type. (``registry.type_to_name``.)

    If a release lacks it: a message cannot be sent again.
    """
    registry: Any = serialization.registry  # type: ignore[attr-defined]  # missing in celery-types
    names: Mapping[str, str] = registry.type_to_name
    return names


# -- Celery: workers and their pools


def cannot_end_jobs(error: NotImplementedError) -> bool:
    """Whether an error comes from a pool of Celery's that cannot end a running job.

    It is recognised by the function that raised it, ``BasePool.terminate_job``. If a release lacks
    that function: an ``AttributeError``.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_code is BasePool.terminate_job.__code__


def process_pool(worker: Any) -> Any:
    """Return billiard's pool of a prefork worker; ``None`` before Celery has made it.

    (``TaskPool._pool``.) If a release lacks it: ``None``, and the worker ends at its start.
    """
    return getattr(worker.pool, "_pool", None)


def processes_of(worker: Any) -> list[Any]:
    """Return the processes of a prefork worker's pool; none before its start and after its end.

    (``Pool._pool``.) If a release lacks it: none, and the processes renew their own leases.
    """
    return list(getattr(process_pool(worker), "_pool", None) or ())


def watch_processes(pool: Any, watch: Callable[[Any], object]) -> None:
    """Call a function with each present and each future process of billiard's pool.

    (``Pool._create_worker_process``, which is replaced on the pool, and ``Pool._pool``.)

    If a release lacks them: the worker ends at its start.
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
    """Make billiard's pool replace its dead processes now. (``Pool.maintain_pool``.)

    If a release lacks it: the worker ends when a process of its pool has died.
    """
    pool.maintain_pool()


def call_when_readable(hub: Any, descriptor: int, callback: Callable[..., Any], *args: Any) -> None:
    """Make a worker's event loop call a function when a file descriptor is readable.

    (``Hub.add_reader``. Celery passes the hub to ``register_with_event_loop`` of a worker's step.)

    If a release lacks ``add_reader``: the worker ends at its start. If Celery no longer calls
    ``register_with_event_loop``: Celery replaces dead processes only at its own next check.
    """
    hub.add_reader(descriptor, callback, *args)


def before_growth(pool: Any, callback: Callable[[int], object]) -> None:
    """Call a function each time before a pool of greenlets grows, with the pool's new size.

    (``grow``, which is replaced on the pool, and ``num_processes``.) Celery calls ``grow`` for
    ``--autoscale`` and for the remote control command ``pool_grow``. If a release lacks it: nothing
    is called.
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
#: error raised within them is the entry's fault, and not the broker's. If a release lacks them:
#: beat tries such an entry again and again, and not only at its next tick.
LAZY_ARGUMENTS: frozenset[CodeType] = frozenset(
    getattr(beat, name).__code__
    for name in ("_evaluate_entry_args", "_evaluate_entry_kwargs")
    if hasattr(beat, name)
)

#: The methods by which Celery computes the next due time of a crontab: a subclass that overrides
#: one of them has due times of its own. If a release lacks one: no subclass overrides it.
CRONTAB_METHODS = ("remaining_estimate", "remaining_delta", "_delta_to_next", "now")

#: Attributes of schedules that do not make two schedules differ, so that a schedule's canonical
#: text leaves them out: those that come from the app, and then by class of Celery's those that it
#: computes from the schedule's arguments. If a release renames one or adds one: beats once take all
#: their schedules for changed.
SCHEDULE_OF_APP = frozenset({"app", "_app", "nowfun", "tz", "utc_enabled"})
_CRON_FIELDS = ("minute", "hour", "day_of_week", "day_of_month", "month_of_year")
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
    """Postpone entries in the heap of Celery's scheduler. (``_heap``, ``_when``.)

    :param wait_for: returns, for an entry's name, the seconds from now until the entry is checked
        again; 0 leaves the entry where it is.

    If a release lacks them: an error in each tick of the scheduler.
    """
    heap = scheduler._heap
    for index, event in enumerate(heap):
        if wait := wait_for(event.entry.name):
            heap[index] = event._replace(time=scheduler._when(event.entry, wait))
    heapq.heapify(heap)


def take_connection(scheduler: Any) -> Any:
    """Remove a scheduler's connection and producer, so that the next message makes new ones.

    They are cached properties, whose values kombu keeps in ``__dict__``.

    :returns: the connection; ``None`` if there is none. If kombu keeps it elsewhere in a new
        release: ``None``, and the old connection stays in use.
    """
    vars(scheduler).pop("producer", None)
    return vars(scheduler).pop("connection", None)


def read_schedule_anew(scheduler: Any) -> None:
    """Make django-celery-beat's scheduler, or a scheduler derived from it, reload its database.

    (``_initial_read``.) If a release lacks it: the scheduler reloads when it notices a change.
    """
    scheduler._initial_read = True


def note_changed(scheduler: Any, name: str) -> None:
    """Make django-celery-beat's scheduler write an entry at its next ``sync``. (``_dirty``.)

    If a release lacks it, and with other scheduler classes: nothing happens.
    """
    changed: set[str] = getattr(scheduler, "_dirty", set())
    changed.add(name)


# -- kombu: brokers

#: kombu's module for messages that RabbitMQ itself delays; ``None`` before kombu 5.5. Its
#: ``MAX_NUMBER_OF_BITS_TO_USE``, ``MAX_LEVEL``, ``level_name``, ``calculate_routing_key`` and
#: ``CELERY_DELAYED_DELIVERY_EXCHANGE`` are used. If a release lacks one of them: an error is logged
#: when a message is delayed, and the message is sent by Celery's rules or stays with its broker.
native_delays = native_delayed_delivery
#: The names of that module's exchanges (since kombu 5.7 an app can choose a prefix), and the part
#: of a routing key in which it writes the delay. If a release changes them: a delayed message that
#: is sent again goes to the default queue.
DELAYING_EXCHANGE = re.compile(r"(?:.+_)?celery_delayed_(?:\d+|delivery)")
DELAY = re.compile(r"(?:[01]\.){28}")


def broker_of(app: Any) -> Any:
    """Return the object with an app's broker configuration, without connecting to the broker.

    (``ProducerPool.connections`` and ``ConnectionPool.connection``.)

    If a release lacks them: an error is logged, and the message is sent by Celery's rules.
    """
    return app.producer_pool.connections.connection


def transport_of(connection: Any) -> str:
    """Return the name of a connection's transport, such as ``redis``.

    (``Connection.transport_cls``.) If a release lacks it: an empty text.
    """
    return str(getattr(connection, "transport_cls", ""))


def hide_in_reports(names: re.Pattern[str]) -> None:
    """Make ``celery report`` hide the values of settings whose names match a pattern.

    Celery's own filter (``celery.app.utils.filter_hidden_settings``, which is replaced) does not
    hide a value that is a dict; it only hides parts of it by their own names.

    If a release lacks it: a URL that was set as a dict by mistake is shown in the report.
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

    (``_overflow_lock``, ``_pool.maxsize`` and ``_overflow``.)

    :param connections: the new size; a size that is smaller than the present one changes nothing.

    If a release lacks them: an error when a worker starts.
    """
    with pool._overflow_lock:
        more = max(0, connections - pool.size())
        pool._pool.maxsize += more
        # SQLAlchemy counts open connections as size + overflow, so the overflow must shrink.
        pool._overflow -= more


def refuse_returns(pool: Any) -> None:
    """Have a connection pool of SQLAlchemy's (``QueuePool``) close each connection that is returned
    from now on.

    The pool puts a returned connection into a queue, and closes it if the queue is full. The queue
    asks this under its lock, so no connection is put into it after this call. (``_pool._full``.)

    If a release lacks it: a connection that is returned to a disposed pool stays open until the
    pool is collected as garbage.
    """
    pool._pool._full = lambda: True


def upgrade_steps(script: Any, revision: Any) -> Any:
    """Return the migration steps from a revision to the newest one.

    They are for Alembic's ``EnvironmentContext(fn=...)``. (``ScriptDirectory._upgrade_revs``, which
    ``alembic.command.upgrade`` uses.)

    If a release lacks it: an error from ``celery singleton migrate``.
    """
    return script._upgrade_revs("head", revision)


def close_silently(connection: Any) -> None:
    """Close PyMySQL's socket without sending the server anything. (``Connection._force_close``.)

    If a release lacks it: a forked child keeps its copy of the socket open, without using it.
    """
    connection._force_close()


#: A property of PyMySQL's connections: seconds that a statement waits for its answer; ``None``: no
#: limit. It can be changed between two statements. (``_read_timeout``.) If a release lacks it: the
#: body's own statements in ``transaction()`` have the time limit of the store's statements.
read_timeout = property(
    attrgetter("_read_timeout"),
    lambda connection, seconds: setattr(connection, "_read_timeout", seconds),
)


def redis_connection(client: Any, left_out: Collection[str] = ()) -> Any:
    """Make a new connection with the options of a redis-py client, outside the client's pool.

    (The pool's ``connection_class`` and ``connection_kwargs``. Of the connection, ``connect``,
    ``send_command``, ``read_response``, ``can_read`` and ``disconnect`` are used.)

    :param left_out: names of the client's options that the connection is made without.

    If a release lacks them: an error, and no lease in Redis can be acquired.
    """
    pool = client.connection_pool
    given = {name: own for name, own in pool.connection_kwargs.items() if name not in left_out}
    return pool.connection_class(**given)
