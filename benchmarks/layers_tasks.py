"""The app of the ``layers`` part: singletons whose process reaches the store in several ways. A way
is one connection layer: the package's own, or one of a client library.

The ways take turns in one process, :data:`BLOCK` runs each. The way is changed within a body, so
the time from one body to the next belongs to one way: it contains the end of one run and the
beginning of the next.

The environment is the same as in :mod:`benchmarks.tasks`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from celery import Celery, signals
from redis import Redis
from sqlalchemy import Engine

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.redis.calls import ScriptCalls
from celery_singleton_state.store.sql.connections import Connections

from .tasks import BROKER, DATABASE, SLOTS, Counter

BLOCK = 50
#: How many runs at the beginning are not counted: they open connections, prepare statements, and
#: fill histories.
WARM_UP = SLOTS * 16

#: The number of connection layers that are compared for each store.
WAYS = 3
OURS = "this package"

app = Celery("layers", broker=BROKER)
app.conf.task_ignore_result = True
app.conf.singleton_store_url = DATABASE

#: A function that calls the store once, with the arguments that its layer gets.
Way = Callable[..., Any]


@dataclass(frozen=True)
class Block:
    """The time that :data:`BLOCK` runs took, in seconds.

    :param store: the part of the runs' time that was spent in calls of the connection layer.
    :param cpu: the processor time of all threads of this process.
    """

    way: str
    run: float
    store: float
    cpu: float


class Turns:
    """Replace a store's connection layer, and let the ways take turns."""

    def __init__(self, ways: Mapping[str, Way]) -> None:
        self._ways = itertools.cycle(ways.items())
        self._count = -WARM_UP
        self._store = 0.0
        self.blocks: list[Block] = []
        self._begin()

    def call(self, *arguments: Any) -> Any:
        """Make one call through the layer whose turn it is."""
        started = time.perf_counter()
        try:
            return self._way(*arguments)
        finally:
            self._store += time.perf_counter() - started

    execute = call

    def note(self) -> None:
        """Count a run, and switch to the next of the compared layers after each block of runs.

        Each body calls this.
        """
        self._count += 1
        if self._count % BLOCK:
            return
        if self._count > 0:
            run, cpu = time.perf_counter() - self._begun, time.process_time() - self._cpu
            self.blocks.append(Block(self._name, run, self._store, cpu))
        self._begin()

    def _begin(self) -> None:
        self._name, self._way = next(self._ways)
        self._store = 0.0
        self._begun, self._cpu = time.perf_counter(), time.process_time()


def sql_ways(engine: Engine, own: Connections) -> dict[str, Way]:
    """Return the ways to run a statement.

    All use one engine, whose connections are in autocommit mode, without a ping and without a
    reset.
    """

    def by_core(statement: str, parameters: Mapping[str, Any], answer: Callable[[Any], Any]) -> Any:
        with engine.connect() as connection:
            return answer(connection.exec_driver_sql(statement, dict(parameters)))

    return {
        "raw_connection()": Connections(engine, keeps_one=False).execute,
        "connect()": by_core,
        OURS: own.execute,
    }


def redis_ways(own: ScriptCalls) -> dict[str, Way]:
    """Return the ways to call a script. All use the same options and the same URL."""
    pool = own._make_client().connection_pool
    return {
        "client": _by_scripts(Redis(connection_pool=pool)),
        "single-connection client": _by_scripts(
            Redis(connection_pool=pool, single_connection_client=True)
        ),
        OURS: own.call,
    }


def _by_scripts(client: Any) -> Way:
    scripts: dict[str, Any] = {}

    def call(script: str, keys: Any, arguments: Any) -> Any:
        known = scripts.get(script)
        if known is None:
            known = scripts[script] = client.register_script(script)
        return known(keys, arguments)

    return call


#: Maps the name of the store's attribute that has the connection layer to the turns of its ways.
_turns: dict[str, Turns] = {}


def _note(store: Any, attribute: str, ways: Callable[[], Mapping[str, Way]]) -> None:
    turns = _turns.get(attribute)
    if turns is None:
        turns = _turns[attribute] = Turns(ways())
        setattr(store, attribute, turns)
    turns.note()


@singleton_task(app, state_schema=Counter, unique_on=["slot"])
def stateful(self: SingletonTask[Counter], slot: int, number: int) -> None:
    """Run a singleton whose lease and state are in SQL."""
    store = runtime_of(app).sql
    _note(store, "_connections", lambda: sql_ways(store.engine, store._connections))
    self.state.count += 1


@singleton_task(app, unique_on=["slot"])
def stateless(self: SingletonTask, slot: int, number: int) -> None:
    """Run a singleton whose lease is in Redis."""
    store: Any = runtime_of(app).leases
    _note(store, "_scripts", lambda: redis_ways(store._scripts))


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def _write_blocks(**_: Any) -> None:
    blocks = [block for turns in _turns.values() for block in turns.blocks]
    if blocks:
        path = Path(os.environ["BENCHMARK_MARKS"], str(os.getpid()))
        path.write_bytes(msgspec.json.encode(blocks))


def read_blocks(folder: Path) -> Iterator[Block]:
    """Yield the blocks that a worker's processes have written, in order."""
    for path in folder.iterdir():
        yield from msgspec.json.decode(path.read_bytes(), type=list[Block])
