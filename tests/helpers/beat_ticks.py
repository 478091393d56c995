"""Compare the ticks that ran with the entries' stored states, after the beats have stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from celery_singleton_state.beat.entry_state import EntryState


def complaints(
    states: Mapping[str, EntryState],
    intervals: Mapping[str, timedelta],
    executed: Mapping[str, Sequence[datetime]],
) -> list[str]:
    """Return a line for each fault: none if each tick ran once or was counted as missed."""
    found: list[str] = []
    unrecorded = 0
    for name, every in intervals.items():
        last = states[name].last_tick
        ticks = [tick for tick in executed.get(name, ()) if last and tick <= last]
        unrecorded += len(executed.get(name, ())) - len(ticks)
        found += (f"{name}: {what}" for what in _of(states[name], every, ticks))
    # The last beat may have sent one tick and stopped before it could record this tick.
    if unrecorded > 1:
        found.append(f"{unrecorded} ticks were run that nobody recorded")
    return found


def _of(state: EntryState, every: timedelta, executed: Sequence[datetime]) -> list[str]:
    """Return a line for each fault of one entry.

    :param executed: the ticks that ran, up to the last tick that is recorded as sent.
    """
    ticks = sorted(set(executed))
    if not ticks:
        return ["no tick was run"]
    found = [f"{tick} was run {n} times" for tick, n in Counter(executed).items() if n > 1]
    found += [f"{tick} was never due" for tick in ticks if (tick - ticks[0]) % every]
    due = (ticks[-1] - ticks[0]) // every + 1
    assert state.next_tick is not None
    # Ticks may have been missed after the last tick that was sent, so count up to the next tick.
    passed = (state.next_tick - ticks[0]) // every
    counted = state.total_run_count + state.missed_count
    if passed != counted:
        found.append(f"{passed} ticks were due, and {counted} counted as sent or missed")
    # A leader may have sent a tick, which ran, and could not record it; the next leader may have
    # counted this tick as missed.
    if due - len(ticks) > state.missed_count:
        found.append(f"{due - len(ticks)} ticks were not run, and {state.missed_count} missed")
    if ticks[-1] != state.last_tick:
        found.append(f"the last one run is {ticks[-1]}, and the last one sent {state.last_tick}")
    return found
