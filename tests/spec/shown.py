"""Format a fault and its interleaving for INTERLEAVINGS.md."""

from __future__ import annotations

from .explorer import explore
from .scenarios import Fault


def interleaving(name: str, fault: Fault) -> str:
    """Return a section in Markdown with the fault's name, the steps, and the broken invariant."""
    *steps, broken = explore(fault.model).fault
    lines = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return "\n".join([f"### {name}", "", *lines, "", f"**{broken.removeprefix('=> ')}**", ""])
