"""The values that :mod:`.lease_model` works with: protocol switches, requests, row and clients."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: The two lives of a lease in the model, in ticks of the model's clock: an ordinary life and a long
#: one.
ORDINARY, LONG = 1, 3

#: The names of all invariants of a lease; PROTOCOL.md, section 4, explains them.
ALL = ("I1", "I2", "I3", "I4", "I5", "I6", "I9", "handoff", "refused")


class Protocol(NamedTuple):
    """The rules of a protocol, each as a switch. The defaults are the rules of PROTOCOL.md."""

    #: Which writes the store accepts within a lease: any; only the write with the next number; a
    #: write whose number is not smaller than the row's; or a write for which
    #: ``seen <= the row's number <= n`` holds.
    order: Literal["any", "next", "not smaller", "between"] = "between"
    #: Whether an acquire takes the lease for an ordinary life only. If so, a renewal before the
    #: body begins (the confirmation) extends the lease to ``lease_ttl``.
    short_first_life: bool = True
    #: What a repeated acquire changes in the row: nothing; the expiry and the handoff request; or
    #: these two and the write number.
    repeated: Literal["nothing", "expiry", "expiry and number"] = "nothing"
    #: Whether a client gives back each lease that it may hold without knowing it.
    gives_back: bool = True
    #: What a client does after a COMMIT without an answer: it asks the row (under its lock or
    #: without it), or assumes that the transaction was rolled back.
    unknown_commit: Literal["asks", "asks without lock", "assumes"] = "asks"
    #: Whether a run that does not learn the outcome of its COMMIT sends no state after that. If
    #: false, the run's release may send the state.
    careful: bool = True
    #: After a repeated release was refused, which history entry proves that an earlier copy was
    #: carried out: one with the run's holder, fence and outcome ("own"), or one with the run's
    #: holder and fence and any outcome.
    proof: Literal["own", "any"] = "own"
    #: A run stops trusting its lease this many ticks before the lease expires.
    margin: int = 0
    #: When a lost run gives back its lease: when its body has ended, or as soon as the run learns
    #: of the loss.
    gives_back_at: Literal["end", "loss"] = "end"
    #: The number that the first write of a run names as seen: the number that acquire answered, or
    #: 0.
    first_seen: Literal["answered", "zero"] = "answered"
    #: How the store chooses the fence of an acquisition: the larger of the row's fence + 1 and the
    #: clock, or always the row's fence + 1.
    fence: Literal["clock", "next"] = "clock"


#: The former protocol, which had no guards against late requests.
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

#: A holder, which stands for one run: the number of its client, and how many deliveries that client
#: had before this run.
Holder = tuple[int, int]


class Request(NamedTuple):
    """A request to the store's server. Which fields are used depends on the kind of the request."""

    kind: str
    holder: Holder
    fence: int = 0
    seen: int = 0
    number: int = 0
    #: The state that the request writes; ``checkpoints`` is ``None`` if it writes no state.
    checkpoints: int | None = None
    items: int = 0
    #: For a release: whether the run has succeeded; false for any other request.
    succeeded: bool = False

    def __str__(self) -> str:
        parts = [f"{NAMES[self.kind]} of {self.holder}"]
        if self.number:
            parts.append(f"number {self.number}")
        if self.kind in ("save", "transaction"):
            parts.append(f"seen {self.seen}")
        return ", ".join(parts)


#: Maps each kind of request to its name in INTERLEAVINGS.md.
NAMES = {
    "acquire": "acquire",
    "renew": "renewal",
    "save": "save",
    "transaction": "transaction's save",
    "commit": "COMMIT",
    "question": "question",
    "release": "release",
    "read history": "read of the history",
    "give back": "give back",
    "free": "release in another's name",
    "request handoff": "request for a handoff",
}


class Answer(NamedTuple):
    """The server's answer. Which fields are used depends on the kind of the request."""

    yes: bool
    fence: int = 0
    number: int = 0
    checkpoints: int = 0
    items: int = 0
    handoff_requested: bool = False
    history: tuple[End, ...] = ()


class End(NamedTuple):
    """An entry in the row's history: how a run ended."""

    holder: Holder
    fence: int
    outcome: str


class Lock(NamedTuple):
    """A transaction's lock on the row, held from its save to its COMMIT, and the values that it
    saved.
    """

    holder: Holder
    number: int
    checkpoints: int
    items: int


class Row(NamedTuple):
    """The singleton's row, and the business rows that its runs committed in transactions."""

    #: The state: how many checkpoints were made, and how many items were done in transactions.
    checkpoints: int = 0
    items: int = 0
    #: The item numbers in the business rows.
    business: tuple[int, ...] = ()
    fence: int = 0
    holder: Holder | None = None
    #: How many ticks are left until the lease expires.
    left: int = 0
    #: The number of the last write within the lease.
    write: int = 0
    #: How the last runs ended, the newest run last.
    history: tuple[End, ...] = ()
    #: Whether a handoff request is recorded: the holder is asked to hand over.
    handoff_requested: bool = False
    lock: Lock | None = None
    # Only the invariants use these: the run that may write, the number of its last write, the runs
    # whose saving release took effect, and whether a handoff request was dropped.
    writer: Holder | None = None
    written: int = 0
    saved: tuple[Holder, ...] = ()
    handoff_dropped: bool = False


class Client(NamedTuple):
    """A client: a worker process that receives messages, one after the other."""

    #: The client's phase, one of: idle, acquire, confirm, body, save, transaction, commit,
    #: question, cleaning up, release, read history, done, dead.
    phase: str = "idle"
    #: How many deliveries the client had before this one.
    delivery: int = 0
    #: The request whose answer the client waits for, for how many ticks it has waited, and how
    #: often it may still send this request.
    waits_for: Request | None = None
    since: int = 0
    tries: int = 0
    #: Whether an earlier copy of this request was not answered.
    unsure: bool = False
    fence: int = 0
    #: For how many ticks the run still trusts its lease.
    trusts: int = 0
    checkpoints: int = 0
    items: int = 0
    number: int = 0
    seen: int = 0
    #: How many writes the body has made, of those that ``LeaseModel.bodies`` lists.
    at: int = 0
    #: Whether the outcome of a COMMIT is still unknown to the run.
    undecided: bool = False
    succeeds: bool = True
    #: The holders whose leases the client gives back until the store answers.
    to_give_back: tuple[Holder, ...] = ()
    #: How many ticks ago the heartbeat in flight was sent, or -1 if none is in flight; and how many
    #: heartbeats were sent.
    heartbeat: int = -1
    heartbeats: int = 0
    #: The outcome that the client reported for each of its deliveries.
    reports: tuple[tuple[int, str], ...] = ()
    #: For how many ticks the body has been cleaning up, after the run stopped trusting its lease.
    cleaning_ticks: int = 0
    #: Holder and fence of the last delivery's lease, which the parent process may still renew.
    last: tuple[Holder, int] | None = None


#: The phases in which a body is running.
IN_BODY = ("body", "save", "transaction", "commit", "question", "cleaning up")
#: The phases in which the client has no run.
NO_RUN = ("idle", "done", "dead")


class Rest(NamedTuple):
    """How often each event outside the clients can still happen, and facts that the invariants
    need.
    """

    deaths: int
    #: How many more releases can be sent in another's name.
    frees: int
    #: Whether the host of a dead process has looked for its leases.
    host_checked: bool
    fail_overs: int
    #: The largest fence of all bodies that have begun.
    largest: int
    handoff_requests: int
    prunes: int
    parent_renewals: int
    clock: int
    clock_resets: int


class State(NamedTuple):
    """A state of the model: the row now and before its last commit, the requests in flight (with
    the number of the client that sent each), the clients, and how often other events can still
    happen.
    """

    row: Row
    before: Row
    net: tuple[tuple[int, Request], ...]
    clients: tuple[Client, ...]
    rest: Rest
