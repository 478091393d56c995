"""Explore the models of PROTOCOL.md: its own protocol holds, and each planted fault is found.

By default only the small scenarios are explored. ``SINGLETON_TEST_SPEC=whole`` explores all of
them; ``tox -e spec`` sets it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .explorer import explore
from .scenarios import FAULTS, HOLDS, Scenario
from .shown import interleaving

WHOLE = os.environ.get("SINGLETON_TEST_SPEC") == "whole"
#: Scenarios with at most this many states are explored by default. Exploring so many takes two
#: seconds.
SMALL = 50_000

INTERLEAVINGS = Path(__file__).with_name("INTERLEAVINGS.md").read_text()
PROTOCOL = Path(__file__).with_name("PROTOCOL.md").read_text()


def is_explored(scenario: Scenario) -> bool:
    return WHOLE or scenario.states <= SMALL


@pytest.mark.parametrize("name", [name for name, each in HOLDS.items() if is_explored(each)])
def test_the_protocol_holds(name: str) -> None:
    found = explore(HOLDS[name].model)
    assert not found.fault, found
    assert found.states == HOLDS[name].states, "the number of the model's states has changed"


@pytest.mark.parametrize("name", FAULTS)
def test_the_model_finds_the_fault(name: str) -> None:
    fault = FAULTS[name]
    shown = interleaving(name, fault)
    assert f"**{fault.invariant}: " in shown
    assert shown in INTERLEAVINGS, "`python -m tests.spec` prints the page as it must be now"


@pytest.mark.parametrize("name", HOLDS)
def test_the_specification_says_how_many_states_hold(name: str) -> None:
    assert f"| {name} | {HOLDS[name].states:,} |" in PROTOCOL
