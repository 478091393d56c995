"""A model of one singleton's row and of the clients that write to it.

- Time is relative, and passes in ticks. ``Row.left`` is the rest of the lease's life by the store's
  clock. ``Client.trusts`` is the time for which a run still trusts its lease, by the run's own
  clock. A tick lowers both. A tick can come between any two steps, so pauses of any length are
  covered. An ordinary life is one tick.
- ``State.net`` holds the requests that were sent and are not carried out yet. The server can carry
  out each of them at any later time, or never: also after its client gave it up, repeated it, ended
  its run or died. An answer reaches a client only if the client still waits for it. An answer can
  be lost.
- A transaction's save locks the row until its COMMIT is carried out or the server rolls it back.
- The clock of :attr:`.Protocol.fence` advances by one with each acquisition. A real clock advances
  by more. This makes no difference, because the protocol only asks which of two fences is larger.

:class:`.Protocol` has a switch for each rule of PROTOCOL.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .explorer import Broken, added, replaced
from .lease_state import (
    ALL,
    IN_BODY,
    LONG,
    NO_RUN,
    ORDINARY,
    Answer,
    Client,
    End,
    Holder,
    Lock,
    Protocol,
    Request,
    Rest,
    Row,
    State,
)

#: Stands for the client's number in a request for whose answer no client waits.
NO_CLIENT = -1

Steps = Iterator[tuple[str, State | None]]


@dataclass
class LeaseModel:
    """A protocol, and the bounds within which the explorer visits the states of its model."""

    protocol: Protocol
    #: For each client, the writes that each of its bodies makes: ``checkpoint`` or ``transaction``.
    bodies: tuple[tuple[str, ...], ...]
    #: How often a client sends each request, at most.
    tries: int = 2
    deliveries: int = 1
    #: How many requests can be in flight at the same time, at most.
    in_flight: int = 3
    #: How many heartbeats each run sends, at most.
    heartbeats: int = 0
    #: How many clients die, at most.
    deaths: int = 0
    #: Whether a body can continue after a write that failed.
    continues: bool = True
    #: Whether a body can raise an error.
    raises: bool = True
    persist_on_error: bool = False
    #: How many past runs the row's history holds.
    history: int = 1
    #: How many releases are sent in another's name, at most. The host of a dead process sends them
    #: if ``by_host`` is true; otherwise an operator does.
    frees: int = 0
    by_host: bool = False
    #: How many fail-overs can happen; each loses the last commit.
    fail_overs: int = 0
    #: How many renewals a parent sends, at most, for a child whose run has ended.
    parent_renewals: int = 0
    #: How many times another message asks the holder to hand over, at most.
    handoff_requests: int = 0
    prunes: int = 0
    #: How often the clock can be set back.
    clock_resets: int = 0
    #: Whether a hold period follows each run that succeeded.
    holds: bool = False
    lease_ttl: int = LONG
    #: For how many ticks a body may clean up after its run stopped trusting the lease; ``None``:
    #: the body ends at once.
    cleans_up_for: int | None = None
    #: The names of the invariants that are checked.
    invariants: tuple[str, ...] = ALL

    def start(self) -> State:
        rest = Rest(
            deaths=self.deaths,
            frees=self.frees,
            host_checked=False,
            fail_overs=self.fail_overs,
            largest=0,
            handoff_requests=self.handoff_requests,
            prunes=self.prunes,
            parent_renewals=self.parent_renewals,
            clock=0,
            clock_resets=self.clock_resets,
        )
        return State(Row(), Row(), (), tuple(Client() for _ in self.bodies), rest)

    @property
    def first_life(self) -> int:
        return ORDINARY if self.protocol.short_first_life else self.lease_ttl

    # -- the server

    def carry_out(self, row: Row, request: Request, clock: int) -> tuple[Row, Answer] | None:
        """Return the row after a request, and the answer; ``None`` if the request must wait."""
        kind, holder = request.kind, request.holder
        mine = row.holder == holder and row.fence == request.fence
        if kind == "read history":
            return row, Answer(True, history=row.history)
        if kind == "commit":
            return self.commit(row, request)
        unlocked = kind == "question" and self.protocol.unknown_commit == "asks without lock"
        if row.lock is not None and not unlocked:
            return None
        if kind == "question":
            return row, Answer(mine, number=row.write)
        if kind == "acquire":
            return self.acquire(row, holder, clock)
        if kind == "give back":
            if row.holder == holder:
                row = row._replace(holder=None, left=0, writer=None)
            return row, Answer(True)
        if kind == "request handoff":
            return (row._replace(handoff_requested=True) if mine and row.left else row), Answer(
                True
            )
        if not mine:
            return row, Answer(False)
        if kind == "renew":
            row = row._replace(left=max(row.left, self.lease_ttl))
            return row, Answer(True, handoff_requested=row.handoff_requested)
        if kind == "free":
            return self.end(row, request, "lost"), Answer(True)
        return self.write_held(row, request)

    def acquire(self, row: Row, holder: Holder, clock: int) -> tuple[Row, Answer]:
        first = self.first_life
        if row.holder == holder:
            if self.protocol.repeated == "nothing":
                row = row._replace(left=max(row.left, first))
            else:
                resets = self.protocol.repeated == "expiry and number"
                row = row._replace(
                    left=first,
                    handoff_requested=False,
                    handoff_dropped=row.handoff_dropped or row.handoff_requested,
                    write=0 if resets else row.write,
                )
        elif row.left == 0:
            taken_over = row.holder is not None
            row = row._replace(
                holder=holder,
                fence=max(row.fence + 1, clock),
                left=first,
                write=-1 if taken_over else 0,
                handoff_requested=False,
                writer=holder,
                written=0,
            )
        else:
            return row, Answer(False)
        return row, Answer(True, row.fence, row.write, checkpoints=row.checkpoints, items=row.items)

    def write_held(self, row: Row, request: Request) -> tuple[Row, Answer]:
        """Carry out a holder's write: a save, a transaction's save, or a release."""
        number, state = request.number, request.checkpoints
        in_order = {
            "any": True,
            "next": row.write in (number - 1, number),
            "not smaller": row.write <= number,
            "between": request.seen <= row.write <= number,
        }
        if state is not None and not in_order[self.protocol.order]:
            return row, Answer(False)
        if request.kind == "transaction":
            assert state is not None
            lock = Lock(request.holder, number, state, request.items)
            return row._replace(lock=lock), Answer(True)
        if state is not None:
            row = self.write(row, request.holder, number, state, request.items)
        if request.kind == "save":
            return row, Answer(True, handoff_requested=row.handoff_requested)
        return self.release(row, request), Answer(True)

    def commit(self, row: Row, request: Request) -> tuple[Row, Answer]:
        lock = row.lock
        if lock is None or (lock.holder, lock.number) != (request.holder, request.number):
            return row, Answer(False)
        row = row._replace(lock=None, business=tuple(sorted((*row.business, lock.items))))
        return self.write(row, *lock), Answer(True)

    def write(self, row: Row, holder: Holder, number: int, checkpoints: int, items: int) -> Row:
        """Store a state, and check the invariants of writes: I1, I2 and I3."""
        if "I1" in self.invariants and (row.writer != holder or number < row.written):
            after = f"write {row.written} of {row.writer}"
            raise Broken(f"I1: write {number} of {holder} takes effect after {after}")
        if "I2" in self.invariants and (checkpoints < row.checkpoints or items < row.items):
            newer = (row.checkpoints, row.items)
            raise Broken(f"I2: the older state {(checkpoints, items)} overwrites {newer}")
        if "I3" in self.invariants and row.business != tuple(range(1, items + 1)):
            raise Broken(f"I3: the state counts {items} items, the rows are {row.business}")
        return row._replace(
            checkpoints=checkpoints,
            items=items,
            write=number,
            written=number,
            left=max(row.left, self.lease_ttl),
        )

    def release(self, row: Row, request: Request) -> Row:
        if not request.succeeded:
            return self.end(row, request, "failed")
        row = self.end(row, request, "saved")
        row = row._replace(saved=tuple(sorted({*row.saved, request.holder})))
        if self.holds:
            # In the hold period the row has no holder, and no run can acquire the lease.
            row = row._replace(left=self.lease_ttl)
        return row

    def end(self, row: Row, request: Request, outcome: str) -> Row:
        """End a run in the row: free the lease, and record the run's end in the history."""
        end = End(request.holder, row.fence, outcome)
        history = (*row.history, end)[-self.history :]
        return row._replace(holder=None, left=0, writer=None, history=history)

    # -- a client sends

    def send(
        self, state: State, index: int, client: Client, phase: str, request: Request
    ) -> State | None:
        """Let a client send a request and wait for its answer.

        :return: the new state; ``None`` if too many requests are in flight.
        """
        if len(state.net) >= self.in_flight:
            return None
        client = client._replace(phase=phase, waits_for=request, since=0)
        return state._replace(
            net=added(state.net, (index, request)),
            clients=replaced(state.clients, index, client),
        )

    def send_anew(
        self, state: State, index: int, phase: str, request: Request, tries: int, **more: int
    ) -> State | None:
        """Let a client send a request that it has not sent before, and wait for its answer."""
        client = state.clients[index]._replace(tries=tries, unsure=False, **more)
        return self.send(state, index, client, phase, request)

    def next_in_body(self, state: State, index: int) -> Steps:
        """Yield the body's next writes, or the releases that end the run."""
        client = state.clients[index]
        todo = self.bodies[index][client.at :]
        if client.succeeds and todo:
            number = client.number + 1
            values = [client.fence, client.seen, number, client.checkpoints, client.items]
            holder = (index, client.delivery)
            if todo[0] == "checkpoint":
                values[3] += 1
                request = Request("save", holder, *values)
                yield (
                    "checkpoint",
                    self.send_anew(
                        state, index, "save", request, self.tries,
                        number=number, checkpoints=values[3],
                    ),
                )  # fmt: skip
            else:
                values[4] += 1
                request = Request("transaction", holder, *values)
                yield (
                    "transaction's save",
                    self.send_anew(state, index, "transaction", request, 1, number=number),
                )
        if client.succeeds and not todo:
            yield "save and release", self.send_release(state, index, True)
        if self.raises or not client.succeeds:
            yield "release after an error", self.send_release(state, index, False)

    def send_release(self, state: State, index: int, succeeded: bool) -> State | None:
        client = state.clients[index]
        number = client.number + 1
        undecided = self.protocol.careful and client.undecided
        saves = succeeded or (self.persist_on_error and not undecided)
        request = Request(
            "release",
            (index, client.delivery),
            client.fence,
            client.seen,
            number,
            client.checkpoints + succeeded if saves else None,
            client.items if saves else 0,
            succeeded,
        )
        # A run stops its heartbeat before it releases, so it ignores the answer to a renewal in
        # flight.
        return self.send_anew(
            state, index, "release", request, self.tries,
            number=number, succeeds=succeeded, heartbeat=-1,
        )  # fmt: skip

    # -- a client receives an answer, or gives up waiting

    def end_delivery(self, state: State, index: int, report: str | None, unsure: bool) -> State:
        """End a client's delivery.

        :param report: the outcome that the client reports; ``None`` if it reports none, because no
            body ran.
        :param unsure: whether the client may hold the lease without knowing it.
        """
        client = state.clients[index]
        holder = (index, client.delivery)
        waiting = client.to_give_back
        if unsure and self.protocol.gives_back and holder not in waiting:
            waiting = (*waiting, holder)
        last_one = client.delivery + 1 == self.deliveries
        after = Client(
            phase="done" if last_one else "idle",
            delivery=client.delivery + 1,
            to_give_back=waiting,
            reports=(*client.reports, (client.delivery, report)) if report else client.reports,
            last=(holder, client.fence) if self.parent_renewals else None,
        )
        return change(state, index, after)

    def fails(self, state: State, index: int, undecided: bool = False) -> Steps:
        """Yield what a body does after a write that failed or has an unknown outcome.

        The body either ends with the error or continues.
        """
        client = state.clients[index]._replace(
            phase="body", waits_for=None, undecided=undecided or state.clients[index].undecided
        )
        yield (
            "and its body ends with the error",
            change(state, index, client._replace(succeeds=False)),
        )
        if self.continues and not client.undecided:
            yield "and its body continues", change(state, index, client._replace(at=client.at + 1))

    def trusted_after(self, client: Client, life: int) -> int:
        return max(client.trusts, life - client.since - self.protocol.margin)

    def receive(self, state: State, index: int, answer: Answer) -> Steps:
        """Yield what a client does when it receives an answer."""
        client = state.clients[index]._replace(waits_for=None)
        phase, holder = client.phase, (index, client.delivery)
        done = client._replace(phase="body", at=client.at + 1, seen=client.number)
        if phase == "acquire":
            yield "", self.receive_acquire(state, index, answer)
        elif phase == "confirm" and answer.yes:
            trusts = self.trusted_after(client, self.lease_ttl)
            yield "", self.begin(state, index, client._replace(trusts=trusts))
        elif phase == "confirm":
            yield "", self.end_delivery(state, index, None, unsure=True)
        elif phase == "save" and answer.yes:
            trusts = self.trusted_after(client, self.lease_ttl)
            succeeds = client.succeeds and not answer.handoff_requested
            yield "", change(state, index, done._replace(trusts=trusts, succeeds=succeeds))
        elif phase == "transaction" and answer.yes:
            request = Request("commit", holder, number=client.number)
            yield "and sends COMMIT", self.send_anew(state, index, "commit", request, tries=1)
        elif phase == "commit" and not answer.yes:
            # The connection broke before the COMMIT, so the server rolled back.
            yield from self.fails(state, index)
        elif phase == "question" and not answer.yes:
            yield "", self.end_delivery(state, index, "lost", unsure=True)
        elif phase == "question" and answer.number < client.number:
            yield from self.fails(state, index)
        elif phase in ("commit", "question"):
            yield "", change(state, index, done._replace(items=client.items + 1))
        elif phase == "release" and answer.yes:
            report = "saved" if client.succeeds else "failed"
            yield "", self.end_delivery(state, index, report, unsure=False)
        elif phase == "release" and client.unsure:
            request = Request("read history", holder)
            read = self.send_anew(state, index, "read history", request, 1)
            yield "and reads the history", read
        elif phase == "read history":
            report = self.proved(client, holder, answer.history)
            yield "", self.end_delivery(state, index, report, unsure=True)
        else:
            self.check_refusal(state, index)
            yield (
                "and learns that its lease is lost",
                self.end_delivery(state, index, "lost", unsure=True),
            )

    def receive_acquire(self, state: State, index: int, answer: Answer) -> State | None:
        client = state.clients[index]
        if not answer.yes:
            return self.end_delivery(state, index, None, client.unsure)
        holder = (index, client.delivery)
        client = client._replace(
            fence=answer.fence,
            checkpoints=answer.checkpoints,
            items=answer.items,
            trusts=max(0, self.first_life - client.since - self.protocol.margin),
            seen=answer.number if self.protocol.first_seen == "answered" else 0,
            waits_for=None,
        )
        if self.first_life == self.lease_ttl:
            return self.begin(state, index, client)
        request = Request("renew", holder, client.fence)
        state = change(state, index, client)
        return self.send_anew(state, index, "confirm", request, self.tries)

    def begin(self, state: State, index: int, client: Client) -> State:
        rest = state.rest
        if "I6" in self.invariants and client.fence <= rest.largest:
            raise Broken(f"I6: fence {client.fence} comes after fence {rest.largest}")
        state = change(state, index, client._replace(phase="body"))
        return state._replace(rest=rest._replace(largest=max(rest.largest, client.fence)))

    def proved(self, client: Client, holder: Holder, history: tuple[End, ...]) -> str:
        """Return the outcome that the history proves, after a client's repeated release was
        refused.
        """
        expected = "saved" if client.succeeds else "failed"
        own = [end.outcome for end in history if end[:2] == (holder, client.fence)]
        if own and self.protocol.proof == "any":
            return expected
        if own or self.protocol.proof == "any":
            return expected if own == [expected] else "lost"
        # The history was full and may have dropped the entry of the run's end, so it proves
        # nothing.
        return "unknown" if len(history) >= self.history else "lost"

    def check_refusal(self, state: State, index: int) -> None:
        row, client = state.row, state.clients[index]
        mine = (row.holder, row.fence) == ((index, client.delivery), client.fence)
        if "refused" in self.invariants and mine:
            raise Broken(f"refused: the {client.waits_for}, although no other run has acquired")

    def give_up(self, state: State, index: int) -> Steps:
        """Yield what a client does when it stops waiting for an answer."""
        client = state.clients[index]
        phase, request, holder = client.phase, client.waits_for, (index, client.delivery)
        unknown = self.protocol.unknown_commit
        assert request is not None
        if client.tries > 1:
            again = client._replace(tries=client.tries - 1, unsure=True)
            yield "repeats it", self.send(state, index, again, phase, request)
        elif phase in ("acquire", "confirm"):
            yield "gives up", self.end_delivery(state, index, None, unsure=True)
        elif phase in ("save", "transaction") or (phase, unknown) == ("commit", "assumes"):
            # If the transaction's save was not answered, the client has not sent the COMMIT.
            yield from self.fails(state, index)
        elif phase == "commit":
            question = Request("question", holder, client.fence, number=client.number)
            yield "asks the row", self.send_anew(state, index, "question", question, self.tries)
        elif phase == "question":
            yield from self.fails(state, index, undecided=True)
        else:
            yield "gives up", self.end_delivery(state, index, "unknown", unsure=True)

    # -- all that can happen next

    def steps(self, state: State) -> Steps:
        yield from self.time(state)
        yield from self.requests(state)
        for index, client in enumerate(state.clients):
            yield from self.client_steps(state, index, client)
        yield from self.other_steps(state)

    def time(self, state: State) -> Steps:
        """Let a tick pass, unless a body has no more time to clean up."""
        for client in state.clients:
            cleans_up = client.phase in IN_BODY and not client.trusts
            if cleans_up and client.cleaning_ticks + 1 == self.cleans_up_for:
                return
        row, before = state.row, state.before
        yield (
            "tick",
            state._replace(
                row=row._replace(left=max(0, row.left - 1)),
                before=before._replace(left=max(0, before.left - 1)),
                clients=tuple(self.ticked(client) for client in state.clients),
            ),
        )

    def ticked(self, client: Client) -> Client:
        if client.phase in NO_RUN:
            return client
        cleans_up = self.cleans_up_for is not None and client.phase in IN_BODY and not client.trusts
        beat = client.heartbeat
        return client._replace(
            cleaning_ticks=min(client.cleaning_ticks + 1, 9) if cleans_up else 0,
            trusts=max(0, client.trusts - 1),
            since=min(client.since + 1, LONG) if client.waits_for else 0,
            heartbeat=beat if beat < 0 else min(beat + 1, LONG),
        )

    def requests(self, state: State) -> Steps:
        """Yield the steps of the requests in flight: each is carried out, or never arrives.

        The server can also roll back a transaction, and a fail-over can lose the last commit.
        """
        net, clients, rest = state.net, state.clients, state.rest
        for at, (index, request) in enumerate(net):
            waited_for = index != NO_CLIENT and clients[index].waits_for == request
            without = net[:at] + net[at + 1 :]
            if not (at and net[at - 1] == net[at]):
                yield from self.arrival(state._replace(net=without), index, request, waited_for)
            if not waited_for:
                yield f"{request}: never arrives", state._replace(net=without)
        lock = state.row.lock
        if lock is not None:
            client = clients[lock.holder[0]]
            waits = client.phase in ("transaction", "commit") and client.number == lock.number
            if not (waits and client.delivery == lock.holder[1]):
                row = state.row._replace(lock=None)
                kept = tuple(sent for sent in net if not commits(sent[1], lock))
                yield "the server rolls back", state._replace(row=row, net=kept)
        if rest.fail_overs:
            row = state.before._replace(lock=None)
            kept = tuple(sent for sent in net if sent[1].kind not in ("commit", "transaction"))
            rest = rest._replace(fail_overs=rest.fail_overs - 1)
            after = state._replace(row=row, before=row, net=kept, rest=rest)
            yield "a fail-over loses the last commit", after

    def arrival(self, state: State, index: int, request: Request, waited_for: bool) -> Steps:
        """Yield the steps in which the server carries out one request."""
        row, rest = state.row, state.rest
        clock = rest.clock + 1 if self.protocol.fence == "clock" else 0
        try:
            served = self.carry_out(row, request, clock)
        except Broken as broken:
            late = "" if waited_for else " late"
            raise Broken(f"{request}: carried out{late}\n=> {broken}") from None
        if served is None:
            return
        new, answer = served
        if clock and new.fence != row.fence:
            rest = rest._replace(clock=clock)
        if request.kind == "free" and self.by_host:
            rest = rest._replace(host_checked=True)
        before = row if new != row and self.fail_overs else state.before
        after = state._replace(row=new, before=before, rest=rest)
        name = f"{request}: {'yes' if answer.yes else 'no'}"
        yield f"{name}, {'the answer is lost' if waited_for else 'late'}", after
        if index == NO_CLIENT:
            return
        client = state.clients[index]
        if waited_for:
            name = f"{name}, client {index} receives the answer"
            try:
                for what, following in self.receive(after, index, answer):
                    yield f"{name} {what}".rstrip(), following
            except Broken as broken:
                raise Broken(f"{name}\n=> {broken}") from None
        elif request.kind == "renew" and client.heartbeat >= 0:
            if request.holder == (index, client.delivery):
                yield from self.heartbeat_answered(after, index, name, answer)
        elif request.kind == "give back" and request.holder in client.to_give_back:
            left = tuple(each for each in client.to_give_back if each != request.holder)
            received = change(after, index, client._replace(to_give_back=left))
            yield f"{name}, client {index} receives the answer", received

    def heartbeat_answered(self, state: State, index: int, name: str, answer: Answer) -> Steps:
        client = state.clients[index]
        if answer.yes:
            trusts = self.lease_ttl - client.heartbeat - self.protocol.margin
            received = client._replace(
                heartbeat=-1,
                trusts=max(client.trusts, trusts),
                succeeds=client.succeeds and not answer.handoff_requested,
            )
            yield f"{name}, client {index} receives the answer", change(state, index, received)
        elif client.phase == "body":
            lost = self.end_delivery(state, index, "lost", unsure=True)
            yield f"{name}, client {index} learns that its lease is lost", lost

    def client_steps(self, state: State, index: int, client: Client) -> Steps:
        """Yield what a client does on its own, and not because of an answer: it begins, continues,
        gives up or dies.
        """
        name = f"client {index}"
        holder = (index, client.delivery)
        room = len(state.net) < self.in_flight
        if client.phase == "idle":
            request = Request("acquire", holder)
            sent = self.send_anew(state, index, "acquire", request, self.tries)
            yield f"{name} sends acquire of {holder}", sent
        if client.phase == "body":
            for what, following in self.next_in_body(state, index):
                yield f"{name} sends {what}", following
            if not client.trusts:
                yield from self.stops_trusting(state, index)
            if client.heartbeat < 0 and client.heartbeats < self.heartbeats and room:
                beating = client._replace(heartbeat=0, heartbeats=client.heartbeats + 1)
                net = added(state.net, (index, Request("renew", holder, client.fence)))
                yield f"{name} sends a heartbeat", change(state, index, beating)._replace(net=net)
        if client.phase == "cleaning up":
            yield (
                f"the body of {name} has ended",
                self.end_delivery(state, index, "lost", unsure=True),
            )
        if client.waits_for:
            for what, following in self.give_up(state, index):
                yield f"{name}: no answer to the {client.waits_for}, {what}", following
        if client.phase != "dead" and room:
            for each in client.to_give_back:
                request = Request("give back", each)
                if (index, request) not in state.net:
                    net = added(state.net, (index, request))
                    yield f"{name} gives {each} back", state._replace(net=net)
        if state.rest.deaths and client.phase not in NO_RUN:
            yield f"{name} dies", self.dies(state, index)

    def stops_trusting(self, state: State, index: int) -> Steps:
        client = state.clients[index]
        if self.cleans_up_for is None:
            lost = self.end_delivery(state, index, "lost", unsure=True)
            yield f"client {index} stops trusting its lease", lost
            return
        waiting = client.to_give_back
        if self.protocol.gives_back_at == "loss":
            waiting = (*waiting, (index, client.delivery))
        cleaning_up = client._replace(phase="cleaning up", to_give_back=waiting)
        yield (
            f"client {index} stops trusting its lease, its body cleans up",
            change(state, index, cleaning_up),
        )

    def dies(self, state: State, index: int) -> State:
        """Let a client die. Its number and its delivery are kept, by which the invariants find its
        lease.
        """
        client = state.clients[index]
        last = ((index, client.delivery), client.fence) if self.parent_renewals else None
        dead = Client("dead", client.delivery, reports=client.reports, last=last)
        rest = state.rest._replace(deaths=state.rest.deaths - 1)
        return change(state, index, dead)._replace(rest=rest)

    def other_steps(self, state: State) -> Steps:
        """Yield the steps that no client takes.

        They are those of operators, the hosts and parents of dead processes, messages that ask for
        a handoff, ``prune`` and the clock.
        """
        row, clients, rest = state.row, state.clients, state.rest
        runs = row.holder is not None
        of_dead = row.holder is not None and clients[row.holder[0]].phase == "dead"

        def sent(kind: str, holder: Holder, fence: int, **spent: int) -> State | None:
            if len(state.net) >= self.in_flight:
                return None
            net = added(state.net, (NO_CLIENT, Request(kind, holder, fence)))
            return state._replace(net=net, rest=rest._replace(**spent))

        if row.holder is not None and runs:
            if rest.frees and (of_dead or not self.by_host):
                freed = sent("free", row.holder, row.fence, frees=rest.frees - 1)
                actor = "the host" if self.by_host else "an operator"
                yield f"{actor} releases the lease of {row.holder}", freed
            if rest.handoff_requests:
                asked = sent(
                    "request handoff",
                    row.holder,
                    row.fence,
                    handoff_requests=rest.handoff_requests - 1,
                )
                yield f"another message asks {row.holder} to hand over", asked
        died = any(client.phase == "dead" for client in clients)
        if rest.frees and self.by_host and died and not of_dead:
            host_checked = rest._replace(frees=0, host_checked=True)
            yield "the host finds no lease of its dead process", state._replace(rest=host_checked)
        if rest.parent_renewals:
            for client in clients:
                if client.last:
                    renewal = sent("renew", *client.last, parent_renewals=rest.parent_renewals - 1)
                    yield f"the parent of {client.last[0]} renews", renewal
        if rest.prunes and row.lock is None and (not runs and not (row.holder and row.left)):
            empty = Row(saved=row.saved)
            pruned = rest._replace(prunes=rest.prunes - 1)
            yield "the row is pruned", state._replace(row=empty, before=empty, rest=pruned)
        if rest.clock_resets:
            reset = rest._replace(clock=0, clock_resets=rest.clock_resets - 1)
            yield "the clock is set back", state._replace(rest=reset)

    # -- invariants of a state

    def broken(self, state: State) -> str | None:
        row, clients = state.row, state.clients
        if "I5" in self.invariants:
            cleans_up = self.cleans_up_for is not None
            on = [
                index
                for index, client in enumerate(clients)
                if client.phase in IN_BODY and (client.trusts or cleans_up)
            ]
            if len(on) > 1:
                do = "run" if cleans_up else "trust their leases"
                return f"I5: the bodies of clients {on} {do} at the same time"
        if "I4" in self.invariants and row.left > ORDINARY and not self.known(state):
            held = f"{row.holder} holds the lease for {row.left} ticks"
            return f"I4: {held}, and no process knows of it"
        if "I9" in self.invariants:
            for index, client in enumerate(clients):
                for delivery, report in client.reports:
                    saved = (index, delivery) in row.saved
                    if report == "saved" and not saved:
                        return f"I9: {(index, delivery)} is reported as saved, and did not save"
                    if report in ("lost", "failed") and saved:
                        return f"I9: {(index, delivery)} saved, and is reported as {report}"
        if "handoff" in self.invariants and row.handoff_dropped:
            return "handoff: the row dropped a handoff request"
        return None

    def known(self, state: State) -> bool:
        """Return whether a client or a host knows of the lease, and so will end it."""
        holder = state.row.holder
        if holder is None:
            return True
        client = state.clients[holder[0]]
        if client.phase == "dead":
            return not state.rest.host_checked
        runs = holder[1] == client.delivery and client.phase not in NO_RUN
        return runs or holder in client.to_give_back


def change(state: State, index: int, client: Client) -> State:
    return state._replace(clients=replaced(state.clients, index, client))


def commits(request: Request, lock: Lock) -> bool:
    """Return whether a request is the COMMIT of the transaction that holds the lock."""
    same = (request.holder, request.number) == (lock.holder, lock.number)
    return request.kind == "commit" and same
