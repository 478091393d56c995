"""Models of ``enqueue_once`` and of the pending run that ``on_conflict="coalesce"`` notes.

As in :mod:`.lease_model`, requests that were sent are carried out at any later moment or never,
answers are lost, and a client gives up at any moment. Acquisitions and releases are carried out at
once here: the other model is about late ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .explorer import Broken, added, replaced

#: Ticks: an ordinary life, and how long a message counts as queued.
ORDINARY, LIFE = 1, 3


class Queue(NamedTuple):
    """The row, as far as it says which message is queued. A message's number is its sender's."""

    running: int | None = None
    queued: int | None = None
    #: For how many ticks the message counts as queued yet.
    left: int = 0
    #: The queue's number: each claim, acquisition and dequeue adds 1.
    number: int = 0
    #: The last message that has run.
    history: tuple[int, ...] = ()


class Claim(NamedTuple):
    """A request: look, claim, confirm or dequeue."""

    kind: str
    message: int
    number: int = -1

    def __str__(self) -> str:
        return f"{self.kind} of message {self.message}"


class Sender(NamedTuple):
    """A sender and its message."""

    #: idle, look, claim, confirm, sent or none.
    phase: str = "idle"
    #: "", waits, runs, dropped, or settled: the row knows of its end, or should.
    message: str = ""
    seen: int = -1
    tries: int = 0
    waits_for: Claim | None = None
    looks: int = 0


class QueueState(NamedTuple):
    """The row, the requests under way, the senders, how many messages can still be revoked."""

    row: Queue
    net: tuple[Claim, ...]
    senders: tuple[Sender, ...]
    revocations: int


QueueSteps = Iterator[tuple[str, QueueState | None]]


@dataclass
class QueueModel:
    """``enqueue_once``.

    :param guard: what a claim names: nothing, as before; nothing, and it is refused if the history
        has the message; nothing, and it counts for an ordinary life until it is confirmed by the
        message's id, or by the claim's number; or the queue's number, as in PROTOCOL.md.
    """

    guard: Literal["none", "history", "confirmed", "confirmed by number", "number"]
    senders: int = 2
    under_way: int = 3
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
        if request.kind == "look":
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
                return row, True, row.number  # repeated
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
        """A sender sends a request that it has not sent before, and waits for its answer."""
        if len(state.net) >= self.under_way:
            return None
        sender = state.senders[request.message]._replace(
            phase=phase, waits_for=request, tries=self.tries
        )
        senders = replaced(state.senders, request.message, sender)
        return state._replace(net=added(state.net, request), senders=senders)

    def publish(self, state: QueueState, index: int) -> QueueState:
        sender = state.senders[index]._replace(phase="sent", waits_for=None, message="waits")
        return state._replace(senders=replaced(state.senders, index, sender))

    def hears(self, state: QueueState, request: Claim, yes: bool, number: int) -> QueueState | None:
        index = request.message
        sender = state.senders[index]._replace(waits_for=None)
        heard = state._replace(senders=replaced(state.senders, index, sender))
        if request.kind == "dequeue":
            return self.enter(heard, index, sender._replace(message="settled"))
        if not yes:
            # The row has changed since the look: it looks again. Else another message is queued.
            changed = request.kind == "claim" and self.guard == "number"
            return self.enter(heard, index, sender._replace(phase="idle" if changed else "none"))
        if request.kind == "look":
            heard = self.enter(heard, index, sender._replace(seen=number))
            return self.send(heard, "claim", Claim("claim", index, number))
        if request.kind == "confirm":
            return self.enter(heard, index, sender._replace(phase="sent"))
        published = self.publish(heard, index)
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
                yield from self.begins(state, index, sender)
            if sender.waits_for:
                yield from self.gives_up(state, index, sender, sender.waits_for)
            yield from self.message(state, index, sender)

    def arrival(self, without: QueueState, request: Claim) -> QueueSteps:
        row, yes, number = self.carry_out(without.row, request)
        after = without._replace(row=row)
        name = f"{request}: {'yes' if yes else 'no'}"
        if without.senders[request.message].waits_for == request:
            yield f"{name}, not heard", after
            yield f"{name}, heard", self.hears(after, request, yes, number)
        else:
            yield f"{name}, late", after
            yield f"{request}: never arrives", without

    def begins(self, state: QueueState, index: int, sender: Sender) -> QueueSteps:
        if self.guard != "number":
            claim = Claim("claim", index)
            yield f"sender {index} claims", self.send(state, "claim", claim)
        elif sender.looks == 2:
            yield f"sender {index} publishes without a claim", self.publish(state, index)
        else:
            look = Claim("look", index)
            looking = self.enter(state, index, sender._replace(looks=sender.looks + 1))
            yield f"sender {index} looks", self.send(looking, "look", look)

    def gives_up(self, state: QueueState, index: int, sender: Sender, request: Claim) -> QueueSteps:
        name = f"no answer to the {request}"
        if sender.tries > 1 and len(state.net) < self.under_way:
            again = self.enter(state, index, sender._replace(tries=sender.tries - 1))
            yield f"{name}, repeated", again._replace(net=added(state.net, request))
        elif sender.tries == 1 and request.kind == "dequeue":
            yield f"{name}, given up", self.enter(state, index, sender._replace(waits_for=None))
        elif sender.tries == 1 and request.kind == "confirm":
            given_up = sender._replace(waits_for=None, phase="sent")
            yield f"{name}, given up", self.enter(state, index, given_up)
        elif sender.tries == 1:
            yield f"{name}, published without", self.publish(state, index)

    def message(self, state: QueueState, index: int, sender: Sender) -> QueueSteps:
        """What happens to a sender's message."""
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
        return f"I8: message {row.queued} is over, and counts as queued for {row.left} ticks"


class Want(NamedTuple):
    """A request: note a pending run with the run that was seen, or strike out one that was sent."""

    kind: str
    pending: int
    fence: int = 0
    seen: int | None = None


class Wisher(NamedTuple):
    """A delivery that finds the lease taken; its number is its pending run's."""

    #: idle, waits, noted or retried.
    phase: str = "idle"
    waits_for: Want | None = None
    #: It heard that its pending run is noted.
    told: bool = False


class WantState(NamedTuple):
    """The present run's fence (odd: it runs), the pending run, those sent, requests, deliveries."""

    fence: int
    wanted: int | None
    sent: tuple[int, ...]
    net: tuple[Want, ...]
    wishers: tuple[Wisher, ...]


WantSteps = Iterator[tuple[str, WantState]]


@dataclass
class WantModel:
    """The pending run of ``on_conflict="coalesce"``. Runs follow each other; each sends what its
    release finds wanted.

    :param guard: what the request names: the run alone, or also the pending run that it replaces.
    """

    guard: Literal["run", "run and pending"]
    wishers: int = 3
    runs: int = 3
    under_way: int = 3

    def start(self) -> WantState:
        return WantState(1, None, (), (), tuple(Wisher() for _ in range(self.wishers)))

    def steps(self, state: WantState) -> WantSteps:
        for at, request in enumerate(state.net):
            without = state._replace(net=state.net[:at] + state.net[at + 1 :])
            if request.kind == "strike":
                struck = None if state.wanted == request.pending else state.wanted
                yield f"strike out {request.pending}: done", without._replace(wanted=struck)
                yield f"strike out {request.pending}: never arrives", without
            else:
                yield from self.arrival(without, request)
        for index, wisher in enumerate(state.wishers):
            yield from self.wisher(state, index, wisher)
        yield from self.run(state)

    def arrival(self, state: WantState, request: Want) -> WantSteps:
        index, wisher = request.pending, state.wishers[request.pending]
        current = state.fence % 2 == 1 and request.fence == state.fence
        yes = current and (self.guard == "run" or state.wanted == request.seen)
        waited_for = wisher.waits_for == request
        name = f"want {index}: {'yes' if yes else 'no'}"
        if yes and not waited_for:
            self.check_late(state, request)
        after = state._replace(wanted=index if yes else state.wanted)
        yield f"{name}, {'not heard' if waited_for else 'late'}", after
        if waited_for:
            heard = Wisher("noted", told=True) if yes else Wisher("idle", told=wisher.told)
            wishers = replaced(state.wishers, index, heard)
            yield f"{name}, heard", after._replace(wishers=wishers)

    def check_late(self, state: WantState, request: Want) -> None:
        lost = state.wanted
        if lost in (None, request.pending, request.seen) or lost in state.sent:
            return
        if state.wishers[lost].told:
            name = f"want {request.pending}: carried out late"
            raise Broken(f"{name}\n=> I7: pending run {lost} was noted later, and is lost")

    def wisher(self, state: WantState, index: int, wisher: Wisher) -> WantSteps:
        if wisher.phase == "idle" and state.fence % 2 == 1 and len(state.net) < self.under_way:
            request = Want("want", index, state.fence, state.wanted)
            asking = replaced(
                state.wishers, index, wisher._replace(phase="waits", waits_for=request)
            )
            yield (
                f"delivery {index} sees run {state.fence}, wants one more",
                state._replace(net=added(state.net, request), wishers=asking),
            )
        if wisher.phase == "waits":
            given_up = wisher._replace(phase="retried", waits_for=None)
            yield (
                f"delivery {index} gets no answer, its message is retried",
                state._replace(wishers=replaced(state.wishers, index, given_up)),
            )

    def run(self, state: WantState) -> WantSteps:
        fence, wanted = state.fence, state.wanted
        following = state._replace(fence=fence + 1)
        if fence % 2 == 0:
            if fence < 2 * self.runs:
                yield f"run {fence + 1} begins", following
            return
        yield f"run {fence} releases, and its process dies", following
        if wanted is not None and len(state.net) < self.under_way:
            yield (
                f"run {fence} releases, and sends pending run {wanted}",
                following._replace(
                    sent=tuple(sorted({*state.sent, wanted})),
                    net=added(state.net, Want("strike", wanted)),
                ),
            )
        elif wanted is None:
            yield f"run {fence} releases", following

    def broken(self, state: WantState) -> str | None:
        told = [index for index, wisher in enumerate(state.wishers) if wisher.told]
        if told and state.wanted is None and not state.sent:
            return f"I7: pending run {told} was noted, and is neither in the row nor sent"
        return None
