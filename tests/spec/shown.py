"""A fault and its interleaving, as INTERLEAVINGS.md shows them."""

from __future__ import annotations

from .explorer import explore
from .scenarios import Fault


def interleaving(name: str, fault: Fault) -> str:
    """A section: the fault's name, the steps, and the invariant that breaks."""
    *steps, broken = explore(fault.model).fault
    lines = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return "\n".join([f"### {name}", "", *lines, "", f"**{broken.removeprefix('=> ')}**", ""])
