"""A test of the lease's protocol on every store, in random orders of steps, against a model.

Processes acquire, write, release, die, are paused until their lease expires, and give back leases
that they may hold without knowing. Others release leases in another's name, request handoffs, queue
messages and remove rows. Each request is answered, is carried out without an answer, is not carried
out, or is parked. A parked request is carried out at any later step: after it was repeated and
answered, after its run ended, after its process died, or after other runs. Clients follow section 3
of tests/spec/PROTOCOL.md.

After every step the store must have answered as :class:`~tests.stores.model.Model` does, its rows
must equal the model's rows, and the invariants of PROTOCOL.md's section 4 must hold. No test waits
for an expiry: the row's times are moved into the past instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Ended, Lease, Row, Write
from celery_singleton_state.store.redis import scripts
from celery_singleton_state.store.redis.store import INDEX, RedisStore
from celery_singleton_state.store.sql.engine import is_in_memory
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.waiting import wait_until
from tests.stores.faults import BRIEFLY, FAULTS, REDIS_BRIEFLY, REDIS_FAULTS, plant
from tests.stores.model import (
    FIRST,
    LONG,
    Model,
    Request,
    Run,
    State,
    decoded,
    fence_is_right,
)

#: Whether all faults are planted; by default only a few are.
WHOLE = os.environ.get("SINGLETON_TEST_SPEC") == "whole"
KEYS = ("k1", "k2")
ANY_KEY = st.sampled_from(("k1", "k1", "k1", "k2"))
PROCESSES = (1, 2, 3)
#: What can happen to a request. If a request is repeated, its first copy is parked, and its second
#: copy is answered.
FATES = st.sampled_from(
    ("answered", "answered", "repeated", "repeated", "unanswered", "never", "parked")
)
SELDOM = st.sampled_from([False, False, True])
LONG_AGO = "2000-01-01 00:00:00.000"
#: How far a fence is moved ahead of the clock, in milliseconds: an hour.
AHEAD = 3_600_000
#: How many past runs the history of a row holds.
HISTORY = 2
#: The errors that show that a fault was found. ``Flaky`` is one of them, because Hypothesis raises
#: it for a fault that depends on the clock's milliseconds, and so does not show at each repetition.
FOUND = (AssertionError, Flaky)
#: Stands for the answer to a request that was not answered.
UNKNOWN = object()

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    stateful_step_count=40,
    report_multiple_bugs=False,
)
#: Settings with fewer examples, for the slow stores: MariaDB, where each step needs several
#: statements and commits; PostgreSQL, which ``tox -e spec`` tests as long as the other stores; and
#: PgBouncer, behind which the tests reach the same PostgreSQL again.
FEW = settings(SETTINGS, max_examples=20)
#: Settings for finding a planted fault: Hypothesis stops at the first failure, and does not search
#: for a shorter example.
TO_THE_FIRST_FAILURE = settings(SETTINGS, max_examples=3000, phases=[Phase.generate])


class Rollback(Exception):
    """An error that a body raises within a transaction, so that it is rolled back."""


@dataclass(eq=False)
class Sender:
    """A process that sends a message with ``enqueue_once``."""

    key: str
    task_id: str
    #: The queue's number that the sender has read, and names in its claim.
    number: int
    #: The sender's claim, if it was sent and not answered yet.
    claim: Request | None = None


def one_of(name: str) -> st.SearchStrategy[Any]:
    """Choose an item of the machine's list with this name, for example a run; most often one of the
    last two.
    """

    def draw(machine: Leases) -> st.SearchStrategy[Any]:
        found = getattr(machine, name)
        return st.sampled_from(found[-2:]) | st.sampled_from(found)

    return st.runner().flatmap(draw)


def all_but_one_part(lease: Any) -> list[Any]:
    """Return copies of a lease, or of a row, with the key, the fence or the holder changed."""
    return [
        replace(lease, key="another"),
        replace(lease, fence=lease.fence + 1),
        replace(lease, holder="another"),
    ]


class Leases(RuleBasedStateMachine):
    """A machine that takes random steps on a store and on the model, and compares them.

    :param open_: opens the store under test.
    :param closes: whether each example opens and closes a store of its own. If false, all examples
        use the same store.
    """

    #: Whether the store has states and schedule entries.
    has_states = True

    def __init__(self, open_: Callable[[], Any], closes: bool = True) -> None:
        super().__init__()
        self.open, self.closes = open_, closes
        self.store: Any = open_()
        self.clear()
        self.model = Model()
        self.nonce = 0
        self.parked: list[Request] = []
        #: Runs of living processes whose deliveries have not ended.
        self.runs: list[Run] = []
        #: Ended runs of living processes, which give back these runs' leases until the store
        #: answers.
        self.to_give_back: list[Run] = []
        #: The holders of dead processes; and those of them that no recovery has looked for yet.
        self.dead: set[str] = set()
        self.unchecked: set[str] = set()
        #: Releases that recoveries send in the names of dead holders, and that were not answered.
        self.recoveries: list[Request] = []
        #: All leases of which any run has ever known.
        self.leases: list[Lease] = []
        self.senders: list[Sender] = []
        #: Messages that were sent and have not run yet, as pairs of key and id.
        self.messages: list[tuple[str, str]] = []
        #: Messages that asked a holder to hand over, each as key, id and rank.
        self.ranked: list[tuple[str, str, int]] = []
        #: Pending runs that were recorded and may have been sent, as pairs of key and pending run.
        self.recorded: list[tuple[str, str]] = []
        # Only the invariants use these: messages for which a lease was acquired or which were
        # dequeued, holders whose successful release took effect, the largest fence that a body of
        # each key had, and all fences.
        self.settled: set[str] = set()
        self.saved: set[str] = set()
        self.largest = dict.fromkeys(KEYS, 0)
        self.fences: dict[tuple[str, int], str] = {}
        self.progress = dict.fromkeys(KEYS, State())
        self.items = dict.fromkeys(KEYS, 0)

    def teardown(self) -> None:
        if self.closes:
            self.store.close()

    # -- the store under test

    def clear(self) -> None:
        self.store._change(f"DELETE FROM {self.store.table.fullname}", {})
        self.store._change("CREATE TABLE IF NOT EXISTS business (of_key varchar(9), item int)", {})
        self.store._change("DELETE FROM business", {})

    def table(self) -> Any:
        name = self.store._sql.key
        return self.store._rows(f"SELECT * FROM {self.store.table.fullname} ORDER BY {name}", {})

    def hidden(self) -> dict[str, tuple[Any, ...]]:
        """Return a dict that maps each key to the values that no method of the store shows: the
        queue's number and the queued message.
        """
        sql = self.store._sql
        rows = self.store._rows(
            f"SELECT {sql.key}, coalesce(queue, 0),"
            f" CASE WHEN queued_until > {sql.now} THEN queued_task_id END"
            f" FROM {sql.table} WHERE fence IS NOT NULL",
            {},
        )
        return {key: tuple(hidden) for key, *hidden in rows}

    def business(self) -> list[tuple[str, int]]:
        return [tuple(row) for row in self.store._rows("SELECT of_key, item FROM business", {})]

    def set_column(self, key: str, name: str, value: str) -> None:
        """Set a column of a key's row, unless the column is null."""
        self.store._change(
            f"UPDATE {self.store.table.fullname} SET {name} = {value}"
            f" WHERE {self.store._sql.key} = '{key}' AND {name} IS NOT NULL",
            {},
        )

    def move_back(self, key: str) -> None:
        """Move the times of a key's row into the past. The times are in UTC; MariaDB rejects a
        suffix that says so.
        """
        zone = "" if self.store.engine.dialect.name == "mysql" else "+00:00"
        for name in ("acquired_at", "expires_at", "hold_until", "queued_until"):
            self.set_column(key, name, f"'{LONG_AGO}{zone}'")

    def outlives_its_process(self) -> bool:
        return not is_in_memory(self.store.engine.url)

    def row(self, key: str) -> Row | None:
        found: Row | None = self.store.peek(key)
        return found

    # -- carrying requests out

    def carry_out(self, request: Request) -> Any:
        """Carry out a request on the store and on the model; compare their answers, and return the
        answer.
        """
        refused = self.model.refuses(request)
        before = self.table() if refused else None
        if request.verb == "acquire":
            answer, expected = self.carry_out_acquire(*request.arguments)
        elif request.item is not None:
            answer, expected = self.carry_out_transaction(request)
        else:
            answer = self.verb(request.verb)(*request.arguments)
            expected = getattr(self.model, request.verb)(*request.arguments)
            if request.verb == "record":
                answer = answer and True
        assert answer == expected, f"{request}: {answer} is not {expected}"
        if refused:
            assert self.table() == before, f"{request} was refused, but changed the table"
        else:
            self.note(request)
        return answer

    def verb(self, name: str) -> Callable[..., Any]:
        rooms = [self.store, self.store.requests]
        if self.has_states:
            rooms.append(self.store.entries)
        for room in rooms:
            if hasattr(room, name):
                found: Callable[..., Any] = getattr(room, name)
                return found
        raise AttributeError(name)

    def carry_out_acquire(
        self,
        key: str,
        holder: str,
        ttl: float,
        task_id: str | None,
        rank: int,
        sent: str | None,
        task: str,
    ) -> tuple[Any, Any]:
        row = self.model.seen(key)
        again, last, before = row.holder == holder, row.rank, self.row(key)
        earliest = time.time()
        answer = self.store.acquire(key, holder, ttl, task_id, rank, sent, task)
        latest = time.time()
        expected = self.model.acquire(key, holder, ttl, task_id, rank, sent, task, answer)
        if answer and again:
            assert before is not None
            assert answer.acquired_at == before.acquired_at
        elif answer:
            assert fence_is_right(answer.lease.fence, last, earliest, latest), answer
            assert self.fences.setdefault((key, answer.lease.fence), holder) == holder
            self.settled.add(str(task_id))
        return answer, expected

    def carry_out_transaction(self, request: Request) -> tuple[Any, Any]:
        """Carry out a transaction that writes a business row, up to its COMMIT or its rollback."""
        lease, write = request.arguments
        answer = None
        with contextlib.suppress(Rollback), self.store.transaction() as transaction:
            transaction.connection.exec_driver_sql(
                f"INSERT INTO business VALUES ('{lease.key}', {request.item})"
            )
            answer = transaction.save(lease, write)
            if answer is None or not request.commits:
                raise Rollback
        if request.commits:
            expected = self.model.save(lease, write)
            self.items[lease.key] += expected is not None
        else:
            expected = None if self.model.refuses(request) else answer
        return answer, expected

    def note(self, request: Request) -> None:
        """Record the facts about a carried-out request that the invariants need."""
        if request.verb == "request_run":
            row, pending = request.arguments
            self.recorded.append((row.key, pending))
        if request.verb == "dequeue":
            self.settled.add(request.arguments[1])
        if request.verb == "release":
            lease, ended = request.arguments[:2]
            if ended.outcome == "succeeded":
                self.saved.add(lease.holder)
            for run in self.runs:
                # An operator may have released the lease while its body runs. Then a second body is
                # allowed.
                run.trusts = run.trusts and run.holder != lease.holder

    def send(self, request: Request, fate: str) -> Any:
        """Send a request.

        :return: the answer, or :data:`UNKNOWN` if the client gets none.
        """
        if fate in ("parked", "repeated"):
            self.parked.append(request)
        if fate in ("parked", "never"):
            return UNKNOWN
        answer = self.carry_out(request)
        return UNKNOWN if fate == "unanswered" else answer

    @precondition(lambda self: self.parked)
    @rule(request=one_of("parked"))
    def carry_out_late(self, request: Request) -> None:
        self.parked.remove(request)
        self.carry_out(request)

    @precondition(lambda self: self.parked)
    @rule()
    def carry_out_oldest_late_request(self) -> None:
        self.carry_out(self.parked.pop(0))

    # -- a delivery

    @rule(
        process=st.sampled_from(PROCESSES),
        key=ANY_KEY,
        of_message=st.booleans(),
        ranked=st.booleans(),
        confirms=st.booleans(),
        fate=FATES,
    )
    def deliver(
        self, process: int, key: str, of_message: bool, ranked: bool, confirms: bool, fate: str
    ) -> None:
        """Deliver a message to a process: a new one, a sent one, or again one that asked for the
        lease.
        """
        self.nonce += 1
        rank = 0
        holder = f"host:{process}:{self.nonce}"
        task_id = f"direct {self.nonce}"
        if of_message and self.messages:
            key, task_id = self.messages[-1]
        elif ranked and self.ranked:
            key, task_id, rank = self.ranked[self.nonce % len(self.ranked)]
        run = Run(key, holder, process, task_id, confirms=confirms)
        self.runs.append(run)
        # Sometimes newer messages have overtaken this message, or it was sent from another host.
        number = self.nonce - 4 * (ranked and not rank)
        sent = f"{'host' if process < 3 else 'another'}:{number:020d}"
        arguments = (key, holder, FIRST, task_id, rank, sent, f"task {process}")
        self.ask(run, Request("acquire", arguments), fate)

    def ask(self, run: Run, request: Request, fate: str) -> None:
        """Let a run send a request, and receive the answer if there is one."""
        run.request = request
        answer = self.send(request, fate)
        run.unsure = run.unsure or fate != "answered"
        if answer is not UNKNOWN:
            self.receive(run, request, answer)

    @property
    def unanswered(self) -> list[Run]:
        return [run for run in self.runs if run.request is not None]

    @precondition(lambda self: self.unanswered)
    @rule(run=one_of("unanswered"), fate=FATES)
    def ask_again(self, run: Run, fate: str) -> None:
        if run.phase == "commits":
            return self.ask_whether_committed(run, fate)
        assert run.request is not None
        return self.ask(run, run.request, fate)

    @precondition(lambda self: self.unanswered)
    @rule(run=one_of("unanswered"))
    def give_up(self, run: Run) -> None:
        run.request = None
        if run.phase in ("acquires", "confirms"):
            self.end(run, unsure=True)
        elif run.phase == "releases":
            self.end(run, report="unknown", unsure=True)
        elif run.phase == "commits":
            run.phase, run.undecided = "body", True

    def ask_whether_committed(self, run: Run, fate: str) -> None:
        """Let a run ask the row whether a COMMIT that was not answered took effect."""
        assert run.lease is not None
        committed = self.send(Request("written", (run.lease, run.number)), fate)
        if committed is UNKNOWN:
            return
        run.request = None
        if committed is None:
            self.end(run, report="lost", unsure=True)
        else:
            run.phase = "body"
            if committed:
                run.seen = run.number
            else:
                run.state = run.before

    def receive(self, run: Run, request: Request, answer: Any) -> None:
        unsure, run.request, run.unsure = run.unsure, None, False
        if run.phase == "acquires":
            self.receive_acquire(run, answer, unsure)
        elif run.phase == "confirms" and answer:
            self.begin(run)
        elif run.phase == "confirms":
            self.end(run, unsure=True)
        elif run.phase == "releases":
            self.receive_release(run, answer, unsure)
        elif answer in (None, False):
            self.refused(run)
        else:
            run.seen = run.number
            # A removal of entries does not renew the lease, unlike all other writes.
            run.trusts = run.trusts or request.verb != "forget"

    def receive_acquire(self, run: Run, answer: Any, unsure: bool) -> None:
        if answer is None:
            self.end(run, unsure=unsure)
            return
        run.lease = replace(answer.lease, ttl=LONG)
        run.state, run.seen = decoded(answer.value), answer.write
        run.history = json.loads(answer.history or "[]")
        self.leases.append(run.lease)
        if run.confirms:
            run.phase = "confirms"
            run.request = Request("renew", ([run.lease],))
        else:
            self.begin(run)

    def begin(self, run: Run) -> None:
        assert run.lease is not None
        assert run.lease.fence > self.largest[run.key], "I6: a fence that is not larger"
        self.largest[run.key] = run.lease.fence
        run.phase, run.trusts = "body", True

    def refused(self, run: Run) -> None:
        assert run.lease is not None
        held = self.model.held(run.lease)
        assert held is None, "refused, although no other run has acquired"
        self.end(run, report="lost", unsure=True)

    def end(self, run: Run, report: str = "", unsure: bool = False) -> None:
        """End a delivery.

        :param report: the outcome that the run reports; by default none.
        :param unsure: whether the process may hold the lease without knowing it.
        """
        self.runs.remove(run)
        if unsure:
            self.to_give_back.append(run)
        if report == "saved":
            assert run.holder in self.saved, "I9: reported as saved"
        elif report in ("lost", "failed"):
            assert run.holder not in self.saved, f"I9: reported as {report}"

    # -- a body

    @property
    def ready(self) -> list[Run]:
        """Return the runs whose bodies are running and wait for no answer."""
        return [run for run in self.runs if run.phase == "body" and run.request is None]

    @property
    def writing(self) -> list[Run]:
        return [run for run in self.ready if self.has_states and not run.undecided]

    @precondition(lambda self: self.writing)
    @rule(run=one_of("writing"), overdue=SELDOM, fate=FATES)
    def checkpoint(self, run: Run, overdue: bool, fate: str) -> None:
        self.pass_time(run.key, overdue)
        run.state = replace(run.state, checkpoints=run.state.checkpoints + 1)
        self.ask(run, Request("save", (run.lease, self.next_write(run))), fate)

    def next_write(self, run: Run) -> Write:
        run.number += 1
        return Write(run.number, run.seen, run.state.encoded())

    @precondition(lambda self: self.writing)
    @rule(
        run=one_of("writing"),
        fate=st.sampled_from(("answered", "rolled back", "unanswered", "never", "never")),
        asks=st.booleans(),
    )
    def transaction(self, run: Run, fate: str, asks: bool) -> None:
        """Let a body use a transaction: its block raises, or its COMMIT is answered, is carried out
        without an answer, or is rolled back without an answer.
        """
        run.before = run.state
        run.state = replace(run.state, items=run.state.items + 1)
        write, commits = self.next_write(run), fate in ("answered", "unanswered")
        item = run.state.items
        request = Request("save", (run.lease, write), item=item, commits=commits)
        answer = self.carry_out(request)
        if answer is None:
            self.refused(run)
        elif fate == "answered":
            self.receive(run, request, answer)
        elif fate == "rolled back":
            run.state = run.before
        else:
            run.phase, run.request = "commits", request
            if asks:
                self.ask_whether_committed(run, "answered")

    @precondition(lambda self: self.ready)
    @rule(
        run=one_of("ready"),
        outcome=st.sampled_from(("succeeded", "succeeded", "failed")),
        persists=st.booleans(),
        hold=st.sampled_from((0.0, LONG)),
        overdue=SELDOM,
        fate=FATES,
    )
    def release(
        self, run: Run, outcome: str, persists: bool, hold: float, overdue: bool, fate: str
    ) -> None:
        self.pass_time(run.key, overdue)
        run.outcome = "failed" if run.undecided else outcome
        succeeded = run.outcome == "succeeded"
        write = None
        if self.has_states and not run.undecided and (succeeded or persists):
            run.state = replace(run.state, checkpoints=run.state.checkpoints + succeeded)
            write = self.next_write(run)
        assert run.lease is not None
        history = [*run.history, [run.lease.fence, run.holder, run.outcome]][-HISTORY:]
        # A run that succeeded replaces the record of finished ticks; any other run leaves it.
        ticks_done = f'"{run.lease.fence}"' if succeeded else None
        ended = Ended(run.outcome, json.dumps(history), hold if succeeded else 0.0, ticks_done)
        run.phase = "releases"
        self.ask(run, Request("release", (run.lease, ended, write)), fate)

    def receive_release(self, run: Run, answer: Any, unsure: bool) -> None:
        report = {"succeeded": "saved", "failed": "failed"}[run.outcome]
        if answer is not None:
            self.end(run, report)
        elif unsure:
            self.end(run, self.found_in_history(run, report), unsure=True)
        else:
            self.refused(run)

    def found_in_history(self, run: Run, report: str) -> str:
        """Return what the history says about a run whose repeated release was refused."""
        row = self.row(run.key)
        assert run.lease is not None
        ends = json.loads((row and row.history) or "[]")
        own = [outcome for fence, holder, outcome in ends if holder == run.holder]
        if own:
            return report if own == [run.outcome] else "lost"
        older = [end for end in ends if end[0] < run.lease.fence]
        return "lost" if older or (row and len(ends) < HISTORY) else "unknown"

    @precondition(lambda self: self.ready)
    @rule(run=one_of("ready"))
    def stop_trusting(self, run: Run) -> None:
        self.end(run, report="lost", unsure=True)

    @precondition(lambda self: self.ready)
    @rule(run=one_of("ready"), fate=FATES)
    def heartbeat(self, run: Run, fate: str) -> None:
        answer = self.send(Request("renew", ([run.lease],)), fate)
        if answer is UNKNOWN:
            return
        if answer:
            run.trusts = True
        else:
            self.refused(run)

    @precondition(lambda self: self.leases)
    @rule(fate=FATES)
    def renew_all(self, fate: str) -> None:
        """Renew all leases, as parent processes do for their children. The children may have lost
        or released the leases, and no run receives the answer.
        """
        self.send(Request("renew", (list(self.leases),)), fate)

    @precondition(lambda self: self.writing)
    @rule(run=one_of("writing"), renews_only=SELDOM, fate=FATES)
    def record(self, run: Run, renews_only: bool, fate: str) -> None:
        """Let a run record schedule entries, as a beat does while it leads."""
        self.nonce += 1
        run.number += 1
        entries = {} if renews_only else {f"{run.key}:{name}": str(self.nonce) for name in "ab"}
        self.ask(run, Request("record", (run.lease, entries, run.number, run.seen)), fate)

    @precondition(lambda self: self.writing and self.model.entries)
    @rule(run=one_of("writing"), fate=FATES)
    def forget(self, run: Run, fate: str) -> None:
        run.number += 1
        keys = [f"{run.key}:a"]
        self.ask(run, Request("forget", (run.lease, keys, run.number, run.seen)), fate)

    # -- leases that a process may hold without knowing, or leaves behind

    @precondition(lambda self: self.to_give_back)
    @rule(run=one_of("to_give_back"), fate=FATES)
    def give_back(self, run: Run, fate: str) -> None:
        if self.send(Request("give_back", (run.key, run.holder)), fate) is not UNKNOWN:
            self.to_give_back.remove(run)

    @rule(process=st.sampled_from(PROCESSES), recovers=st.booleans(), reopens=SELDOM)
    def crash(self, process: int, recovers: bool, reopens: bool) -> None:
        """Let a process die: it sends nothing more. The names of its holders are kept for a
        recovery.
        """
        died = [run for run in self.runs + self.to_give_back if run.process == process]
        self.runs = [run for run in self.runs if run.process != process]
        self.to_give_back = [run for run in self.to_give_back if run.process != process]
        self.dead |= {run.holder for run in died}
        self.unchecked |= {run.holder for run in died}
        if recovers:
            self.find_leases_of_the_dead()
        # A store in memory would lose its rows here, so it is not opened again.
        if reopens and self.outlives_its_process():
            self.store.close()
            self.store = self.open()

    def find_leases_of_the_dead(self) -> None:
        """Do the first half of a recovery: find leases of dead processes. Several recoveries can
        overlap.
        """
        self.unchecked.clear()
        for key in KEYS:
            row = self.row(key)
            if row and row.holder in self.dead:
                self.recoveries.append(self.release_of_another(row))

    def release_of_another(self, row: Row) -> Request:
        history = json.loads(row.history or "[]")
        ended = [*history, [row.fence, row.holder, "lost"]][-HISTORY:]
        lease = Lease(row.key, str(row.holder), row.fence, 0)
        return Request("release", (lease, Ended("lost", json.dumps(ended)), None))

    @precondition(lambda self: self.recoveries)
    @rule(request=one_of("recoveries"), fate=FATES)
    def release_lease_of_the_dead(self, request: Request, fate: str) -> None:
        """Do the second half of a recovery. By now the lease can be free, or have another
        holder.
        """
        if self.send(request, fate) is not UNKNOWN:
            self.recoveries.remove(request)

    # -- others

    @rule(key=ANY_KEY, fate=FATES, rivals=st.booleans())
    def request_handoff(self, key: str, fate: str, rivals: bool) -> None:
        """Let a newer message ask the holder to hand over; or let two messages that saw the same
        row ask.
        """
        row = self.row(key)
        if row is None or row.holder is None:
            return
        for _ in range(1 + rivals):
            self.nonce += 1
            who, rank = f"asks {self.nonce}", row.next_rank
            self.ranked.append((key, who, rank))
            sent = f"host:{self.nonce:020d}"
            self.send(Request("request_handoff", (row, who, rank, sent)), fate)

    @precondition(lambda self: self.ranked)
    @rule(message=one_of("ranked"), fate=FATES)
    def ask_with_the_same_rank(self, message: tuple[str, str, int], fate: str) -> None:
        """Let a waiting message ask once more, because its first request was not answered."""
        key, who, rank = message
        row = self.row(key)
        if row is not None and row.held:
            self.send(Request("request_handoff", (row, who, rank, "sent again")), fate)

    @rule(key=ANY_KEY, fate=FATES)
    def free_by_an_operator(self, key: str, fate: str) -> None:
        """Let an operator release a run's lease, or end a hold period."""
        row = self.row(key)
        if row is not None and (row.holder is not None or row.held):
            is_hold = row.in_hold_period
            free = Request("release_early", (row,)) if is_hold else self.release_of_another(row)
            self.send(free, fate)

    @rule(key=ANY_KEY, fate=FATES, rivals=st.booleans())
    def request_run(self, key: str, fate: str, rivals: bool) -> None:
        """Let a conflict record a pending run; or let two conflicts that saw the same row do so."""
        row = self.row(key)
        if row is None or not row.held:
            return
        for _ in range(1 + rivals):
            self.nonce += 1
            self.send(Request("request_run", (row, f"pending {self.nonce}")), fate)

    @precondition(lambda self: self.recorded)
    @rule(pending=one_of("recorded"), fate=FATES)
    def remove_sent_pending_run(self, pending: tuple[str, str], fate: str) -> None:
        if self.send(Request("pending_run_sent", pending), fate) is not UNKNOWN:
            self.recorded.remove(pending)

    @precondition(lambda self: self.has_states)
    @rule(key=ANY_KEY, fate=FATES)
    def put(self, key: str, fate: str) -> None:
        """Let an operator change a state from outside a run."""
        row = self.row(key)
        state = decoded(row.value if row else "null")
        new = replace(state, checkpoints=state.checkpoints + 1).encoded()
        self.send(Request("put", (key, row, new)), fate)

    @rule(key=ANY_KEY)
    def read_queue(self, key: str) -> None:
        """Let a sender read the queue, so that it can claim later. A sender claims only if it has
        read that no message is queued or running.
        """
        queued = self.carry_out(Request("queued", (key,)))
        if queued.task_id is None:
            self.nonce += 1
            self.senders.append(Sender(key, f"message {self.nonce}", queued.number))

    @precondition(lambda self: self.senders)
    @rule(sender=one_of("senders"), fate=FATES, first=st.booleans())
    def claim(self, sender: Sender, fate: str, first: bool) -> None:
        request = Request(
            "claim", (sender.key, sender.task_id, LONG, sender.number, first, "sender's task")
        )
        answer = self.send(request, fate)
        if answer is not UNKNOWN:
            self.senders.remove(sender)
        if answer is True:
            self.messages.append((sender.key, sender.task_id))

    @precondition(lambda self: self.senders)
    @rule(sender=one_of("senders"))
    def publish_without_an_answer(self, sender: Sender) -> None:
        self.senders.remove(sender)
        self.messages.append((sender.key, sender.task_id))

    @precondition(lambda self: self.messages)
    @rule(message=one_of("messages"), fate=FATES)
    def revoke_and_dequeue(self, message: tuple[str, str], fate: str) -> None:
        if self.send(Request("dequeue", message), fate) is not UNKNOWN:
            self.messages.remove(message)

    # -- time, clocks and rows

    @rule(key=ANY_KEY)
    def let_expire(self, key: str) -> None:
        self.pass_time(key, True)

    def pass_time(self, key: str, longer_than_any_life: bool) -> None:
        """Let all times of a key expire. A holder that is paused meanwhile does not learn that."""
        if longer_than_any_life and key in self.model.rows:
            self.move_back(key)
            self.model.rows[key].expire()
            for run in self.runs:
                run.trusts = run.trusts and run.key != key

    @rule(key=ANY_KEY)
    def set_clock_back(self, key: str) -> None:
        """Let the store's clock go back. The test cannot set the clock, so it moves the row's fence
        ahead.
        """
        row = self.model.rows.get(key)
        if row and row.holder is None:
            row.fence += AHEAD
            self.set_column(key, "fence", str(row.fence))

    @rule(key=ANY_KEY)
    def prune(self, key: str) -> None:
        """Prune a key. Forget the late claims and puts for this key, because PROTOCOL.md promises
        nothing about requests that are later than the pruned row's age.
        """
        row = self.model.rows.get(key)
        if row is None or row.fence > time.time() * 1000 + AHEAD / 2:
            return
        wait_until(lambda: time.time() * 1000 > row.fence + 2, "the clock moves on")
        if self.carry_out(Request("prune", ([key], 0.0))):
            self.parked = [
                request
                for request in self.parked
                if request.key != key or request.verb not in ("claim", "put")
            ]
            self.senders = [sender for sender in self.senders if sender.key != key]
            self.progress[key], self.items[key] = State(), 0
            if self.has_states:
                self.store._change(f"DELETE FROM business WHERE of_key = '{key}'", {})

    @precondition(lambda self: self.model.rows)
    @rule(key=ANY_KEY)
    def write_with_parts_of_a_lease(self, key: str) -> None:
        """Send requests in which one of three parts of a lease (key, fence, holder) is wrong."""
        row = self.model.seen(key)
        lease = Lease(key, row.holder or "no holder", row.fence, LONG)
        write = Write(row.write + 1, row.write, State(checkpoints=-1).encoded())
        for wrong in all_but_one_part(lease):
            self.refuse(
                Request("release", (wrong, Ended("wrong", "[]"))),
                Request("release", (wrong, Ended("wrong", "[]", LONG))),
                Request("renew", ([wrong],)),
            )
            if self.has_states:
                entries, order = {f"{key}:a": "wrong"}, (write.number, write.seen)
                self.refuse(
                    Request("save", (wrong, write)),
                    Request("written", (wrong, 0)),
                    Request("release", (wrong, Ended("wrong", "[]", LONG), write)),
                    Request("record", (wrong, entries, *order)),
                    Request("forget", (wrong, [f"{key}:a"], *order)),
                )

    @precondition(lambda self: self.model.rows)
    @rule(key=ANY_KEY)
    def request_with_parts_of_a_seen_row(self, key: str) -> None:
        row = self.row(key)
        if row is None:
            return
        for wrong in all_but_one_part(row):
            self.refuse(
                Request("request_handoff", (wrong, "wrong", row.next_rank, None)),
                Request("request_run", (wrong, "wrong")),
                Request("release_early", (wrong,)),
            )
        self.refuse(Request("pending_run_sent", (key, "another")))
        if not row.in_hold_period:
            self.refuse(Request("release_early", (row,)))
        if self.has_states:
            other = replace(row, fence=row.fence + 1)
            self.refuse(Request("put", (key, other, State(checkpoints=-1).encoded())))

    def refuse(self, *requests: Request) -> None:
        for request in requests:
            assert not self.carry_out(request)

    @precondition(lambda self: self.has_states)
    @rule(key=ANY_KEY)
    def write_after_commits_were_lost(self, key: str) -> None:
        """Send writes of a holder that has seen a newer write than the row has, because the
        database has lost that write.
        """
        row = self.model.seen(key)
        if row.holder is None:
            return
        lease = Lease(key, row.holder, row.fence, LONG)
        write = Write(row.write + 2, row.write + 1, State(checkpoints=-1).encoded())
        self.refuse(
            Request("save", (lease, write)),
            Request("save", (lease, write), item=0),
            Request("release", (lease, Ended("wrong", "[]"), write)),
            Request("record", (lease, {f"{key}:a": "wrong"}, write.number, write.seen)),
            Request("forget", (lease, [f"{key}:a"], write.number, write.seen)),
        )

    # -- invariants

    @invariant()
    def the_rows_are_the_models(self) -> None:
        hidden = self.hidden()
        for key in KEYS:
            row, model = self.row(key), self.model.rows.get(key)
            if row is None or model is None:
                assert row is model
                continue
            assert {name: getattr(row, name) for name in model.seen()} == model.seen()
            assert hidden[key] == model.hidden()
            self.lives_as_long(row, model.life)
            self.is_known(row)
            self.makes_progress(row)

    def lives_as_long(self, row: Row, life: float) -> None:
        if row.holder is None and not life:
            assert row.expires_in is None
        else:
            assert row.expires_in is not None
            assert life - FIRST / 2 < row.expires_in < life + 1 or (not life and not row.held)

    def is_known(self, row: Row) -> None:
        """Check I4: no lease outlasts one first life unless some process will end it."""
        if row.in_hold_period or row.expires_in is None or row.expires_in <= FIRST + 1:
            return
        known = {run.holder for run in self.runs + self.to_give_back} | self.unchecked
        known |= {request.arguments[0].holder for request in self.recoveries}
        assert row.holder in known, "I4: no process knows of this lease"

    def makes_progress(self, row: Row) -> None:
        """Check I2: no state is older than the state before it."""
        before, now = self.progress[row.key], decoded(row.value)
        assert now.checkpoints >= before.checkpoints
        assert now.items >= before.items
        self.progress[row.key] = now

    @invariant()
    def rows_and_state_agree(self) -> None:
        """Check I3: the business rows and the state agree."""
        if not self.has_states:
            return
        found = sorted(self.business())
        expected = [
            (key, item)
            for key in KEYS
            for item in range(1, decoded(self.model.seen(key).value).items + 1)
        ]
        assert found == expected

    @invariant()
    def one_body_trusts(self) -> None:
        """Check I5: at most one body of each key trusts its lease."""
        trusting = [run.key for run in self.runs if run.trusts]
        assert len(trusting) == len(set(trusting))

    @invariant()
    def no_finished_message_is_queued(self) -> None:
        """Check I8: no finished message counts as queued."""
        for row in self.model.rows.values():
            assert not (row.queued and row.queued_task_id in self.settled)

    @invariant()
    def the_entries_are_the_models(self) -> None:
        if self.has_states:
            found = self.store.entries.load("k")
            entries = {key: value for key, value in found.items() if ":" in key}
            assert entries == self.model.entries


class RedisLeases(Leases):
    """The machine for leases in Redis, whose singletons have no state."""

    has_states = False

    @property
    def server(self) -> Any:
        return self.store._scripts._make_client()

    def clear(self) -> None:
        with self.server as server:
            server.flushdb()

    def table(self) -> Any:
        with self.server as server:
            return {key: server.hgetall(key) for key in server.zrange(INDEX, 0, -1)}

    def hidden(self) -> dict[str, tuple[Any, ...]]:
        return {
            key: (
                int(fields.get("queue", 0)),
                fields["queued_task_id"]
                if float(fields.get("queued_until", 0)) > time.time()
                else None,
            )
            for key, fields in self.table().items()
        }

    def set_column(self, key: str, name: str, value: str) -> None:
        with self.server as server:
            if server.hexists(key, name):
                server.hset(key, name, value)

    def move_back(self, key: str) -> None:
        for name in ("acquired_at", "expires_at", "hold_until", "queued_until"):
            self.set_column(key, name, "946684800.000000")

    def outlives_its_process(self) -> bool:
        return True


def opener(url: str) -> Callable[[], SqlStore]:
    return lambda: open_store(url, "kv_store", io_timeout=10.0, pool_size=2, auto_migrate=True)


def test_a_store_behaves_like_the_model(store_url: str, request: pytest.FixtureRequest) -> None:
    open_ = opener(store_url)
    servers = ("mariadb", "pgbouncer") if WHOLE else ("postgresql", "mariadb", "pgbouncer")
    few = request.node.callspec.params["store_url"] in servers
    steps = FEW if few else SETTINGS
    run_state_machine_as_test(lambda: Leases(open_), settings=steps)


def redis_leases(lease_url: str) -> RedisLeases:
    return RedisLeases(lambda: RedisStore(lease_url, io_timeout=10.0))


def test_redis_behaves_like_the_model(lease_url: str) -> None:
    run_state_machine_as_test(lambda: redis_leases(lease_url), settings=SETTINGS)


@pytest.mark.parametrize("fault", REDIS_FAULTS if WHOLE else REDIS_BRIEFLY)
def test_random_steps_find_a_planted_fault_in_redis(
    fault: str, lease_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, right, wrong = REDIS_FAULTS[fault]
    text = getattr(scripts, script)
    assert right in text
    monkeypatch.setattr(scripts, script, text.replace(right, wrong))
    with pytest.raises(FOUND):
        run_state_machine_as_test(lambda: redis_leases(lease_url), settings=TO_THE_FIRST_FAILURE)


@pytest.mark.parametrize("fault", FAULTS if WHOLE else BRIEFLY)
def test_random_steps_find_a_planted_fault(fault: str) -> None:
    """If the random steps did not find planted faults, it would prove nothing that they find none
    in a real store.
    """
    store = plant(opener("memory://")(), *FAULTS[fault])
    with pytest.raises(FOUND):
        run_state_machine_as_test(
            lambda: Leases(lambda: store, closes=False), settings=TO_THE_FIRST_FAILURE
        )
    store.close()
