"""A model of one singleton's row and of the clients that write to it.

- Time is relative. ``Row.left`` is what is left of the lease's life by the store's clock,
  ``Client.trusts`` what a run still counts on by its own. A tick lowers both; it can come at any
  moment, so that pauses of any length are covered. An ordinary life is one tick.
- ``State.net`` holds the requests that were sent and not carried out. The server can carry out each
  at any later moment, or never: after its client gave it up, repeated it elsewhere, ended its run
  or died. An answer reaches its client only if the client still waits for it; it can also be lost.
- A transaction's save locks the row until its COMMIT is carried out or the server rolls it back.
- The clock of :attr:`.Protocol.fence` moves on by one with each acquisition. A real one moves on by
  more, and the protocol only asks which of two fences is the larger.

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

#: Client number of requests that no client waits for.
NOBODY = -1

Steps = Iterator[tuple[str, State | None]]


@dataclass
class LeaseModel:
    """A protocol and the bounds within which it is explored."""

    protocol: Protocol
    #: For each client, what its bodies do: ``checkpoint`` and ``transaction``.
    bodies: tuple[tuple[str, ...], ...]
    #: How often each request is sent.
    tries: int = 2
    deliveries: int = 1
    #: How many requests are under way at most.
    under_way: int = 3
    #: Of each run.
    heartbeats: int = 0
    deaths: int = 0
    #: A body can go on after a write that failed.
    goes_on: bool = True
    #: A body can raise.
    raises: bool = True
    persist_on_error: bool = False
    #: The number of runs that the history holds.
    history: int = 1
    #: Releases in another's name: an operator's, or those of the host of the dead.
    frees: int = 0
    by_host: bool = False
    #: Fail-overs that lose the last commit.
    fail_overs: int = 0
    #: Renewals that a parent sends for a child whose run is over.
    strays: int = 0
    #: Requests to hand over.
    asks: int = 0
    prunes: int = 0
    #: Times that the clock is put back.
    clock_resets: int = 0
    #: Leases are held after runs that succeeded.
    holds: bool = False
    lease_ttl: int = LONG
    #: Ticks within which a body ends that trusts its lease no longer; ``None``: it ends at once.
    tidies_for: int | None = None
    #: The invariants that are looked at.
    invariants: tuple[str, ...] = ALL

    def start(self) -> State:
        rest = Rest(
            deaths=self.deaths,
            frees=self.frees,
            looked=False,
            fail_overs=self.fail_overs,
            largest=0,
            asks=self.asks,
            prunes=self.prunes,
            strays=self.strays,
            clock=0,
            clock_resets=self.clock_resets,
        )
        return State(Row(), Row(), (), tuple(Client() for _ in self.bodies), rest)

    @property
    def first_life(self) -> int:
        return ORDINARY if self.protocol.short_first_life else self.lease_ttl

    # -- the server

    def carry_out(self, row: Row, request: Request, clock: int) -> tuple[Row, Answer] | None:
        """The row after a request, and the answer; ``None`` if the request waits for a lock."""
        kind, holder = request.kind, request.holder
        mine = row.holder == holder and row.fence == request.fence
        if kind == "look":
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
        if kind == "hand over":
            return (row._replace(asked=True) if mine and row.left else row), Answer(True)
        if not mine:
            return row, Answer(False)
        if kind == "renew":
            row = row._replace(left=max(row.left, self.lease_ttl))
            return row, Answer(True, asked=row.asked)
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
                    asked=False,
                    forgot=row.forgot or row.asked,
                    write=0 if resets else row.write,
                )
        elif row.left == 0:
            taken_over = row.holder is not None
            row = row._replace(
                holder=holder,
                fence=max(row.fence + 1, clock),
                left=first,
                write=-1 if taken_over else 0,
                asked=False,
                writer=holder,
                written=0,
            )
        else:
            return row, Answer(False)
        return row, Answer(True, row.fence, row.write, checkpoints=row.checkpoints, items=row.items)

    def write_held(self, row: Row, request: Request) -> tuple[Row, Answer]:
        """What a holder writes: save, transaction's save or release."""
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
            return row, Answer(True, asked=row.asked)
        return self.release(row, request), Answer(True)

    def commit(self, row: Row, request: Request) -> tuple[Row, Answer]:
        lock = row.lock
        if lock is None or (lock.holder, lock.number) != (request.holder, request.number):
            return row, Answer(False)
        row = row._replace(lock=None, business=tuple(sorted((*row.business, lock.items))))
        return self.write(row, *lock), Answer(True)

    def write(self, row: Row, holder: Holder, number: int, checkpoints: int, items: int) -> Row:
        """Store a state. The invariants of writes are looked at here."""
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
            # Nobody is the holder in the hold period, and nobody can acquire.
            row = row._replace(left=self.lease_ttl)
        return row

    def end(self, row: Row, request: Request, outcome: str) -> Row:
        """Free the lease and note the run's end."""
        end = End(request.holder, row.fence, outcome)
        history = (*row.history, end)[-self.history :]
        return row._replace(holder=None, left=0, writer=None, history=history)

    # -- a client sends

    def send(
        self, state: State, index: int, client: Client, phase: str, request: Request
    ) -> State | None:
        """The client sends a request and waits for its answer; ``None`` if too many are sent."""
        if len(state.net) >= self.under_way:
            return None
        client = client._replace(phase=phase, waits_for=request, since=0)
        return state._replace(
            net=added(state.net, (index, request)),
            clients=replaced(state.clients, index, client),
        )

    def send_anew(
        self, state: State, index: int, phase: str, request: Request, tries: int, **more: int
    ) -> State | None:
        """The same of a request that was not sent before."""
        client = state.clients[index]._replace(tries=tries, unsure=False, **more)
        return self.send(state, index, client, phase, request)

    def next_in_body(self, state: State, index: int) -> Steps:
        """What the body does next, or the run's end."""
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
        # Its heartbeat has let go of the lease before.
        return self.send_anew(
            state, index, "release", request, self.tries,
            number=number, succeeds=succeeded, heartbeat=-1,
        )  # fmt: skip

    # -- a client hears, or does not

    def over(self, state: State, index: int, report: str | None, unsure: bool) -> State:
        """The delivery is over.

        :param unsure: it may hold the lease without knowing.
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
            last=(holder, client.fence) if self.strays else None,
        )
        return change(state, index, after)

    def fails(self, state: State, index: int, undecided: bool = False) -> Steps:
        """A write failed, or its outcome is unknown: the body ends, or goes on."""
        client = state.clients[index]._replace(
            phase="body", waits_for=None, undecided=undecided or state.clients[index].undecided
        )
        yield (
            "and its body ends with the error",
            change(state, index, client._replace(succeeds=False)),
        )
        if self.goes_on and not client.undecided:
            yield "and its body goes on", change(state, index, client._replace(at=client.at + 1))

    def trusted_after(self, client: Client, life: int) -> int:
        return max(client.trusts, life - client.since - self.protocol.margin)

    def hears(self, state: State, index: int, answer: Answer) -> Steps:
        """What a client does on an answer."""
        client = state.clients[index]._replace(waits_for=None)
        phase, holder = client.phase, (index, client.delivery)
        done = client._replace(phase="body", at=client.at + 1, seen=client.number)
        if phase == "acquire":
            yield "", self.hears_of_acquire(state, index, answer)
        elif phase == "confirm" and answer.yes:
            trusts = self.trusted_after(client, self.lease_ttl)
            yield "", self.begin(state, index, client._replace(trusts=trusts))
        elif phase == "confirm":
            yield "", self.over(state, index, None, unsure=True)
        elif phase == "save" and answer.yes:
            trusts = self.trusted_after(client, self.lease_ttl)
            succeeds = client.succeeds and not answer.asked
            yield "", change(state, index, done._replace(trusts=trusts, succeeds=succeeds))
        elif phase == "transaction" and answer.yes:
            request = Request("commit", holder, number=client.number)
            yield "and sends COMMIT", self.send_anew(state, index, "commit", request, tries=1)
        elif phase == "commit" and not answer.yes:
            yield from self.fails(state, index)  # its connection broke: rolled back
        elif phase == "question" and not answer.yes:
            yield "", self.over(state, index, "lost", unsure=True)
        elif phase == "question" and answer.number < client.number:
            yield from self.fails(state, index)
        elif phase in ("commit", "question"):
            yield "", change(state, index, done._replace(items=client.items + 1))
        elif phase == "release" and answer.yes:
            report = "saved" if client.succeeds else "failed"
            yield "", self.over(state, index, report, unsure=False)
        elif phase == "release" and client.unsure:
            request = Request("look", holder)
            yield "and looks at the history", self.send_anew(state, index, "look", request, 1)
        elif phase == "look":
            report = self.proved(client, holder, answer.history)
            yield "", self.over(state, index, report, unsure=True)
        else:
            self.check_refusal(state, index)
            yield "and is lost", self.over(state, index, "lost", unsure=True)

    def hears_of_acquire(self, state: State, index: int, answer: Answer) -> State | None:
        client = state.clients[index]
        if not answer.yes:
            return self.over(state, index, None, client.unsure)
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
        """What a refused, repeated release learns from the history."""
        wanted = "saved" if client.succeeds else "failed"
        own = [end.outcome for end in history if end[:2] == (holder, client.fence)]
        if own and self.protocol.proof == "any":
            return wanted
        if own or self.protocol.proof == "any":
            return wanted if own == [wanted] else "lost"
        # A full history may have dropped the run's end.
        return "unknown" if len(history) >= self.history else "lost"

    def check_refusal(self, state: State, index: int) -> None:
        row, client = state.row, state.clients[index]
        mine = (row.holder, row.fence) == ((index, client.delivery), client.fence)
        if "refused" in self.invariants and mine:
            raise Broken(f"refused: the {client.waits_for}, though nobody else has come")

    def gives_up(self, state: State, index: int) -> Steps:
        """What a client does when it waits for an answer no longer."""
        client = state.clients[index]
        phase, request, holder = client.phase, client.waits_for, (index, client.delivery)
        unknown = self.protocol.unknown_commit
        assert request is not None
        if client.tries > 1:
            again = client._replace(tries=client.tries - 1, unsure=True)
            yield "repeats it", self.send(state, index, again, phase, request)
        elif phase in ("acquire", "confirm"):
            yield "gives up", self.over(state, index, None, unsure=True)
        elif phase in ("save", "transaction") or (phase, unknown) == ("commit", "assumes"):
            # A transaction whose save was not answered never sent its COMMIT.
            yield from self.fails(state, index)
        elif phase == "commit":
            question = Request("question", holder, client.fence, number=client.number)
            yield "asks", self.send_anew(state, index, "question", question, self.tries)
        elif phase == "question":
            yield from self.fails(state, index, undecided=True)
        else:
            yield "gives up", self.over(state, index, "unknown", unsure=True)

    # -- all that can happen next

    def steps(self, state: State) -> Steps:
        yield from self.time(state)
        yield from self.requests(state)
        for index, client in enumerate(state.clients):
            yield from self.client(state, index, client)
        yield from self.others(state)

    def time(self, state: State) -> Steps:
        """A tick. A body that tidies up ends in time, so it can be that none can come."""
        for client in state.clients:
            tidies = client.phase in IN_BODY and not client.trusts
            if tidies and client.overdue + 1 == self.tidies_for:
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
        tidies = self.tidies_for is not None and client.phase in IN_BODY and not client.trusts
        beat = client.heartbeat
        return client._replace(
            overdue=min(client.overdue + 1, 9) if tidies else 0,
            trusts=max(0, client.trusts - 1),
            since=min(client.since + 1, LONG) if client.waits_for else 0,
            heartbeat=beat if beat < 0 else min(beat + 1, LONG),
        )

    def requests(self, state: State) -> Steps:
        """Requests are carried out, or never arrive."""
        net, clients, rest = state.net, state.clients, state.rest
        for at, (index, request) in enumerate(net):
            waited_for = index != NOBODY and clients[index].waits_for == request
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
        """One request is carried out."""
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
            rest = rest._replace(looked=True)
        before = row if new != row and self.fail_overs else state.before
        after = state._replace(row=new, before=before, rest=rest)
        name = f"{request}: {'yes' if answer.yes else 'no'}"
        yield f"{name}, {'not heard' if waited_for else 'late'}", after
        if index == NOBODY:
            return
        client = state.clients[index]
        if waited_for:
            name = f"{name}, client {index} hears it"
            try:
                for what, following in self.hears(after, index, answer):
                    yield f"{name} {what}".rstrip(), following
            except Broken as broken:
                raise Broken(f"{name}\n=> {broken}") from None
        elif request.kind == "renew" and client.heartbeat >= 0:
            if request.holder == (index, client.delivery):
                yield from self.heartbeat_answered(after, index, name, answer)
        elif request.kind == "give back" and request.holder in client.to_give_back:
            left = tuple(each for each in client.to_give_back if each != request.holder)
            heard = change(after, index, client._replace(to_give_back=left))
            yield f"{name}, client {index} hears it", heard

    def heartbeat_answered(self, state: State, index: int, name: str, answer: Answer) -> Steps:
        client = state.clients[index]
        if answer.yes:
            trusts = self.lease_ttl - client.heartbeat - self.protocol.margin
            heard = client._replace(
                heartbeat=-1,
                trusts=max(client.trusts, trusts),
                succeeds=client.succeeds and not answer.asked,
            )
            yield f"{name}, client {index} hears it", change(state, index, heard)
        elif client.phase == "body":
            lost = self.over(state, index, "lost", unsure=True)
            yield f"{name}, client {index} is lost", lost

    def client(self, state: State, index: int, client: Client) -> Steps:
        """What a client does by itself."""
        name = f"client {index}"
        holder = (index, client.delivery)
        room = len(state.net) < self.under_way
        if client.phase == "idle":
            request = Request("acquire", holder)
            sent = self.send_anew(state, index, "acquire", request, self.tries)
            yield f"{name} sends acquire of {holder}", sent
        if client.phase == "body":
            for what, following in self.next_in_body(state, index):
                yield f"{name} sends {what}", following
            if not client.trusts:
                yield from self.trusts_no_longer(state, index)
            if client.heartbeat < 0 and client.heartbeats < self.heartbeats and room:
                beating = client._replace(heartbeat=0, heartbeats=client.heartbeats + 1)
                net = added(state.net, (index, Request("renew", holder, client.fence)))
                yield f"{name} sends a heartbeat", change(state, index, beating)._replace(net=net)
        if client.phase == "tidying":
            yield f"the body of {name} has ended", self.over(state, index, "lost", unsure=True)
        if client.waits_for:
            for what, following in self.gives_up(state, index):
                yield f"{name}: no answer to the {client.waits_for}, {what}", following
        if client.phase != "dead" and room:
            for each in client.to_give_back:
                request = Request("give back", each)
                if (index, request) not in state.net:
                    net = added(state.net, (index, request))
                    yield f"{name} gives {each} back", state._replace(net=net)
        if state.rest.deaths and client.phase not in NO_RUN:
            yield f"{name} dies", self.dies(state, index)

    def trusts_no_longer(self, state: State, index: int) -> Steps:
        client = state.clients[index]
        if self.tidies_for is None:
            lost = self.over(state, index, "lost", unsure=True)
            yield f"client {index} trusts its lease no longer", lost
            return
        waiting = client.to_give_back
        if self.protocol.gives_back_at == "loss":
            waiting = (*waiting, (index, client.delivery))
        tidying = client._replace(phase="tidying", to_give_back=waiting)
        yield (
            f"client {index} trusts its lease no longer, its body tidies up",
            change(state, index, tidying),
        )

    def dies(self, state: State, index: int) -> State:
        """It keeps its number and delivery, by which the invariants know what it held."""
        client = state.clients[index]
        last = ((index, client.delivery), client.fence) if self.strays else None
        dead = Client("dead", client.delivery, reports=client.reports, last=last)
        rest = state.rest._replace(deaths=state.rest.deaths - 1)
        return change(state, index, dead)._replace(rest=rest)

    def others(self, state: State) -> Steps:
        """Operators, hosts of the dead, parents, who asks for the lease, prune, clocks."""
        row, clients, rest = state.row, state.clients, state.rest
        runs = row.holder is not None
        of_dead = row.holder is not None and clients[row.holder[0]].phase == "dead"

        def sent(kind: str, holder: Holder, fence: int, **spent: int) -> State | None:
            if len(state.net) >= self.under_way:
                return None
            net = added(state.net, (NOBODY, Request(kind, holder, fence)))
            return state._replace(net=net, rest=rest._replace(**spent))

        if row.holder is not None and runs:
            if rest.frees and (of_dead or not self.by_host):
                freed = sent("free", row.holder, row.fence, frees=rest.frees - 1)
                yield f"somebody frees the lease of {row.holder}", freed
            if rest.asks:
                asked = sent("hand over", row.holder, row.fence, asks=rest.asks - 1)
                yield f"somebody asks {row.holder} to hand over", asked
        died = any(client.phase == "dead" for client in clients)
        if rest.frees and self.by_host and died and not of_dead:
            looked = rest._replace(frees=0, looked=True)
            yield "the host looks: the dead one holds nothing", state._replace(rest=looked)
        if rest.strays:
            for client in clients:
                if client.last:
                    stray = sent("renew", *client.last, strays=rest.strays - 1)
                    yield f"the parent of {client.last[0]} renews", stray
        if rest.prunes and row.lock is None and (not runs and not (row.holder and row.left)):
            empty = Row(saved=row.saved)
            pruned = rest._replace(prunes=rest.prunes - 1)
            yield "the row is pruned", state._replace(row=empty, before=empty, rest=pruned)
        if rest.clock_resets:
            reset = rest._replace(clock=0, clock_resets=rest.clock_resets - 1)
            yield "the clock is put back", state._replace(rest=reset)

    # -- invariants of a state

    def broken(self, state: State) -> str | None:
        row, clients = state.row, state.clients
        if "I5" in self.invariants:
            tidies = self.tidies_for is not None
            on = [
                index
                for index, client in enumerate(clients)
                if client.phase in IN_BODY and (client.trusts or tidies)
            ]
            if len(on) > 1:
                return f"I5: the bodies of clients {on} {'are on' if tidies else 'trust leases'}"
        if "I4" in self.invariants and row.left > ORDINARY and not self.known(state):
            return f"I4: {row.holder} holds the lease for {row.left} ticks, and nobody knows"
        if "I9" in self.invariants:
            for index, client in enumerate(clients):
                for delivery, report in client.reports:
                    saved = (index, delivery) in row.saved
                    if report == "saved" and not saved:
                        return f"I9: {(index, delivery)} is reported as saved, and did not save"
                    if report in ("lost", "failed") and saved:
                        return f"I9: {(index, delivery)} saved, and is reported as {report}"
        if "asked" in self.invariants and row.forgot:
            return "asked: the row forgot who asked its holder to hand over"
        return None

    def known(self, state: State) -> bool:
        """Whether somebody knows of the lease who will end it."""
        holder = state.row.holder
        if holder is None:
            return True
        client = state.clients[holder[0]]
        if client.phase == "dead":
            return not state.rest.looked
        runs = holder[1] == client.delivery and client.phase not in NO_RUN
        return runs or holder in client.to_give_back


def change(state: State, index: int, client: Client) -> State:
    return state._replace(clients=replaced(state.clients, index, client))


def commits(request: Request, lock: Lock) -> bool:
    """Whether a request is the COMMIT of the transaction that has a lock."""
    same = (request.holder, request.number) == (lock.holder, lock.number)
    return request.kind == "commit" and same
