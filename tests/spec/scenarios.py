"""The scenarios that are explored: in some the protocol holds, in others the models find a fault.

Each scenario is small. It leaves out details that do not matter in it, for example the length of
lives, bodies that raise, or invariants that the protocol does not claim there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .explorer import Model
from .lease_model import LeaseModel
from .lease_state import ALL, FORMER, ORDINARY, Protocol
from .queue_model import PendingRunModel, QueueModel


@dataclass(frozen=True)
class Scenario:
    """A scenario in which no invariant breaks.

    :param states: how many different states the scenario has.
    """

    states: int
    model: Model


@dataclass(frozen=True)
class Fault:
    """A scenario in which an invariant breaks; INTERLEAVINGS.md shows how."""

    invariant: str
    model: Model


GOOD = Protocol()

NOTHING: tuple[str, ...] = ()
CK, TX = "checkpoint", "transaction"
CHECKPOINT, TRANSACTION = (CK,), (TX,)


def one(*body: str, **bounds: Any) -> LeaseModel:
    """Return a model with one client, which sends each request at most twice."""
    return LeaseModel(**{"protocol": GOOD, "bodies": (body,)} | bounds)


def several(*bodies: tuple[str, ...], **bounds: Any) -> LeaseModel:
    """Return a model with several clients, which send each request only once.

    A request that is sent once can be late, too: its client may have given it up.
    """
    return LeaseModel(**{"protocol": GOOD, "bodies": bodies, "tries": 1} | bounds)


def without(*invariants: str) -> tuple[str, ...]:
    return tuple(each for each in ALL if each not in invariants)


#: Bounds of models in which a lease lives for one ordinary life, so that no run confirms its lease.
SHORT: dict[str, Any] = {"lease_ttl": ORDINARY}
#: Bounds of models in which a body cleans up for at most one tick after its run lost the lease.
CLEANS_UP: dict[str, Any] = {"heartbeats": 1, "cleans_up_for": 1, "invariants": ("I5",)}
MARGIN = GOOD._replace(short_first_life=False, margin=1)
OPERATOR: dict[str, Any] = {"frees": 1, "invariants": without("I5", "refused"), **SHORT}
FAIL_OVER: dict[str, Any] = {"fail_overs": 1, "invariants": ("I1", "I3", "I6"), **SHORT}
PRUNED: dict[str, Any] = {"prunes": 1, "invariants": without("I3", "handoff", "refused"), **SHORT}
NEXT = GOOD._replace(fence="next")

HOLDS = {
    "one run: checkpoint, transaction": Scenario(50_442, one(CK, TX)),
    "one run: checkpoint, transaction, persist_on_error": Scenario(
        47_947, one(CK, TX, persist_on_error=True)
    ),
    "one run: two checkpoints": Scenario(34_070, one(CK, CK)),
    "one run: two checkpoints, four requests in flight": Scenario(64_035, one(CK, CK, in_flight=4)),
    "one run: another message asks it to hand over": Scenario(
        95_973, one(CK, handoff_requests=1, heartbeats=1)
    ),
    "one run: an operator releases its lease": Scenario(15_125, one(CK, **OPERATOR)),
    "one run: a fail-over loses a commit": Scenario(72_445, one(TX, CK, **FAIL_OVER)),
    "one run: it dies, its host frees the lease, its parent continues to renew": Scenario(
        31_656, one(CK, heartbeats=1, deaths=1, frees=1, by_host=True, parent_renewals=1)
    ),
    "one client, two deliveries: checkpoint, two requests in flight": Scenario(
        693_420, one(CK, deliveries=2, in_flight=2)
    ),
    "one client, two deliveries: transaction, persist_on_error": Scenario(
        2_317_702, one(TX, persist_on_error=True, deliveries=2, **SHORT)
    ),
    "two clients: checkpoint and none": Scenario(118_289, several(CHECKPOINT, NOTHING)),
    "two clients: checkpoint and none, two tries, two requests in flight": Scenario(
        829_627, several(CHECKPOINT, NOTHING, tries=2, in_flight=2, raises=False, **SHORT)
    ),
    "two clients: transaction and checkpoint": Scenario(
        279_564, several(TRANSACTION, CHECKPOINT, **SHORT)
    ),
    "two clients: checkpoint and none, heartbeats": Scenario(
        815_752, several(CHECKPOINT, NOTHING, heartbeats=1)
    ),
    "two clients: no writes, two tries, two requests in flight": Scenario(
        617_779, several(NOTHING, NOTHING, tries=2, in_flight=2, raises=False)
    ),
    "two clients: a margin, and bodies that clean up for less": Scenario(
        399_236, several(CHECKPOINT, NOTHING, protocol=MARGIN, **CLEANS_UP)
    ),
    "two clients: one dies, its host frees the lease": Scenario(
        196_408, several(CHECKPOINT, NOTHING, deaths=1, frees=1, by_host=True)
    ),
    "two clients: transactions, persist_on_error, one dies": Scenario(
        371_117,
        several(TRANSACTION, TRANSACTION, persist_on_error=True, deaths=1, raises=False, **SHORT),
    ),
    "two clients: a hold period follows a run": Scenario(
        31_299, several(NOTHING, NOTHING, holds=True)
    ),
    "two clients: the row is pruned": Scenario(118_522, several(CHECKPOINT, NOTHING, **PRUNED)),
    "two clients: an operator releases a lease": Scenario(
        58_086, several(NOTHING, NOTHING, **OPERATOR)
    ),
    "two clients: a fail-over loses a commit": Scenario(
        818_074, several((TX, CK), NOTHING, **FAIL_OVER)
    ),
    "two clients: the clock is set back": Scenario(
        113_165, several(NOTHING, NOTHING, clock_resets=1)
    ),
    "three clients: no writes, two requests in flight": Scenario(
        1_562_301, several(NOTHING, NOTHING, NOTHING, in_flight=2, raises=False)
    ),
    "enqueue_once: two senders, two requests in flight": Scenario(
        241_141, QueueModel("number", in_flight=2)
    ),
    "enqueue_once: three senders, one try": Scenario(
        1_015_079, QueueModel("number", senders=3, tries=1)
    ),
    "enqueue_once: one sender, three tries": Scenario(
        1_176, QueueModel("number", senders=1, tries=3)
    ),
    "enqueue_once, another protocol: a confirmation that names the claim": Scenario(
        192_684, QueueModel("confirmed by number")
    ),
    "coalesce: a request names the pending run that it replaces": Scenario(
        142_909, PendingRunModel("run and pending")
    ),
}

#: Scenarios with the former protocol, which had no guards against late requests.
FORMER_FAULTS = {
    "a late save overwrites a newer one": Fault(
        "I1", one(CK, CK, protocol=FORMER, invariants=("I1",), **SHORT)
    ),
    "both answers to acquire are lost: a lease that no process knows of": Fault(
        "I4", one(protocol=FORMER, invariants=("I4",))
    ),
    "a late acquire: a lease that no process knows of": Fault(
        "I4", one(protocol=FORMER._replace(gives_back=True), invariants=("I4",))
    ),
    "the answer to COMMIT is lost, persist_on_error": Fault(
        "I3",
        one(TX, protocol=FORMER, persist_on_error=True, tries=1, invariants=("I3",), **SHORT),
    ),
    "a run saved, and is reported as lost": Fault(
        "I9", several(NOTHING, NOTHING, protocol=FORMER, tries=2, invariants=("I9",), **SHORT)
    ),
    "an operator released a lease, and its run is reported as saved": Fault(
        "I9", one(protocol=FORMER, frees=1, invariants=("I9",), **SHORT)
    ),
    "a repeated acquire drops a handoff request": Fault(
        "handoff", one(protocol=FORMER, handoff_requests=1, invariants=("handoff",))
    ),
    "a fence is given twice, because the row was pruned": Fault(
        "I6", several(NOTHING, NOTHING, protocol=NEXT, **PRUNED | {"invariants": ("I6",)})
    ),
    "a fence is given twice, because a fail-over lost an acquisition": Fault(
        "I6", several(NOTHING, NOTHING, protocol=NEXT, **FAIL_OVER | {"invariants": ("I6",)})
    ),
    "a late claim: a finished message counts as queued": Fault("I8", QueueModel("none")),
    "a late request for a pending run replaces a newer one": Fault("I7", PendingRunModel("run")),
}

#: Scenarios in which one rule of PROTOCOL.md is changed.
HALF_FIXES = {
    "the number must be the next one": Fault(
        "refused", one(CK, CK, protocol=GOOD._replace(order="next"), tries=1, **SHORT)
    ),
    "a number that is not smaller is enough": Fault(
        "I3",
        one(TX, TX, protocol=GOOD._replace(order="not smaller"), tries=1, **FAIL_OVER),
    ),
    "a repeated acquire resets the number, and seen is not checked": Fault(
        "I1",
        one(CK, CK, protocol=GOOD._replace(order="not smaller", repeated="expiry and number")),
    ),
    "a repeated acquire resets the number": Fault(
        "refused", one(CK, CK, protocol=GOOD._replace(repeated="expiry and number"))
    ),
    "a repeated acquire sets the first life again": Fault(
        "I5", several(NOTHING, NOTHING, tries=2, protocol=GOOD._replace(repeated="expiry"))
    ),
    "the first write names 0 as seen, not the number that acquire answered": Fault(
        "refused", several(CHECKPOINT, CHECKPOINT, protocol=GOOD._replace(first_seen="zero"))
    ),
    "the lease is given back, without a short first life": Fault(
        "I4", one(protocol=GOOD._replace(short_first_life=False))
    ),
    "a short first life, and the lease is not given back": Fault(
        "I4", one(protocol=GOOD._replace(gives_back=False))
    ),
    "the row is read without its lock": Fault(
        "I2", one(TX, protocol=GOOD._replace(unknown_commit="asks without lock"), tries=1, **SHORT)
    ),
    "the outcome of a COMMIT stays unknown, and the body's state is saved": Fault(
        "I2",
        one(TX, protocol=GOOD._replace(careful=False), tries=1, persist_on_error=True, **SHORT),
    ),
    "no margin, and a body that cleans up": Fault(
        "I5", several(NOTHING, NOTHING, protocol=MARGIN._replace(margin=0), **CLEANS_UP)
    ),
    "a margin, and a lost run gives back before its body has ended": Fault(
        "I5", several(NOTHING, NOTHING, protocol=MARGIN._replace(gives_back_at="loss"), **CLEANS_UP)
    ),
    "any history entry with a run's name proves its end": Fault(
        "I9", one(protocol=GOOD._replace(proof="any"), frees=1, **SHORT)
    ),
    "a claim is refused if the history has its message": Fault("I8", QueueModel("history")),
    "a claim has a short first life, and is confirmed by its message": Fault(
        "I8", QueueModel("confirmed")
    ),
}

#: Scenarios in which a fault is possible, as PROTOCOL.md says in section 4, "Not claimed".
NOT_CLAIMED = {
    "a fence is given twice, because the row was pruned and the clock set back": Fault(
        "I6", several(NOTHING, NOTHING, clock_resets=1, **PRUNED | {"invariants": ("I6",)})
    ),
}

FAULTS = FORMER_FAULTS | HALF_FIXES | NOT_CLAIMED
