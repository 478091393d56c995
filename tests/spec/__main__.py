"""Print INTERLEAVINGS.md: each fault that the models find, with a shortest interleaving."""

from .scenarios import FORMER_FAULTS, HALF_FIXES, NOT_CLAIMED
from .shown import interleaving

OPENING = """\
# Interleavings

The models find each of these faults. Each fault is shown with a shortest interleaving that leads to
it. A client is named by its number. A run's holder is named by two numbers: the number of its
client, and how many deliveries this client had before. "Yes" and "no" are the store's answers. A
request is carried out "late" if its client no longer waits for the answer. `python -m tests.spec`
prints this page.
"""
PARTS = {
    "The protocol as it was before": FORMER_FAULTS,
    "Half-fixes: PROTOCOL.md with one rule changed": HALF_FIXES,
    "Not claimed": NOT_CLAIMED,
}

if __name__ == "__main__":
    print(OPENING)
    for part, faults in PARTS.items():
        print(f"## {part}\n")
        for name, fault in faults.items():
            print(interleaving(name, fault))
