"""Models of ``enqueue_once`` and of the pending run that ``on_conflict="coalesce"`` records.

As in :mod:`.lease_model`, the server carries out a request at any later time or never, answers can
be lost, and a client can give up at any time. Unlike in that model, acquisitions and releases take
effect at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .explorer import Broken, added, replaced

#: An ordinary life of a lease, and how long a message counts as queued, both in ticks of the
#: model's clock.
ORDINARY, LIFE = 1, 3


class Queue(NamedTuple):
    """The columns of the row that say which message is queued.

    A message is identified by the number of its sender, because each sender sends only one.
    """

    running: int | None = None
    queued: int | None = None
    #: For how many more ticks the message counts as queued.
    left: int = 0
    #: The queue's number: each claim, acquisition and dequeue adds 1.
    number: int = 0
    #: The last message that has run; empty if none has run.
    history: tuple[int, ...] = ()


class Claim(NamedTuple):
    """A request about a message. Its kind is read (the row), claim, confirm or dequeue."""

    kind: str
    message: int
    number: int = -1

    def __str__(self) -> str:
        return f"{self.kind} of message {self.message}"


class Sender(NamedTuple):
    """A sender and its message."""

    #: The sender's phase, one of: idle, read, claim, confirm, sent, none.
    phase: str = "idle"
    #: The message's phase, one of: "" (not published), waits, runs, dropped, and settled (the
    #: message has ended, and the row must no longer count it as queued).
    message: str = ""
    seen: int = -1
    tries: int = 0
    waits_for: Claim | None = None
    reads: int = 0


class QueueState(NamedTuple):
    """A state of the model: the row, the requests in flight, the senders, and how many messages can
    still be revoked.
    """

    row: Queue
    net: tuple[Claim, ...]
    senders: tuple[Sender, ...]
    revocations: int


QueueSteps = Iterator[tuple[str, QueueState | None]]


@dataclass
class QueueModel:
    """The model of ``enqueue_once``.

    :param guard: how the store recognises a late claim. "none": not at all, as in the former
        protocol. "history": the store refuses a claim if the history has the message. "confirmed":
        a claim counts for an ordinary life until the sender confirms it, by the message's id.
        "confirmed by number": the sender confirms its claim by the claim's number. "number": a
        claim names the queue's number, as in PROTOCOL.md.
    """

    guard: Literal["none", "history", "confirmed", "confirmed by number", "number"]
    senders: int = 2
    in_flight: int = 3
    tries: int = 2
    revocations: int = 1

    def start(self) -> QueueState:
        senders = tuple(Sender() for _ in range(self.senders))
        return QueueState(Queue(), (), senders, self.revocations)

    @property
    def confirms(self) -> bool:
        return self.guard in ("confirmed", "confirmed by number")

    # -- the server: the row after a request, whether it says yes, and the queue's number

    def carry_out(self, row: Queue, request: Claim) -> tuple[Queue, bool, int]:
        message = request.message
        if request.kind == "read":
            return row, row.left == 0 and row.running is None, row.number
        if request.kind == "claim":
            return self.claim(row, message, request.number)
        if request.kind == "confirm":
            mine = row.queued == message and row.left > 0
            if mine and (self.guard != "confirmed by number" or row.number == request.number):
                row = row._replace(left=LIFE)
            return row, True, row.number
        left = 0 if row.queued == message else row.left
        return row._replace(left=left, number=row.number + 1), True, row.number

    def claim(self, row: Queue, message: int, number: int) -> tuple[Queue, bool, int]:
        mine = row.queued == message and row.left > 0
        if self.guard == "number":
            if row.number == number + 1 and mine:
                # The request repeats the claim that is in the row.
                return row, True, row.number
            free = row.number == number
        else:
            past = self.guard == "history" and message in row.history
            free = mine or (row.left == 0 and row.running is None and not past)
        if not free:
            return row, False, row.number
        life = ORDINARY if self.confirms else LIFE
        new = row._replace(queued=message, left=max(life, row.left), number=row.number + 1)
        return new, True, new.number

    # -- senders

    def send(self, state: QueueState, phase: str, request: Claim) -> QueueState | None:
        """Let a sender send a request that it has not sent before, and wait for its answer."""
        if len(state.net) >= self.in_flight:
            return None
        sender = state.senders[request.message]._replace(
            phase=phase, waits_for=request, tries=self.tries
        )
        senders = replaced(state.senders, request.message, sender)
        return state._replace(net=added(state.net, request), senders=senders)

    def publish(self, state: QueueState, index: int) -> QueueState:
        sender = state.senders[index]._replace(phase="sent", waits_for=None, message="waits")
        return state._replace(senders=replaced(state.senders, index, sender))

    def receive(
        self, state: QueueState, request: Claim, yes: bool, number: int
    ) -> QueueState | None:
        index = request.message
        sender = state.senders[index]._replace(waits_for=None)
        received = state._replace(senders=replaced(state.senders, index, sender))
        if request.kind == "dequeue":
            return self.enter(received, index, sender._replace(message="settled"))
        if not yes:
            # A refused claim with a number means that the row has changed since it was read: the
            # sender reads it again. Any other "no" means that another message is queued.
            changed = request.kind == "claim" and self.guard == "number"
            return self.enter(received, index, sender._replace(phase="idle" if changed else "none"))
        if request.kind == "read":
            received = self.enter(received, index, sender._replace(seen=number))
            return self.send(received, "claim", Claim("claim", index, number))
        if request.kind == "confirm":
            return self.enter(received, index, sender._replace(phase="sent"))
        published = self.publish(received, index)
        if not self.confirms:
            return published
        return self.send(published, "confirm", Claim("confirm", index, number))

    def enter(self, state: QueueState, index: int, sender: Sender) -> QueueState:
        return state._replace(senders=replaced(state.senders, index, sender))

    # -- all that can happen next

    def steps(self, state: QueueState) -> QueueSteps:
        row = state.row
        yield "tick", state._replace(row=row._replace(left=max(0, row.left - 1)))
        for at, request in enumerate(state.net):
            without = state._replace(net=state.net[:at] + state.net[at + 1 :])
            yield from self.arrival(without, request)
        for index, sender in enumerate(state.senders):
            if sender.phase == "idle":
                yield from self.begin(state, index, sender)
            if sender.waits_for:
                yield from self.give_up(state, index, sender, sender.waits_for)
            yield from self.message(state, index, sender)

    def arrival(self, without: QueueState, request: Claim) -> QueueSteps:
        row, yes, number = self.carry_out(without.row, request)
        after = without._replace(row=row)
        name = f"{request}: {'yes' if yes else 'no'}"
        if without.senders[request.message].waits_for == request:
            yield f"{name}, the answer is lost", after
            yield f"{name}, answer received", self.receive(after, request, yes, number)
        else:
            yield f"{name}, late", after
            yield f"{request}: never arrives", without

    def begin(self, state: QueueState, index: int, sender: Sender) -> QueueSteps:
        if self.guard != "number":
            claim = Claim("claim", index)
            yield f"sender {index} claims", self.send(state, "claim", claim)
        elif sender.reads == 2:
            yield f"sender {index} publishes without a claim", self.publish(state, index)
        else:
            read = Claim("read", index)
            reading = self.enter(state, index, sender._replace(reads=sender.reads + 1))
            yield f"sender {index} reads the row", self.send(reading, "read", read)

    def give_up(self, state: QueueState, index: int, sender: Sender, request: Claim) -> QueueSteps:
        name = f"no answer to the {request}"
        if sender.tries > 1 and len(state.net) < self.in_flight:
            again = self.enter(state, index, sender._replace(tries=sender.tries - 1))
            yield f"{name}, repeated", again._replace(net=added(state.net, request))
        elif sender.tries == 1 and request.kind == "dequeue":
            yield f"{name}, given up", self.enter(state, index, sender._replace(waits_for=None))
        elif sender.tries == 1 and request.kind == "confirm":
            given_up = sender._replace(waits_for=None, phase="sent")
            yield f"{name}, given up", self.enter(state, index, given_up)
        elif sender.tries == 1:
            yield f"{name}, published without a claim", self.publish(state, index)

    def message(self, state: QueueState, index: int, sender: Sender) -> QueueSteps:
        """Yield what can happen to a sender's message: it runs, it ends, or it is revoked."""
        row = state.row
        if sender.message == "waits" and row.running is None:
            left = 0 if row.queued == index else row.left
            acquired = row._replace(running=index, number=row.number + 1, left=left)
            running = self.enter(state, index, sender._replace(message="runs"))
            yield f"message {index} runs", running._replace(row=acquired)
        if sender.message == "runs":
            released = row._replace(running=None, history=(index,))
            done = self.enter(state, index, sender._replace(message="settled"))
            yield f"message {index} is done", done._replace(row=released)
        if sender.message == "waits" and state.revocations and not sender.waits_for:
            dropped = self.enter(state, index, sender._replace(message="dropped"))
            dropped = dropped._replace(revocations=state.revocations - 1)
            dequeue = Claim("dequeue", index)
            yield (
                f"message {index} is revoked, its worker dequeues it",
                self.send(dropped, "sent", dequeue),
            )

    def broken(self, state: QueueState) -> str | None:
        row = state.row
        allowed = ORDINARY if self.confirms else 0
        if row.queued is None or row.left <= allowed:
            return None
        if state.senders[row.queued].message != "settled":
            return None
        return f"I8: message {row.queued} has ended, and counts as queued for {row.left} ticks"


class PendingRunRequest(NamedTuple):
    """A request to record a pending run for the run that was seen, or to remove a pending run that
    was sent.
    """

    #: The kind of the request: record or remove.
    kind: str
    pending: int
    fence: int = 0
    seen: int | None = None


class Delivery(NamedTuple):
    """A delivery that meets a conflict. The pending run that it asks for is identified by the
    delivery's number.
    """

    #: The delivery's phase, one of: idle, waits, recorded, retried.
    phase: str = "idle"
    waits_for: PendingRunRequest | None = None
    #: Whether the delivery has learned that its pending run is recorded.
    confirmed: bool = False


class PendingRunState(NamedTuple):
    """A state of the model: the fence of the latest run (odd while it runs, even after its end),
    the pending run in the row, the pending runs that were sent, the requests in flight, and the
    deliveries.
    """

    fence: int
    pending: int | None
    sent: tuple[int, ...]
    net: tuple[PendingRunRequest, ...]
    deliveries: tuple[Delivery, ...]


PendingRunSteps = Iterator[tuple[str, PendingRunState]]


@dataclass
class PendingRunModel:
    """The model of the pending run of ``on_conflict="coalesce"``.

    Runs follow each other. Each run sends the pending run that its release finds.

    :param guard: what a request to record a pending run names: the run that was seen, or that run
        and the pending run that is replaced.
    """

    guard: Literal["run", "run and pending"]
    deliveries: int = 3
    runs: int = 3
    in_flight: int = 3

    def start(self) -> PendingRunState:
        return PendingRunState(1, None, (), (), tuple(Delivery() for _ in range(self.deliveries)))

    def steps(self, state: PendingRunState) -> PendingRunSteps:
        for at, request in enumerate(state.net):
            without = state._replace(net=state.net[:at] + state.net[at + 1 :])
            if request.kind == "remove":
                remaining = None if state.pending == request.pending else state.pending
                yield (
                    f"remove pending run {request.pending}: done",
                    without._replace(pending=remaining),
                )
                yield f"remove pending run {request.pending}: never arrives", without
            else:
                yield from self.arrival(without, request)
        for index, delivery in enumerate(state.deliveries):
            yield from self.delivery(state, index, delivery)
        yield from self.run(state)

    def arrival(self, state: PendingRunState, request: PendingRunRequest) -> PendingRunSteps:
        index, delivery = request.pending, state.deliveries[request.pending]
        current = state.fence % 2 == 1 and request.fence == state.fence
        yes = current and (self.guard == "run" or state.pending == request.seen)
        waited_for = delivery.waits_for == request
        name = f"record pending run {index}: {'yes' if yes else 'no'}"
        if yes and not waited_for:
            self.check_late(state, request)
        after = state._replace(pending=index if yes else state.pending)
        yield f"{name}, {'the answer is lost' if waited_for else 'late'}", after
        if waited_for:
            received = (
                Delivery("recorded", confirmed=True)
                if yes
                else Delivery("idle", confirmed=delivery.confirmed)
            )
            deliveries = replaced(state.deliveries, index, received)
            yield f"{name}, answer received", after._replace(deliveries=deliveries)

    def check_late(self, state: PendingRunState, request: PendingRunRequest) -> None:
        lost = state.pending
        if lost in (None, request.pending, request.seen) or lost in state.sent:
            return
        if state.deliveries[lost].confirmed:
            name = f"record pending run {request.pending}: carried out late"
            raise Broken(f"{name}\n=> I7: pending run {lost} was recorded later, and is lost")

    def delivery(self, state: PendingRunState, index: int, delivery: Delivery) -> PendingRunSteps:
        if delivery.phase == "idle" and state.fence % 2 == 1 and len(state.net) < self.in_flight:
            request = PendingRunRequest("record", index, state.fence, state.pending)
            asking = replaced(
                state.deliveries, index, delivery._replace(phase="waits", waits_for=request)
            )
            yield (
                f"delivery {index} sees run {state.fence}, asks for one more",
                state._replace(net=added(state.net, request), deliveries=asking),
            )
        if delivery.phase == "waits":
            given_up = delivery._replace(phase="retried", waits_for=None)
            yield (
                f"delivery {index} gets no answer, its message is retried",
                state._replace(deliveries=replaced(state.deliveries, index, given_up)),
            )

    def run(self, state: PendingRunState) -> PendingRunSteps:
        fence, pending = state.fence, state.pending
        following = state._replace(fence=fence + 1)
        if fence % 2 == 0:
            if fence < 2 * self.runs:
                yield f"run {fence + 1} begins", following
            return
        yield f"run {fence} releases, and its process dies", following
        if pending is not None and len(state.net) < self.in_flight:
            yield (
                f"run {fence} releases, and sends pending run {pending}",
                following._replace(
                    sent=tuple(sorted({*state.sent, pending})),
                    net=added(state.net, PendingRunRequest("remove", pending)),
                ),
            )
        elif pending is None:
            yield f"run {fence} releases", following

    def broken(self, state: PendingRunState) -> str | None:
        confirmed = [index for index, delivery in enumerate(state.deliveries) if delivery.confirmed]
        if confirmed and state.pending is None and not state.sent:
            return f"I7: pending run {confirmed} was recorded, and is neither in the row nor sent"
        return None
