"""Tests for ``compat``: the private parts of other libraries exist and do what is expected.

If a test fails with a new release of a library, its entry in ``compat`` must be changed.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import celery
import psycopg
import pymysql
import pytest
import redis
import sqlalchemy as sa
from celery import Celery, Task, beat, bootsteps, chain, current_task, schedules
from celery.app import utils
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.canvas import Signature

from celery_singleton_state import compat
from tests.helpers.servers import Valkey

ROOT = Path(__file__).parents[2]

#: Two statements: :class:`FakeMySQL` never answers the first, and answers the second twice.
SILENCE, TWO_RESULTS = "SILENCE", "TWO; RESULTS"
#: The command by which a MySQL client announces that it closes the connection (COM_QUIT).
QUIT = b"\x01"


class FakeMySQL(threading.Thread):
    """A MySQL server that lets one client log in, and answers OK to each command."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.heard: list[bytes] = []

    def run(self) -> None:
        with self._server, self._server.accept()[0] as client, client.makefile("rb") as stream:
            # Greet in protocol 4.1. The server accepts any password.
            greeting = struct.pack(
                *("<B6sI8sxHBHHB10x13s22s", 10, b"8.0.0", 1, b"a" * 8, 0x8200, 45, 2, 8, 21),
                *(b"b" * 12, b"mysql_native_password"),
            )
            self._say(client, 0, greeting)
            while head := stream.read(4):
                self.heard.append(said := stream.read(int.from_bytes(head[:3], "little")))
                text = said[1:].decode(errors="replace")
                number = head[3] + 1
                if text == TWO_RESULTS:
                    self._say(client, number, b"\0\0\0\x0a\0\0\0")
                    number += 1
                if text != SILENCE and said != QUIT:
                    self._say(client, number, b"\0\0\0\x02\0\0\0")

    @staticmethod
    def _say(client: socket.socket, number: int, payload: bytes) -> None:
        client.sendall(len(payload).to_bytes(3, "little") + bytes([number]) + payload)


@pytest.fixture
def mysql() -> Iterator[FakeMySQL]:
    server = FakeMySQL()
    server.start()
    yield server
    server.join(10)


@pytest.fixture
def plain_app() -> Iterator[Celery]:
    """An app of Celery that no class of this package has changed."""
    app = Celery("plain", broker="memory://", backend="cache+memory://", set_as_current=False)
    yield app
    app.close()


@pytest.fixture
def plain(plain_app: Celery) -> Any:
    @plain_app.task(name="plain", bind=True, shared=False)
    def plain(self: Any, *args: Any) -> Any:
        return args

    return plain


# -- Celery: tasks and messages


def test_a_task_on_the_stack_is_the_current_one(plain: Any) -> None:
    compat.TASK_STACK.push(plain)
    try:
        assert current_task.name == plain.name
    finally:
        assert compat.TASK_STACK.pop() is plain


def test_a_request_on_the_tasks_stack_is_its_request(plain: Any) -> None:
    own = Context(id="own")
    plain.request_stack.push(own)
    try:
        assert plain.request is own
    finally:
        plain.pop_request()
    assert plain.request is not own


def test_custom_headers_become_attributes_of_the_request(plain_app: Celery) -> None:
    seen: list[Any] = []

    @plain_app.task(name="looks", bind=True, shared=False)
    def looks(self: Any) -> None:
        seen.append(dict(self.request.__dict__))

    plain_app.finalize()
    tracer: Any = build_tracer("looks", looks, app=plain_app)
    tracer("id", (), {}, {"id": "id", "x-own": 2})
    assert seen[0]["x-own"] == 2


def test_chains_have_the_class_chain(plain: Any) -> None:
    one, other = plain.si(), plain.si()
    for made in (chain(one, other), one | other):
        again: Any = Signature.from_dict(json.loads(json.dumps(made)))
        for each in (made, again):
            assert isinstance(each, compat.Chain)
            assert each.tasks[-1].task == "plain"
    assert not isinstance(one, compat.Chain)


def test_custom_attributes_exclude_celerys_own() -> None:
    request: Any = Context({"id": "id", "task": "t", "retries": 1, "lang": "py", "x-own": 2})
    assert compat.custom_attributes(request) == {"x-own": 2}
    assert compat.custom_attributes(Context({"id": "id"})) == {}


def test_sending_options_are_read_from_the_task(plain_app: Celery) -> None:
    @plain_app.task(time_limit=3, serializer="yaml", expires=60, shared=False)
    def tuned() -> None: ...

    found = compat.sending_options(tuned)
    assert (found["time_limit"], found["serializer"], found["expires"]) == (3, "yaml", 60)


def test_max_retries_of_an_earlier_retry_are_forgotten(plain: Any) -> None:
    plain.push_request(id="id", called_directly=False, args=(), kwargs={})
    try:
        plain.retry(max_retries=7, throw=False)
    finally:
        plain.pop_request()
    left = vars(plain).copy()
    assert 7 in left.values()
    compat.forget_max_retries(plain)
    assert 7 not in vars(plain).values()


def test_a_task_class_made_by_the_decorator_is_recognised(
    plain_app: Celery,
) -> None:
    found: dict[str, bool] = {}

    class Noting(Task):  # type: ignore[type-arg]  # generic for the type checker only
        abstract = True

        def __init_subclass__(cls) -> None:
            found[cls.__name__] = compat.is_made_by_decorator(cls)

    class Written(Noting):
        name = "written"

    @plain_app.task(base=Noting, shared=False)
    def decorated() -> None: ...

    plain_app.finalize()
    assert found == {"Written": False, "decorated": True}


def test_the_base_class_behind_an_apps_task_class_is_found(plain_app: Celery) -> None:
    assert compat.without_app(plain_app.Task, plain_app) is Task
    assert compat.without_app(Task, plain_app) is Task

    class Own(Task):  # type: ignore[type-arg]
        pass

    other = Celery("other", task_cls=Own, set_as_current=False)
    assert compat.without_app(other.Task, other) is Own


@pytest.mark.skipif(celery.VERSION[:2] < (5, 5), reason="Celery 5.4 has no pydantic=True")
def test_the_converter_of_pydantic_arguments_is_found(plain_app: Celery) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Order(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        number: int

    def buy(order: Any) -> None: ...

    buy.__annotations__ = {"order": Order}
    plain_app.task(name="buy", pydantic=True, shared=False)(buy)
    plain_app.finalize()
    wrapper: Any = type(plain_app.tasks["buy"]).run
    convert = compat.converter_in(wrapper)
    assert convert is not None
    assert convert({"number": "3"}) == ((Order(number=3),), {})
    changed = FunctionType((lambda: None).__code__, wrapper.__globals__)
    with pytest.raises(LookupError):
        compat.converter_in(changed)


def test_other_functions_have_no_converter() -> None:
    assert compat.converter_in(test_other_functions_have_no_converter) is None
    assert compat.converter_in(len) is None


def test_serializer_names_are_found_by_content_type() -> None:
    names = compat.serializer_names()
    assert names["application/json"] == "json"
    assert names["application/x-python-serialize"] == "pickle"


# -- Celery: workers and their pools


def test_a_pool_that_cannot_end_jobs_is_recognised_by_its_error() -> None:
    from celery.concurrency.solo import TaskPool

    with pytest.raises(NotImplementedError) as raised:
        TaskPool(1).terminate_job(1)
    assert compat.cannot_end_jobs(raised.value)
    with pytest.raises(NotImplementedError) as raised:
        raise NotImplementedError
    assert not compat.cannot_end_jobs(raised.value)


@pytest.mark.parametrize("kind", ["events", "threads"])
def test_processes_of_a_real_pool_are_watched_and_replaced(kind: str) -> None:
    run_alone("compat_pool", kind)


def test_an_event_loop_calls_when_a_file_is_readable() -> None:
    from kombu.asynchronous import Hub

    hub: Any = Hub()
    reader, writer = os.pipe()
    seen: list[str] = []
    try:
        compat.call_when_readable(hub, reader, seen.append, "called")
        os.write(writer, b".")
        hub.run_once()
        assert seen == ["called"]
    finally:
        hub.close()
        os.close(reader)
        os.close(writer)


def test_a_worker_gives_its_event_loop_to_its_steps() -> None:
    from celery.worker import WorkController

    given: list[Any] = []

    class Step(bootsteps.StartStopStep):
        def register_with_event_loop(self, parent: Any, hub: Any) -> None:
            given.extend((parent, hub))

    worker: Any = object.__new__(WorkController)
    worker.steps, worker.blueprint = [], bootsteps.Blueprint(steps=[Step], name="compat")
    worker.blueprint.apply(worker)
    worker.register_with_event_loop("the hub")
    assert given == [worker, "the hub"]


def test_before_growth_is_called_before_a_gevent_pool_grows(plain_app: Celery) -> None:
    """The pool grows because of Celery's remote control command ``pool_grow``."""
    pytest.importorskip("gevent")
    from celery.concurrency.gevent import TaskPool
    from celery.worker.control import pool_grow

    pool: Any = TaskPool(2, app=plain_app)
    pool.on_start()
    seen: list[tuple[int, int]] = []
    before = pool.num_processes
    compat.before_growth(pool, lambda bodies: seen.append((bodies, pool.limit)))
    consumer = SimpleNamespace(
        controller=SimpleNamespace(autoscaler=None),
        pool=pool,
        _update_prefetch_count=lambda *_: None,
    )
    grow: Any = pool_grow
    grow(SimpleNamespace(consumer=consumer), n=3)
    assert seen == [(before + 3, 2)]


def test_a_pool_of_threads_does_not_grow(plain_app: Celery) -> None:
    from celery.concurrency.thread import TaskPool

    pool: Any = TaskPool(2, app=plain_app)
    compat.before_growth(pool, lambda _: None)
    assert "grow" not in vars(pool)
    pool.on_stop()


# -- Celery's beat and its schedules


@pytest.fixture
def scheduler(plain_app: Celery, plain: Any) -> Any:
    made = beat.Scheduler(plain_app, lazy=True)
    for name in ("one", "two"):
        made.add(name=name, task="plain", schedule=timedelta(seconds=1))
    return made


@pytest.mark.parametrize("where", ["args", "kwargs"])
def test_an_error_of_lazy_arguments_comes_from_known_code(scheduler: Any, where: str) -> None:
    lazy = beat.BeatLazyFunc(lambda: 1 / 0)
    given: Any = {"args": (lazy,)} if where == "args" else {"kwargs": {"x": lazy}}
    entry = scheduler.Entry("lazy", "plain", schedule=timedelta(1), app=scheduler.app, **given)
    with pytest.raises(beat.SchedulingError) as raised:
        scheduler.apply_async(entry, advance=False)
    codes = set()
    error: BaseException | None = raised.value
    while error is not None:
        codes |= {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        error = error.__context__
    assert codes & compat.LAZY_ARGUMENTS


@pytest.mark.parametrize("method", compat.CRONTAB_METHODS)
def test_celery_calls_this_method_of_a_crontab(plain_app: Celery, method: str) -> None:
    asked: list[str] = []

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(method)
        return getattr(super(own, self), method)(*args, **kwargs)

    own: Any = type("own", (schedules.crontab,), {method: noting})
    cron = own(minute="0", day_of_month="1", app=plain_app)
    cron.is_due(datetime.now(UTC))
    assert asked


def test_all_attributes_of_celerys_schedules_are_listed(plain_app: Celery) -> None:
    made: list[Any] = [
        schedules.crontab(minute="5", app=plain_app),
        schedules.schedule(3, app=plain_app),
    ]
    try:
        import ephem  # noqa: F401
    except ImportError:
        pass
    else:
        made.append(schedules.solar("sunset", 52, 13, app=plain_app))
    for each in made:
        each.is_due(datetime.now(UTC))
        attributes = compat.SCHEDULE_ATTRIBUTES[type(each)]
        assert vars(each).keys() <= compat.SCHEDULE_OF_APP | attributes
        assert attributes <= vars(each).keys()


def test_put_off_moves_an_entry_back_in_the_heap(scheduler: Any) -> None:
    scheduler.populate_heap()
    first = scheduler._heap[0].entry.name
    compat.put_off(scheduler, lambda name: 100 if name == first else 0)
    assert [event.entry.name for event in scheduler._heap][1] == first
    assert scheduler._heap[1].time - scheduler._heap[0].time >= 98


def test_a_scheduler_reconnects_after_its_connection_was_taken(scheduler: Any) -> None:
    assert compat.take_connection(scheduler) is None
    connection, producer = scheduler.connection, scheduler.producer
    assert compat.take_connection(scheduler) is connection
    assert scheduler.connection is not connection
    assert scheduler.producer is not producer
    connection.release()


def test_a_django_schedule_is_reloaded_and_saved() -> None:
    pytest.importorskip("django_celery_beat")
    run_alone("compat_django")


def test_celerys_scheduler_uses_the_names_that_a_subclass_overrides(
    plain_app: Celery, plain: Any
) -> None:
    called: list[str] = []

    class Own(beat.Scheduler):
        def _ensure_connected(self) -> Any:
            called.append("_ensure_connected")
            return super()._ensure_connected()  # type: ignore[misc]

        def _do_sync(self) -> None:
            called.append("_do_sync")

        def populate_heap(self, *args: Any, **kwargs: Any) -> None:
            called.append("_heap")
            super().populate_heap(*args, **kwargs)  # type: ignore[misc]

    scheduler: Any = Own(plain_app, lazy=True)
    scheduler.sync_every_tasks = 1
    entry = scheduler.add(name="one", task="plain", schedule=timedelta(seconds=1))
    entry.last_run_at -= timedelta(hours=1)
    scheduler.tick()
    assert sorted(called) == sorted(compat.OVERRIDDEN["celery.beat:Scheduler"])
    called.clear()
    scheduler.tick()
    assert "_heap" not in called
    scheduler._heap = None
    scheduler.tick()
    assert "_heap" in called
    scheduler.connection.release()


# -- kombu: brokers


@pytest.mark.skipif(compat.native_delays is None, reason="kombu before 5.5 has no such delays")
def test_names_and_keys_of_kombus_native_delays_are_recognised() -> None:
    native: Any = compat.native_delays
    names = [native.level_name(0), native.level_name(native.MAX_LEVEL)]
    names.append(native.CELERY_DELAYED_DELIVERY_EXCHANGE)
    for name in names:
        assert compat.DELAYING_EXCHANGE.fullmatch(name)
        assert compat.DELAYING_EXCHANGE.fullmatch(f"prefix_{name}")
    assert native.MAX_LEVEL == native.MAX_NUMBER_OF_BITS_TO_USE - 1
    key = native.calculate_routing_key(5, "orders")
    assert compat.DELAY.sub("", key, count=1) == "orders"


def test_broker_of_needs_no_connection(plain_app: Celery) -> None:
    plain_app.conf.broker_transport_options = {"visibility_timeout": 5}
    found = compat.broker_of(plain_app)
    assert found.transport.driver_type == "memory"
    assert found.transport_options["visibility_timeout"] == 5


@pytest.mark.parametrize("url", ["memory://", "filesystem://", "redis://localhost/0"])
def test_transport_of_is_the_scheme_of_the_url(url: str) -> None:
    app = Celery("app", broker=url, set_as_current=False)
    assert compat.transport_of(app.connection_for_read()) == url.partition(":")[0]


# -- Stores


def test_a_pool_can_be_given_more_connections(tmp_path: Path) -> None:
    engine = sa.create_engine(
        f"sqlite:///{tmp_path}/a.db",
        poolclass=sa.QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.01,
    )
    pool: Any = engine.pool
    first = engine.connect()
    with pytest.raises(sa.exc.TimeoutError):
        engine.connect()
    compat.allow_connections(pool, 3)
    more = [engine.connect(), engine.connect()]
    with pytest.raises(sa.exc.TimeoutError):
        engine.connect()
    for connection in (first, *more):
        connection.close()
    assert (pool.size(), pool.checkedin(), pool.overflow()) == (3, 3, 0)
    compat.allow_connections(pool, 2)
    assert pool.size() == 3
    engine.dispose()


def test_a_pool_that_refuses_returns_closes_returned_connections(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=sa.QueuePool)
    connection = engine.raw_connection()
    compat.refuse_returns(engine.pool)
    drivers: Any = connection.dbapi_connection
    connection.close()
    with pytest.raises(sqlite3.ProgrammingError):
        drivers.cursor()


def test_upgrade_steps_lists_the_missing_migrations() -> None:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(ROOT / "celery_singleton_state" / "migrations"))
    every = [each.revision for each in script.walk_revisions()]
    steps = compat.upgrade_steps(script, ())
    assert [step.revision.revision for step in steps] == every[::-1]
    assert compat.upgrade_steps(script, (every[0],)) == []


class OwnMySQL(pymysql.connections.Connection):  # type: ignore[misc]  # it has no types
    """A connection that notes which of its methods PyMySQL calls, as the package's own class
    does.
    """

    own_timeout = compat.read_timeout

    def __init__(self, server: FakeMySQL, **options: Any) -> None:
        self.asked: list[str] = []
        super().__init__(host="127.0.0.1", port=server.port, user="me", **options)

    def query(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append("query")
        return super().query(*args, **kwargs)

    def next_result(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append("next_result")
        return super().next_result(*args, **kwargs)


def test_pymysqls_read_timeout_can_be_changed_for_one_connection(mysql: FakeMySQL) -> None:
    connection = OwnMySQL(mysql, read_timeout=30)
    assert connection.own_timeout == 30
    connection.own_timeout = 0.05
    with pytest.raises(pymysql.err.OperationalError, match="timed out"):
        connection.query(SILENCE)


def test_close_silently_sends_no_quit_command(mysql: FakeMySQL) -> None:
    connection = OwnMySQL(mysql)
    connection.query("DO 1")
    compat.close_silently(connection)
    assert not connection.open
    mysql.join()
    assert mysql.heard[-1] == b"\x03DO 1"
    assert QUIT not in mysql.heard


def test_pymysqls_cursor_calls_the_connections_methods(mysql: FakeMySQL) -> None:
    connection = OwnMySQL(mysql)
    connection.asked.clear()
    cursor = connection.cursor()
    cursor.execute(TWO_RESULTS)
    cursor.nextset()
    assert connection.asked == list(compat.OVERRIDDEN["pymysql.connections:Connection"])
    connection.close()


def test_psycopg_waits_in_a_connections_method_and_reports_silence(
    server_url: str,
) -> None:
    heard: list[Any] = []

    class Own(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            return super().wait(noting(gen), *args, **kwargs)

    def noting(gen: Any) -> Any:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                heard.append(ready)
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value

    url = sa.make_url(server_url).set(drivername="postgresql")
    with Own.connect(url.render_as_string(hide_password=False)) as connection:
        connection.execute("SELECT pg_sleep(0.3)")
        # While the server is silent, psycopg reports that nothing is ready; at last the answer is.
        assert not all(heard)
        assert heard[-1]
        connection.pgconn.finish()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_reports_hide_settings_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "filter_hidden_settings", utils.filter_hidden_settings)
    compat.hide_in_reports(re.compile("WHERE"))
    app = Celery("shop", set_as_current=False)
    app.conf.update(WHERE={"it": "secret"}, there={"it": "seen"})
    reported = app.conf.humanize()
    assert "secret" not in reported
    assert "seen" in reported


def test_a_redis_py_connection_works_outside_its_pool(valkey: Valkey) -> None:
    with redis.Redis.from_url(
        f"redis://127.0.0.1:{valkey.port}/3", decode_responses=True
    ) as client:
        connection = compat.redis_connection(client)
        connection.connect()
        try:
            connection.send_command("CLIENT", "INFO")
            assert " db=3 " in connection.read_response()
            assert not connection.can_read()
            assert client.info("clients")["connected_clients"] >= 2
        finally:
            connection.disconnect()


def run_alone(module: str, *arguments: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", f"tests.apps.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout.endswith("done\n"), ran.stderr
