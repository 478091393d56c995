"""The parts of :mod:`.lease_model`: a protocol's switches, requests, the row and its clients."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: Lives, in ticks.
ORDINARY, LONG = 1, 3

ALL = ("I1", "I2", "I3", "I4", "I5", "I6", "I9", "asked", "refused")


class Protocol(NamedTuple):
    """The switches of a protocol. By default they stand as PROTOCOL.md describes it."""

    #: Which writes are accepted within a lease: any; the one with the next number; one with a
    #: number that is not smaller; or one whose ``seen`` and number the row's number lies between.
    order: Literal["any", "next", "not smaller", "between"] = "between"
    #: An acquire takes the lease for an ordinary life, and a confirmation makes it longer.
    short_first_life: bool = True
    #: What a repeated acquire changes: nothing; the expiry and who asked for the lease; or these
    #: and the write number.
    repeated: Literal["nothing", "expiry", "expiry and number"] = "nothing"
    #: A client gives back what it may hold without knowing.
    gives_back: bool = True
    #: After a COMMIT without an answer the client asks the row (under its lock), or assumes that
    #: it was rolled back.
    unknown_commit: Literal["asks", "asks without lock", "assumes"] = "asks"
    #: A run that does not learn the outcome of its COMMIT sends no state any more.
    careful: bool = True
    #: Which entry in the history proves a refused, repeated release: one with this run's outcome,
    #: or any with its name.
    proof: Literal["own", "any"] = "own"
    #: Ticks before the end of its life from which on a lease is not trusted.
    margin: int = 0
    #: When a lost run gives back its lease: when its body has ended, or when it learns of the loss.
    gives_back_at: Literal["end", "loss"] = "end"
    #: The number that the first write of a run names as seen: what acquire answered, or 0.
    first_seen: Literal["answered", "zero"] = "answered"
    #: An acquisition's fence: the larger of the row's + 1 and the clock, or the row's + 1.
    fence: Literal["clock", "next"] = "clock"


#: The protocol before it was made for late requests.
FORMER = Protocol(
    order="any",
    short_first_life=False,
    repeated="expiry",
    gives_back=False,
    unknown_commit="assumes",
    careful=False,
    proof="any",
    first_seen="zero",
    fence="next",
)

#: A client's number, and how many deliveries it had before: the name of a run's holder.
Holder = tuple[int, int]


class Request(NamedTuple):
    """A request to the server. Which parameters there are depends on its kind."""

    kind: str
    holder: Holder
    fence: int = 0
    seen: int = 0
    number: int = 0
    #: The state that it writes; ``None``: it writes none.
    checkpoints: int | None = None
    items: int = 0
    #: Whether the run that it releases has succeeded.
    succeeded: bool = False

    def __str__(self) -> str:
        parts = [f"{NAMES[self.kind]} of {self.holder}"]
        if self.number:
            parts.append(f"number {self.number}")
        if self.kind in ("save", "transaction"):
            parts.append(f"seen {self.seen}")
        return ", ".join(parts)


NAMES = {
    "acquire": "acquire",
    "renew": "renewal",
    "save": "save",
    "transaction": "transaction's save",
    "commit": "COMMIT",
    "question": "question",
    "release": "release",
    "look": "look at the history",
    "give back": "give back",
    "free": "release in another's name",
    "hand over": "request to hand over",
}


class Answer(NamedTuple):
    """The server's answer. Which fields there are depends on the request."""

    yes: bool
    fence: int = 0
    number: int = 0
    checkpoints: int = 0
    items: int = 0
    asked: bool = False
    history: tuple[End, ...] = ()


class End(NamedTuple):
    """An entry in the history."""

    holder: Holder
    fence: int
    outcome: str


class Lock(NamedTuple):
    """An open transaction's save."""

    holder: Holder
    number: int
    checkpoints: int
    items: int


class Row(NamedTuple):
    """The singleton's row, and the business rows that its transactions committed."""

    #: The state: checkpoints made, and items done in transactions.
    checkpoints: int = 0
    items: int = 0
    #: The items of the business rows.
    business: tuple[int, ...] = ()
    fence: int = 0
    holder: Holder | None = None
    left: int = 0
    write: int = 0
    #: The last runs, newest last.
    history: tuple[End, ...] = ()
    #: Somebody asks the holder to hand over.
    asked: bool = False
    lock: Lock | None = None
    # What only the invariants know: the run that may write, the number of its last write, the
    # runs whose saving release took effect, and whether somebody who asked was forgotten.
    writer: Holder | None = None
    written: int = 0
    saved: tuple[Holder, ...] = ()
    forgot: bool = False


class Client(NamedTuple):
    """A client: a process that is delivered messages, one after the other."""

    #: idle, acquire, confirm, body, save, transaction, commit, question, tidying, release, look,
    #: done or dead.
    phase: str = "idle"
    #: How many deliveries it had before this one.
    delivery: int = 0
    #: The request whose answer it waits for, for how many ticks, and how often it sends it yet.
    waits_for: Request | None = None
    since: int = 0
    tries: int = 0
    #: An earlier copy of the request got no answer.
    unsure: bool = False
    fence: int = 0
    trusts: int = 0
    checkpoints: int = 0
    items: int = 0
    number: int = 0
    seen: int = 0
    #: How many writes of its script the body has made.
    at: int = 0
    #: It has not learned the outcome of a COMMIT.
    undecided: bool = False
    succeeds: bool = True
    #: The holders that it gives back.
    to_give_back: tuple[Holder, ...] = ()
    #: Ticks since it sent the heartbeat that it waits for, or -1; and heartbeats sent.
    heartbeat: int = -1
    heartbeats: int = 0
    #: What it reported of each of its deliveries.
    reports: tuple[tuple[int, str], ...] = ()
    #: Ticks since its body trusted its lease.
    overdue: int = 0
    #: The lease of its last delivery, which its parent may still renew.
    last: tuple[Holder, int] | None = None


#: The phases in which a body is on.
IN_BODY = ("body", "save", "transaction", "commit", "question", "tidying")
#: The phases in which no run is on.
NO_RUN = ("idle", "done", "dead")


class Rest(NamedTuple):
    """How often each other thing can still happen, and what is remembered."""

    deaths: int
    #: Releases in another's name.
    frees: int
    #: The host of the dead has looked for what they held.
    looked: bool
    fail_overs: int
    #: The largest fence that a body had.
    largest: int
    asks: int
    prunes: int
    strays: int
    clock: int
    clock_resets: int


class State(NamedTuple):
    """The row, the row before its last commit, the requests under way, the clients, the rest."""

    row: Row
    before: Row
    net: tuple[tuple[int, Request], ...]
    clients: tuple[Client, ...]
    rest: Rest
