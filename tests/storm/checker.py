"""Find the promises that a storm broke, in the notes of all processes and in the database."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from tests.storm.notes import read_notes

Note = dict[str, Any]


@dataclass
class Log:
    """The records that a storm left.

    :param notes: maps each kind of event to its notes, in the order in which they were written.
    :param trails: maps each singleton's name to the lines of its state.
    :param effects: singleton, event, job and fence of each row that a ``transaction()`` wrote.
    """

    notes: dict[str, list[Note]]
    trails: dict[str, list[Note]]
    effects: list[tuple[str, int, str, int]]

    @classmethod
    def read(
        cls, path: Path, states: Iterable[tuple[str]], effects: Iterable[tuple[Any, ...]]
    ) -> Log:
        notes: dict[str, list[Note]] = defaultdict(list)
        for note in read_notes(path):
            notes[note["event"]].append(note)
        decoded = [json.loads(value) for (value,) in states]
        return cls(notes, {state["name"]: state["lines"] for state in decoded}, list(effects))

    @cached_property
    def done(self) -> Counter[str]:
        """Maps each job to how many times it is in a state."""
        return Counter(line["job"] for lines in self.trails.values() for line in lines)

    @cached_property
    def open_jobs(self) -> set[str]:
        """The jobs that were sent, but are in no state and were not reported as succeeded or
        failed.
        """
        ended = self.jobs("succeeded") | self.jobs("failed")
        return self.jobs("sent") - set(self.done) - ended

    def jobs(self, event: str) -> set[str]:
        """Return the jobs about which there is a note of this kind of event."""
        return {note["job"] for note in self.notes[event]}

    @cached_property
    def lost_by_broker(self) -> set[str]:
        """The open jobs that no worker has begun since they were last sent.

        kombu's Redis transport can lose such jobs: it takes a message from the server before it
        records that it has the message.
        """
        ends: dict[str, str] = {}
        for note in sorted(self.notes["sends"] + self.notes["begins"], key=itemgetter("at")):
            ends[note["job"]] = note["event"]
        return {job for job in self.open_jobs if ends.get(job) == "sends"}

    @property
    def quiet_since(self) -> float:
        """The time of the last note of any process, as ``time.monotonic()``."""
        return max(note["at"] for notes in self.notes.values() for note in notes[-1:])


@dataclass
class Findings:
    """What a storm showed: how many runs there were, and lists of the broken promises.

    Each list has a line of text for each case.

    :param lost_by_broker: how many messages no worker began. The broker lost them, not this
        package.
    """

    runs: int
    lost_by_broker: int
    overlaps: list[str] = field(default_factory=list)
    lost_updates: list[str] = field(default_factory=list)
    lost_messages: list[str] = field(default_factory=list)
    doubled_effects: list[str] = field(default_factory=list)
    fences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    standing_still: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> dict[str, list[str]]:
        """Maps the names of the lists of broken promises to the lists, without the empty lists."""
        return {name: found for name, found in vars(self).items() if found and name in PROMISED}


PROMISED = tuple(each.name for each in fields(Findings) if each.default_factory is list)


def check(log: Log) -> Findings:
    """Return what the records of a storm show."""
    return Findings(
        runs=len(log.notes["enter"]),
        overlaps=_overlaps(log),
        lost_updates=_lost_updates(log),
        lost_messages=[
            f"{job} was begun and is nowhere" for job in sorted(log.open_jobs - log.lost_by_broker)
        ],
        lost_by_broker=len(log.lost_by_broker),
        doubled_effects=_doubled(log),
        fences=_fences(log),
        failures=[f"{note['job']}: {note['error']}" for note in log.notes["failed"]],
        standing_still=_standing_still(log),
    )


def _overlaps(log: Log) -> list[str]:
    """Return the runs of one singleton that trusted their leases at the same time.

    A run trusts its lease from its first note to its last. A run writes each note after it has
    checked its lease, with the time from before this check.
    """
    spans: dict[tuple[str, str], list[float]] = {}
    for note in log.notes["trusts"]:
        span = spans.setdefault((note["singleton"], note["run"]), [note["at"], note["at"]])
        span[1] = note["at"]
    by_singleton: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for (singleton, run), (first, last) in spans.items():
        by_singleton[singleton].append((first, last, run))
    found = []
    for singleton, runs in by_singleton.items():
        longest = (0.0, "")
        for first, last, run in sorted(runs):
            if first < longest[0]:
                found.append(f"{singleton}: {run} beside {longest[1]}, {longest[0] - first:.3f} s")
            longest = max(longest, (last, run))
    return found


def _lost_updates(log: Log) -> list[str]:
    """Return jobs that succeeded and are not in the state, and states that do not continue the
    state before them.
    """
    found = [
        f"{job} succeeded and is not in the state"
        for job in sorted(log.jobs("succeeded") - set(log.done))
    ]
    for singleton, lines in log.trails.items():
        found += [
            f"{singleton}: {after} follows {before}"
            for before, after in pairwise(lines)
            if after["position"] <= before["position"]
        ]
    # A run must continue the state of the previous run: if its state had n lines when it began, the
    # run's own line is line n, counted from 0.
    places = {
        (singleton, line["job"], line["fence"]): place
        for singleton, lines in log.trails.items()
        for place, line in enumerate(lines)
    }
    for note in log.notes["enter"]:
        place = places.get((note["singleton"], note["job"], note["fence"]))
        if note["fence"] and place is not None and place != note["lines"]:
            found.append(f"{note['job']}: entered with {note['lines']} lines, is line {place}")
    return found


def _doubled(log: Log) -> list[str]:
    """Return jobs that are in the state twice, and events that were copied twice or left out."""
    found = [f"{job} is in the state {count} times" for job, count in log.done.items() if count > 1]
    copied: dict[str, Counter[int]] = defaultdict(Counter)
    for singleton, event, _, _ in log.effects:
        copied[singleton][event] += 1
    for singleton, events in copied.items():
        found += [
            f"{singleton}: event {event} was copied {events[event]} times"
            for event in range(1, max(events) + 1)
            if events[event] != 1
        ]
    return found


def _fences(log: Log) -> list[str]:
    """Return fences that two runs share, or that are not larger than the fence of the previous line
    or event.

    Contestants without fences note zeros, which are ignored.
    """
    sequences: list[tuple[str, Sequence[int]]] = [
        (f"{singleton}'s state", [line["fence"] for line in lines])
        for singleton, lines in log.trails.items()
    ]
    events: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for singleton, event, _, fence in log.effects:
        events[singleton].append((event, fence))
    sequences += [
        (f"{singleton}'s events", [fence for _, fence in sorted(rows)])
        for singleton, rows in events.items()
    ]
    # Do not compare runs in the order of their notes, because a run can be delayed before its first
    # note. Sort their fences instead, and check that no two are equal.
    runs: dict[str, list[int]] = defaultdict(list)
    for note in log.notes["enter"]:
        runs[note["singleton"]].append(note["fence"])
    sequences += [(f"{name}'s runs", sorted(fences)) for name, fences in runs.items()]
    return [
        f"{what}: {after} after {before}"
        for what, fences in sequences
        for before, after in pairwise(fences)
        if after <= before and after
    ]


def _standing_still(log: Log) -> list[str]:
    """Return the singletons that jobs were sent to after the storm, and that ran none of these
    jobs.
    """
    calm = log.notes["calm"][-1]["at"]
    wanted = {note["singleton"] for note in log.notes["sent"] if note["at"] > calm}
    ran = {note["singleton"] for note in log.notes["enter"] if note["at"] > calm}
    return sorted(wanted - ran)
