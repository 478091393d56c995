"""Print INTERLEAVINGS.md: each fault that the model finds, with a shortest way to it."""

from .scenarios import FORMER_FAULTS, HALF_FIXES, NOT_CLAIMED
from .shown import interleaving

OPENING = """\
# Interleavings

The model finds each of these faults; each is shown with a shortest way to it. A client is named by
its number, a run's holder by its client's number and how many deliveries that had before.
`python -m tests.spec` prints this page.
"""
PARTS = {
    "The protocol as it was before": FORMER_FAULTS,
    "Half-fixes: PROTOCOL.md with one rule otherwise": HALF_FIXES,
    "Not claimed": NOT_CLAIMED,
}

if __name__ == "__main__":
    print(OPENING)
    for part, faults in PARTS.items():
        print(f"## {part}\n")
        for name, fault in faults.items():
            print(interleaving(name, fault))
