"""Every use of a private or undocumented part of another library, in one place.

Read this module when one of these libraries has a new release, and run tests/unit/test_compat.py
with that release: the test of an entry fails when its part is gone. Each part was read in

- Celery 5.4.0, 5.5.3, 5.6.2 and 5.7.0; kombu 5.4.2, 5.5.4, 5.6.2 and 5.7.0,
- billiard 4.2.0, 4.2.1, 4.2.2 and 4.3.2; django-celery-beat 2.7.0 and 2.9.0,
- SQLAlchemy 2.0.36, 2.0.44 and 2.1.9; Alembic 1.13.3, 1.16.5 and 1.20.1,
- PyMySQL 1.1.1, 1.1.2 and 1.2.4; psycopg 3.2.9 and 3.3.9; redis-py 5.2.1, 6.4.0 and 8.1.0,

unless an entry says otherwise. An entry also says what happens if its part is gone.

Two undocumented parts of Celery are used where they are needed, because a call of a function here
would be one more call in each run: ``task.request_stack``, and the ``__dict__`` of a request, in
which Celery keeps a message's headers as attributes. Their tests are beside those of the entries.
What the package knows of CPython itself stays in ``run/interrupt.py`` (asynchronous exceptions,
frames, locks of ``logging``) and in ``store/sql/sqlite.py`` (a reference that is never dropped):
it changes with Python, and no library has a part in it.
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

#: By a library's class: the private names that a subclass of ours defines or sets, and why. Only a
#: subclass can, so they stand there. If one is gone, its library no longer calls or reads it.
OVERRIDDEN: Mapping[str, Mapping[str, str]] = {
    "celery.beat:Scheduler": {
        "_heap": "None has the scheduler sort its entries anew; SingletonScheduler keeps its own",
        "_do_sync": "an error while the schedule is stored must not end a tick that was sent",
        "_ensure_connected": "tries once for each address, and not for minutes",
    },
    "celery.events.receiver:EventReceiver": {
        "_receive": "takes an event as it came: one that cannot be read must not end the receiving",
    },
    "sqlalchemy.pool:QueuePool": {
        "_do_return_conn": "closes a connection that comes back after the pool was disposed of",
    },
    "pymysql.connections:Connection": {
        "query": "notes whether a statement was interrupted; not private, and not documented",
        "next_result": "the same for those that follow in one text",
    },
    "psycopg:Connection": {
        "wait": "sees the pauses in which a server says nothing; not private, and not documented",
    },
}

# -- Celery: tasks and messages

#: The tasks that this thread runs, the innermost last: ``push(task)`` and ``pop()``. A direct call
#: goes on it, so that ``current_task`` is right. If gone: the package cannot be imported.
TASK_STACK = _task_stack

#: The class of what ``chain(...)`` and ``a | b`` make; ``celery.chain`` is a subclass of it that
#: has no instances. If gone: the package cannot be imported.
Chain = _chain


def custom_attributes(request: Any) -> dict[str, Any]:
    """The attributes of a request that are not Celery's own: its custom headers, and what others
    have set. (``Context._get_custom_headers``.)

    If gone: a message with custom headers cannot be sent again.
    """
    return request._get_custom_headers(request.__dict__) or {}


def sending_options(task: Any) -> dict[str, Any]:
    """The options that ``apply_async`` takes from the task: its queue, serializer, priority, ...

    (``Task._get_exec_options``.) If gone: a message cannot be sent again.
    """
    options: dict[str, Any] = task._get_exec_options()
    return options


def forget_max_retries(task: Any) -> None:
    """Remove what ``Task.retry(max_retries=...)`` leaves on the task for its later retries.

    If gone: nothing is left to remove.
    """
    vars(task).pop("override_max_retries", None)


def is_made_by_decorator(task: type) -> bool:
    """Whether ``@app.task`` makes this class. (``_decorated``, from ``Celery._task_from_fun``.)

    If gone: false; a task with ``base=SingletonTask`` does not get the app's own task class.
    """
    return "_decorated" in vars(task)


def without_app(of_app: Any, app: Any) -> Any:
    """The task class that an app's ``app.Task`` was derived from. (``_app``.)

    If gone: ``app.Task`` itself.
    """
    return of_app.__bases__[0] if vars(of_app).get("_app") is app else of_app


def converter_in(wrapper: Any) -> Callable[..., Any] | None:
    """Celery's wrapper around the body of a task with ``pydantic=True``, made anew around a
    function that returns its arguments: what it returns is what the body would see.

    It is recognised by its module's globals, and has the body in its closure, as ``task_fun``.
    Read in Celery 5.5.3 to 5.7.0; 5.4 has no such wrapper.

    :returns: ``None`` for any other function.
    :raises LookupError: the body is gone from the closure.
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
    """The names of kombu's serializers by their content types. (``registry.type_to_name``.)

    If gone: a message cannot be sent again.
    """
    registry: Any = serialization.registry  # type: ignore[attr-defined]  # missing in celery-types
    names: Mapping[str, str] = registry.type_to_name
    return names


# -- Celery: workers and their pools


def cannot_end_jobs(error: NotImplementedError) -> bool:
    """Whether a pool of Celery's that cannot end a running job has raised this error.

    It is recognised by where it was raised: in ``BasePool.terminate_job``. If gone: an error.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_code is BasePool.terminate_job.__code__


def process_pool(worker: Any) -> Any:
    """billiard's pool in a prefork worker; ``None`` before it is made. (``TaskPool._pool``.)

    If gone: ``None``; the worker ends at its start.
    """
    return getattr(worker.pool, "_pool", None)


def processes_of(worker: Any) -> list[Any]:
    """The processes of a prefork worker's pool; none before it is made and after its end.

    (``Pool._pool``.) If gone: none; they renew their leases by themselves.
    """
    return list(getattr(process_pool(worker), "_pool", None) or ())


def watch_processes(pool: Any, watch: Callable[[Any], object]) -> None:
    """Call back with each process of billiard's pool: those that there are, and each new one.

    (``Pool._create_worker_process``, which is replaced on the pool, and ``Pool._pool``.)

    If gone: the worker ends at its start.
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
    """Have billiard's pool look for dead processes now. (``Pool.maintain_pool``.)

    If gone: the worker ends when a process of its pool has died.
    """
    pool.maintain_pool()


def call_when_readable(hub: Any, descriptor: int, callback: Callable[..., Any], *args: Any) -> None:
    """Have a worker's event loop call back when there is something to read. (``Hub.add_reader``.)

    Celery gives the hub to the method ``register_with_event_loop`` of a worker's step. If gone: the
    worker ends at its start; without that method, dead processes are replaced by Celery's own look.
    """
    hub.add_reader(descriptor, callback, *args)


def before_growth(pool: Any, callback: Callable[[int], object]) -> None:
    """Call back before a pool of greenlets grows, with the number of bodies that it has then.

    (``grow``, which is replaced on the pool, and ``num_processes``.) Celery calls it for
    ``--autoscale`` and ``pool_grow``. If gone: the pool is taken for one that cannot grow.
    """
    grow = getattr(pool, "grow", None)
    if grow is None:
        return  # a pool of threads

    def call_and_grow(n: int = 1) -> Any:
        callback(pool.num_processes + n)
        return grow(n)

    pool.grow = call_and_grow


# -- Celery's beat and its schedules

#: The code that evaluates an entry's lazy arguments (``BeatLazyFunc``): an error from there is the
#: entry's own. If gone: such an entry is tried again and again, and not only at its next tick.
LAZY_ARGUMENTS: frozenset[CodeType] = frozenset(
    getattr(beat, name).__code__
    for name in ("_evaluate_entry_args", "_evaluate_entry_kwargs")
    if hasattr(beat, name)
)

#: The methods by which Celery finds the next time of a crontab. A name that is gone is overridden
#: by nobody.
CRONTAB_METHODS = ("remaining_estimate", "remaining_delta", "_delta_to_next", "now")

#: The attributes that a schedule has from its app, and of each class of Celery's those that it
#: makes of its arguments. A schedule's text does not repeat them. One that is new, or has another
#: name: beats take all their schedules for changed ones, once.
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
    """Move entries back in the heap of a scheduler of Celery's. (``_heap``, ``_when``.)

    :param wait_for: seconds from now for an entry's name; 0 leaves the entry where it is.

    If gone: an error, which the scheduler's next tick repeats.
    """
    heap = scheduler._heap
    for index, event in enumerate(heap):
        if wait := wait_for(event.entry.name):
            heap[index] = event._replace(time=scheduler._when(event.entry, wait))
    heapq.heapify(heap)


def take_connection(scheduler: Any) -> Any:
    """Take a scheduler's connection and producer away, so that the next message makes new ones.

    They are cached properties of kombu's, which keeps their values in ``__dict__``.

    :returns: the connection; ``None`` if there is none. If gone: ``None``, and the old one stays.
    """
    vars(scheduler).pop("producer", None)
    return vars(scheduler).pop("connection", None)


def read_schedule_anew(scheduler: Any) -> None:
    """Have a scheduler of django-celery-beat's, or one that grew from it, read its database anew.

    (``_initial_read``.) If gone: it reads the database when it sees a change.
    """
    scheduler._initial_read = True


def note_changed(scheduler: Any, name: str) -> None:
    """Have a scheduler of django-celery-beat's write an entry at its next ``sync``. (``_dirty``.)

    If gone, and with other classes: nothing happens.
    """
    changed: set[str] = getattr(scheduler, "_dirty", set())
    changed.add(name)


# -- kombu: brokers

#: kombu's module of the delays that RabbitMQ makes itself; ``None`` before kombu 5.5. Its
#: ``MAX_NUMBER_OF_BITS_TO_USE``, ``MAX_LEVEL``, ``level_name``, ``calculate_routing_key`` and
#: ``CELERY_DELAYED_DELIVERY_EXCHANGE`` are used. One of them gone: an error when a message is
#: delayed, which is logged; the message is sent as Celery does, or stays with its broker.
native_delays = native_delayed_delivery
#: Its exchanges, with a prefix that an app can choose since kombu 5.7; and the delay, as it stands
#: before a routing key. Other names: a delayed message is sent again into the default queue.
DELAYING_EXCHANGE = re.compile(r"(?:.+_)?celery_delayed_(?:\d+|delivery)")
DELAY = re.compile(r"(?:[01]\.){28}")


def broker_of(app: Any) -> Any:
    """An app's connection to its broker as it is configured; it need not be connected.

    (``ProducerPool.connections`` and ``ConnectionPool.connection``.)

    If gone: an error; the message is sent as Celery does.
    """
    return app.producer_pool.connections.connection


def transport_of(connection: Any) -> str:
    """The name of a connection's transport as its URL has it. (``Connection.transport_cls``.)

    If gone: an empty text, which is no local transport.
    """
    return str(getattr(connection, "transport_cls", ""))


def hide_in_reports(names: re.Pattern[str]) -> None:
    """Have Celery's reports hide the values of settings with such names, of whatever kind they are.

    (``filter_hidden_settings`` of ``celery.app.utils``, which is replaced; it hides the parts of a
    dict by their own names.)

    If gone: a URL that was wrongly set as a dict is shown.
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
    """Raise the number of connections that SQLAlchemy's ``QueuePool`` makes and keeps at most.

    (``_overflow_lock``, ``_pool.maxsize`` and ``_overflow``.)

    If gone: an error when a worker starts.
    """
    with pool._overflow_lock:
        more = max(0, connections - pool.size())
        pool._pool.maxsize += more
        # Counted from the size: how many there are is the sum of both.
        pool._overflow -= more


def upgrade_steps(script: Any, revision: Any) -> Any:
    """The steps from a revision to the newest, for Alembic's ``EnvironmentContext(fn=...)``.

    (``ScriptDirectory._upgrade_revs``, by which ``alembic.command.upgrade`` finds them.)

    If gone: an error from ``singleton migrate``.
    """
    return script._upgrade_revs("head", revision)


def close_silently(connection: Any) -> None:
    """Close a connection of PyMySQL's without a word to the server. (``_force_close``.)

    If gone: a forked child keeps its copy of the socket open; it does not use it.
    """
    connection._force_close()


#: A property: seconds that a connection of PyMySQL's waits for an answer; ``None``: for ever. It
#: can be changed between two statements. (``_read_timeout``.) If gone: a caller's own statements in
#: ``transaction()`` may take no longer than the store's.
read_timeout = property(
    attrgetter("_read_timeout"),
    lambda connection, seconds: setattr(connection, "_read_timeout", seconds),
)


def redis_connection(client: Any, left_out: Collection[str] = ()) -> Any:
    """A new connection as a client of redis-py's would make it, which its pool does not know.

    :param left_out: options that it is made without.

    (``connection_class`` and ``connection_kwargs`` of its pool; of the connection ``connect``,
    ``send_command``, ``read_response``, ``can_read`` and ``disconnect`` are used.)

    If gone: an error, and no lease can be taken.
    """
    pool = client.connection_pool
    given = {name: own for name, own in pool.connection_kwargs.items() if name not in left_out}
    return pool.connection_class(**given)
