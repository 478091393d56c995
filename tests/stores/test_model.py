"""The lease's protocol against a model of it: any order of steps, on every store.

The model is a row in plain Python and the rules as :mod:`celery_singleton_state.lease` tells them.
Processes acquire, write, sleep past their lease's life, lose answers, repeat requests and die; the
store must answer as the model does, and its row be the model's row, after every step.

Nobody waits for an expiry: the row's times are moved into the past instead.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_singleton_state.store import SqlStore, open_store, redis_scripts
from celery_singleton_state.store.base import Ended, Lease, NewValue, Row
from celery_singleton_state.store.engine import is_in_memory
from celery_singleton_state.store.redis import INDEX, RedisStore
from celery_singleton_state.store.statements import HELD_ON

KEYS = ("k1", "k2")
PROCESSES = (1, 2, 3)
#: Longer than any test: what expires does so by :meth:`Leases.let_run_out` only.
LIFE = 3600.0
MOSTLY = st.sampled_from([True, True, False])
SELDOM = st.sampled_from([False, False, True])
LONG_AGO = "2000-01-01 00:00:00.000"

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    stateful_step_count=30,
    report_multiple_bugs=False,
)
#: Where each step is several statements and as many commits; and behind a pooler, where they are
#: another store's.
FEW = settings(SETTINGS, max_examples=12)
#: For faults, which need not be told in the shortest way.
TO_THE_FIRST_FAILURE = settings(SETTINGS, max_examples=1000, phases=[Phase.generate])


class Rollback(Exception):
    """What a body raises within a transaction."""


@dataclass
class ModelRow:
    """A singleton: a counter, who may write it, and who has run."""

    n: int = 0
    fence: int = 0
    #: Of a lease that is held on after its run, a name that no run has.
    holder: str | None = None
    expired: bool = False
    #: The run has taken longer than any hold.
    outlasted: bool = False
    #: Fence, holder and outcome of each run that ended.
    history: list[list[Any]] = field(default_factory=list)

    def acquire(self, holder: str) -> bool:
        if holder != self.holder:
            if self.holder is not None and not self.expired:
                return False
            self.fence += 1
        self.holder, self.expired, self.outlasted = holder, False, False
        return True

    def admits(self, lease: Lease) -> bool:
        """Whether a write is accepted: by fence and holder alone, however late, until the end."""
        return (lease.fence, lease.holder) == (self.fence, self.holder)

    @property
    def held_on(self) -> bool:
        return self.holder is not None and self.holder.endswith(HELD_ON)

    def run_out(self) -> None:
        self.expired = self.outlasted = True
        if self.held_on:
            self.holder = None

    def release(self, history: list[list[Any]], hold: float) -> None:
        self.history = history
        keeps = hold > 0 and not self.outlasted
        self.holder = f"{self.holder}{HELD_ON}" if keeps else None

    def seen(self) -> dict[str, Any]:
        """What anybody sees of it from outside."""
        running = self.holder is not None and not self.held_on
        held = self.holder is not None and not self.expired
        return {
            "value": state(self.n).value if self.n else "null",
            "schema_version": 1 if self.n else None,
            "fence": self.fence,
            "holder": self.holder,
            "task_id": f"task of {self.holder}" if running else None,
            "held": held,
            "held_on": self.held_on,
            "run_count": len(self.history),
            "last_outcome": self.history[-1][2] if self.history else None,
            "history": json.dumps(self.history) if self.history else None,
        }


@dataclass(eq=False)
class Run:
    """What a process knows of its run, or one that recovers knows of a dead one's."""

    key: str
    holder: str
    process: int | None = None
    #: ``None`` while the answer to its request is lost.
    lease: Lease | None = None
    #: The counter: loaded, and then counted on in memory.
    n: int = 0
    history: list[list[Any]] = field(default_factory=list)
    #: Its release was accepted, whether it knows or not.
    ended: bool = False
    #: Sends the last write again, whose answer was lost.
    repeat: Callable[[], None] | None = None


def state(n: int) -> NewValue:
    return NewValue(json.dumps({"n": n}), 1)


def counted(value: str) -> int:
    return int((json.loads(value) or {"n": 0})["n"])


def one_of(name: str) -> st.SearchStrategy[Run]:
    """One of a machine's runs, half of the time one whose lease is good."""

    def draw(machine: Leases) -> st.SearchStrategy[Run]:
        runs = getattr(machine, name)
        good = [run for run in runs if run.lease and machine.rows[run.key].admits(run.lease)]
        return st.sampled_from(good or runs) | st.sampled_from(runs)

    return st.runner().flatmap(draw)


class Leases(RuleBasedStateMachine):
    """:param open_: opens the store under test."""

    #: Whether there are states, and entries of a schedule.
    has_states = True

    def __init__(self, open_: Callable[[], SqlStore]) -> None:
        super().__init__()
        self.open = open_
        self.store: Any = open_()
        self.clear()
        self.rows: dict[str, ModelRow] = {}
        #: Runs of living processes: also those that were lost or ended, and do not know.
        self.runs: list[Run] = []
        self.recoveries: list[Run] = []
        self.dead: set[str] = set()
        self.nonce = 0
        #: Every lease that was ever handed out.
        self.leases: list[Lease] = []
        #: What the leaders among the holders have recorded of their schedules' entries.
        self.entries: dict[str, str] = {}
        self.accepted = dict.fromkeys(KEYS, 0)
        self.highest = dict.fromkeys(KEYS, 0)

    def teardown(self) -> None:
        self.store.close()

    def clear(self) -> None:
        self.store._change(f"DELETE FROM {self.store.table.fullname}", {})

    def table(self) -> Any:
        name = self.store._sql.words.key
        return self.store._rows(f"SELECT * FROM {self.store.table.fullname} ORDER BY {name}", {})

    def row(self, key: str) -> Row:
        row = self.store.peek(key)
        assert row is not None
        return row

    @property
    def asking(self) -> list[Run]:
        return [run for run in self.runs if run.lease is None]

    @property
    def leased(self) -> list[Run]:
        return [run for run in self.runs if run.lease is not None]

    @property
    def unanswered(self) -> list[Run]:
        return [run for run in self.runs if run.repeat is not None]

    # -- to acquire

    @rule(
        process=st.sampled_from(PROCESSES),
        key=st.sampled_from(KEYS),
        late=SELDOM,
        answered=MOSTLY,
    )
    def acquire(self, process: int, key: str, late: bool, answered: bool) -> None:
        self.let_run_out(key, late)
        self.nonce += 1
        run = Run(key, f"host:{process}:{self.nonce}", process)
        if self.ask(run, answered) or not answered:
            self.runs.append(run)

    @precondition(lambda self: self.asking)
    @rule(run=one_of("asking"), late=SELDOM)
    def acquire_again(self, run: Run, late: bool) -> None:
        """Its answer was lost; what the lost request acquired may be another's by now."""
        self.let_run_out(run.key, late)
        if not self.ask(run, answered=True):
            self.runs.remove(run)

    def ask(self, run: Run, answered: bool) -> bool:
        acquires = self.rows.setdefault(run.key, ModelRow()).acquire(run.holder)
        before = self.table()
        acquired = self.store.acquire(run.key, run.holder, LIFE, f"task of {run.holder}")
        assert (acquired is not None) == acquires
        if acquired is None:
            assert self.table() == before
            return False
        assert acquired.lease == Lease(run.key, run.holder, self.rows[run.key].fence, LIFE)
        self.leases.append(acquired.lease)
        if answered:
            run.lease, run.n = acquired.lease, counted(acquired.value)
            run.history = json.loads(acquired.history or "[]")
        return True

    # -- to write

    @precondition(lambda self: self.has_states and self.leased)
    @rule(run=one_of("leased"), late=SELDOM, in_transaction=st.booleans(), answered=MOSTLY)
    def save(self, run: Run, late: bool, in_transaction: bool, answered: bool) -> None:
        self.let_run_out(run.key, late)
        run.n += 1
        self.send_save(run, run.n, in_transaction)
        again = partial(self.send_save, run, run.n, in_transaction, repeated=True)
        run.repeat = None if answered else again

    def send_save(self, run: Run, n: int, in_transaction: bool, repeated: bool = False) -> None:
        row = self.rows[run.key]
        before = self.table()
        if in_transaction:
            self.save_and_roll_back(run, n)
            assert self.table() == before
            with self.store.transaction() as transaction:
                saved = transaction.save(run.lease, state(n))
        else:
            saved = self.store.save(run.lease, state(n))
        assert (saved is not None) == row.admits(run.lease)
        if saved is None:
            assert self.table() == before
            return
        assert row.n == (n if repeated else n - 1), "an update was lost"
        assert self.row(run.key).updated_at == saved.updated_at
        self.accepted[run.key] += not repeated
        row.n, row.expired = n, False

    def save_and_roll_back(self, run: Run, n: int) -> None:
        with contextlib.suppress(Rollback), self.store.transaction() as transaction:
            saved = transaction.save(run.lease, state(n))
            assert (saved is not None) == self.rows[run.key].admits(run.lease)
            raise Rollback

    @precondition(lambda self: self.leased)
    @rule(
        run=one_of("leased"),
        saves=st.booleans(),
        late=SELDOM,
        hold=st.sampled_from([0.0, LIFE]),
        answered=MOSTLY,
    )
    def release(self, run: Run, saves: bool, late: bool, hold: float, answered: bool) -> None:
        self.let_run_out(run.key, late)
        saves = saves and self.has_states
        run.n += saves
        outcome = "succeeded" if saves else "failed"
        new = state(run.n) if saves else None
        self.send_release(run, outcome, new, hold)

        def again() -> None:
            """Refused, it finds in the history whether it was done."""
            assert not self.send_release(run, outcome, new, hold)
            history = json.loads(self.row(run.key).history or "[]")
            ends = [end for end in history if end[:2] == [run.lease.fence, run.holder]]
            assert len(ends) == run.ended

        run.repeat = None if answered else again

    def send_release(
        self, run: Run, outcome: str, new: NewValue | None = None, hold: float = 0.0
    ) -> bool:
        lease, row = run.lease, self.rows[run.key]
        history = [*run.history, [lease.fence, lease.holder, outcome]]
        before = self.table()
        released = self.store.release(lease, Ended(outcome, json.dumps(history), hold), new)
        assert (released is not None) == row.admits(lease)
        if released is None:
            assert self.table() == before
            return False
        if new is not None:
            assert row.n == counted(new.value) - 1, "an update was lost"
            self.accepted[run.key] += 1
            row.n += 1
        row.release(history, hold)
        run.ended = True
        return True

    @precondition(lambda self: self.unanswered)
    @rule(run=st.runner().flatmap(lambda machine: st.sampled_from(machine.unanswered[::-1])))
    def write_again(self, run: Run) -> None:
        assert run.repeat is not None
        run.repeat()

    @precondition(lambda self: self.leased)
    @rule(run=one_of("leased"), late=SELDOM, all_renew=st.booleans())
    def renew(self, run: Run, late: bool, all_renew: bool) -> None:
        """Whoever ever had a lease may believe in it still; one for each key is right, at most."""
        self.let_run_out(run.key, late)
        self.send_renewals(self.leases if all_renew else [run.lease])

    def send_renewals(self, leases: list[Lease]) -> None:
        right = {lease.key for lease in leases if self.rows[lease.key].admits(lease)}
        before = self.table()
        assert self.store.renew(leases) == dict.fromkeys(right)
        after = self.table()
        for old, new in zip(before, after, strict=True):
            assert old[0] in right or old == new
        for key in right:
            self.rows[key].expired = False

    @precondition(lambda self: self.has_states and self.leased)
    @rule(run=one_of("leased"), late=SELDOM, renews_only=st.booleans())
    def record(self, run: Run, late: bool, renews_only: bool) -> None:
        """As the leading beat does, of whose schedule the lease is."""
        self.let_run_out(run.key, late)
        self.nonce += 1
        entries = {} if renews_only else {f"{run.key}:{name}": str(self.nonce) for name in "ab"}
        before = self.table()
        now = self.store.entries.record(run.lease, entries)
        assert (now is not None) == self.rows[run.key].admits(run.lease)
        if now is None:
            assert self.table() == before
            return
        self.rows[run.key].expired = False
        self.entries |= entries

    @precondition(lambda self: self.leased and self.entries)
    @rule(run=one_of("leased"), late=SELDOM)
    def forget(self, run: Run, late: bool) -> None:
        self.let_run_out(run.key, late)
        key = f"{run.key}:a"
        self.store.entries.forget(run.lease, [key])
        if self.rows[run.key].admits(run.lease):
            self.entries.pop(key, None)

    @precondition(lambda self: self.leases)
    @rule(key=st.sampled_from(KEYS), wrong=st.sampled_from(["key", "fence", "holder"]))
    def write_with_parts_of_a_lease(self, key: str, wrong: str) -> None:
        """After a backup was restored, say, two leases can have the same fence."""
        row = self.rows.get(key, ModelRow())
        lease = Lease(key, row.holder or "nobody", row.fence, LIFE)
        lease = replace(lease, **{wrong: row.fence + 1 if wrong == "fence" else "another"})
        before = self.table()
        assert self.store.release(lease, Ended("wrong", "[]")) is None
        assert self.store.release(lease, Ended("wrong", "[]", LIFE)) is None
        assert self.store.renew([lease]) == {}
        if self.has_states:
            assert self.store.save(lease, state(-1)) is None
            assert self.store.release(lease, Ended("wrong", "[]", LIFE), state(-1)) is None
            assert self.store.entries.record(lease, {f"{key}:a": "wrong"}) is None
            self.store.entries.forget(lease, [f"{key}:a"])
        assert self.table() == before

    # -- what happens to them

    def let_run_out(self, key: str, late: bool) -> None:
        """Time passes; a holder that is paused meanwhile is in no way told."""
        row = self.rows.get(key)
        if not late or row is None or row.holder is None:
            return
        self.move_back(key)
        row.run_out()

    def move_back(self, key: str) -> None:
        """The row's times."""
        # UTC, which MariaDB need not be told, and does not understand.
        zone = "" if self.store.engine.dialect.name == "mysql" else "+00:00"
        for moment in ("acquired_at", "expires_at"):
            self.store._change(
                f"UPDATE {self.store.table.fullname} SET {moment} = '{LONG_AGO}{zone}'"
                f" WHERE {self.store._sql.words.key} = '{key}' AND {moment} IS NOT NULL",
                {},
            )

    @precondition(lambda self: self.runs)
    @rule(run=one_of("runs"), recovers=st.booleans(), reopens=SELDOM)
    def crash(self, run: Run, recovers: bool, reopens: bool) -> None:
        """A process never writes again, and leaves the names of its holders behind."""
        self.dead |= {other.holder for other in self.runs if other.process == run.process}
        self.runs = [other for other in self.runs if other.process != run.process]
        if recovers:
            self.find_what_the_dead_held()
        # What is in memory dies with its process, and its store with it.
        if reopens and self.outlives_its_process():
            self.store.close()
            self.store = self.open()

    def outlives_its_process(self) -> bool:
        return not is_in_memory(self.store.engine.url)

    def find_what_the_dead_held(self) -> None:
        """The first half of a recovery; several can be on their way at once."""
        for listed in self.store.list(""):
            row = self.store.peek(listed.key)
            assert row is not None
            if row.holder in self.dead:
                run = Run(row.key, row.holder, history=json.loads(row.history or "[]"))
                run.lease = Lease(row.key, row.holder, row.fence, 0)
                self.recoveries.append(run)

    @precondition(lambda self: self.recoveries)
    @rule(run=one_of("recoveries"), answered=MOSTLY)
    def free_what_the_dead_held(self, run: Run, answered: bool) -> None:
        """The other half: by now it can be free, or another's."""
        self.send_release(run, "lost")
        if answered:
            self.recoveries.remove(run)

    # -- what always holds

    @invariant()
    def the_rows_are_the_models(self) -> None:
        for key in KEYS:
            row, model = self.store.peek(key), self.rows.get(key)
            if row is None or model is None:
                assert row is model
                continue
            seen = {name: getattr(row, name) for name in model.seen()}
            assert seen == model.seen()
            assert (row.expires_in is None) == (row.holder is None)
            self.nothing_is_lost(row)

    def nothing_is_lost(self, row: Row) -> None:
        """What follows from the rules, without the model."""
        assert row.fence >= self.highest[row.key]
        self.highest[row.key] = row.fence
        assert counted(row.value) == self.accepted[row.key]
        assert len(json.loads(row.history or "[]")) == row.run_count

    @invariant()
    def the_entries_are_the_models(self) -> None:
        if not self.has_states:
            return
        found = [self.store.entries.load(f"{key}:") for key in KEYS]
        assert found[0] | found[1] == self.entries

    @invariant()
    def no_fence_is_given_to_two(self) -> None:
        given = {(lease.key, lease.fence, lease.holder) for lease in self.leases}
        assert len(given) == len({(key, fence) for key, fence, _ in given})


class RedisLeases(Leases):
    """The same of leases whose singletons have no state."""

    has_states = False

    def clear(self) -> None:
        with self.store._scripts._make_client() as client:
            client.flushdb()

    def table(self) -> Any:
        with self.store._scripts._make_client() as client:
            return {key: client.hgetall(key) for key in client.zrange(INDEX, 0, -1)}

    def move_back(self, key: str) -> None:
        with self.store._scripts._make_client() as client:
            for moment in ("acquired_at", "expires_at"):
                if client.hexists(key, moment):
                    client.hset(key, moment, "946684800.000000")

    def outlives_its_process(self) -> bool:
        return True


def opener(url: str) -> Callable[[], SqlStore]:
    return lambda: open_store(url, "kv_store", io_timeout=10.0, pool_size=2, auto_migrate=True)


def test_any_order_of_steps(store_url: str, request: pytest.FixtureRequest) -> None:
    open_ = opener(store_url)
    few = request.node.callspec.params["store_url"] in ("mariadb", "pgbouncer")
    steps = FEW if few else SETTINGS
    run_state_machine_as_test(lambda: Leases(open_), settings=steps)


def test_any_order_of_steps_in_redis(lease_url: str) -> None:
    run_state_machine_as_test(
        lambda: RedisLeases(lambda: RedisStore(lease_url, io_timeout=10.0)), settings=SETTINGS
    )


def test_the_steps_find_a_fault_in_redis(lease_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = "if other ~= holder or last ~= fence then"
    assert check in redis_scripts.RELEASE
    wrong = redis_scripts.RELEASE.replace(check, "if other ~= holder then")
    monkeypatch.setattr(redis_scripts, "RELEASE", wrong)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            lambda: RedisLeases(lambda: RedisStore(lease_url, io_timeout=10.0)),
            settings=TO_THE_FIRST_FAILURE,
        )


#: Of one statement each: what is replaced in its text, and by what.
FAULTS = {
    "acquire takes a held lease": ("acquire", "WHERE mine.holder IS NULL", "WHERE 1 = 1"),
    "acquire raises no fence": ("acquire", "coalesce(mine.fence, 0) + 1", "mine.fence"),
    "acquire again raises the fence": ("acquire", "THEN mine.fence", "THEN mine.fence + 1"),
    "save without the key": ("save", "key = :key AND", ""),
    "save without the fence": ("save", "AND fence = :fence", ""),
    "save without the holder": ("save", "AND holder = :holder", ""),
    "save in time only": ("save", "WHERE", "WHERE expires_at > '2001-01-01' AND"),
    "release without the fence": ("release", "AND fence = :fence", ""),
    "release without the holder": ("release", "AND holder = :holder", ""),
    "release without an end to it": ("release", "holder = NULL", "holder = holder"),
    "a hold is its holder's still": ("release", f"holder || '{HELD_ON}'", "holder"),
    "a hold counts from the release": ("release", "acquired_at, :hold", "'now', :hold"),
    "renew without the fence": ("renew", "AND fence = held_fence", ""),
    "renew without the holder": ("renew", "AND holder = held_holder", ""),
    "record without the fence": ("record", "AND fence = :fence", ""),
    "record without the holder": ("record", "AND holder = :holder", ""),
    "record without a renewal": ("record", "expires_at = excluded.expires_at,", ""),
    "forget without the fence": ("forget", "AND fence = :fence", ""),
    "forget without the holder": ("forget", "AND holder = :holder", ""),
}


def plant(store: SqlStore, statement: str, right: str, wrong: str) -> SqlStore:
    texts = vars(store._sql)
    found = texts[statement]
    assert right in str(found)
    if isinstance(found, dict):
        texts[statement] = {kind: text.replace(right, wrong) for kind, text in found.items()}
    else:
        texts[statement] = found.replace(right, wrong)
    return store


@pytest.mark.parametrize("fault", FAULTS)
def test_the_steps_find_a_fault(fault: str) -> None:
    """What finds none in a store that has one says nothing about a store where it finds none."""
    open_ = opener("memory://")
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            lambda: Leases(lambda: plant(open_(), *FAULTS[fault])), settings=TO_THE_FIRST_FAILURE
        )
