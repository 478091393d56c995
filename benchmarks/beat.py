"""``beat``: compare schedulers: how many due messages they send, how late, and at which cost.

Real ``celery beat`` processes send to a real broker. No worker runs the tasks, and the benchmark
throws the messages away. Entry i is due every 1 + i % 60 seconds.

- *late*: from the time at which a message was due until the broker had it. This package's messages
  have the due time in a header. For Celery's and RedBeat's schedulers the due time is the last run
  that they know plus the interval.
- *busy*: the beat process's processor time for each message, without the time in which it waits.
- *saturated*: the beat sent fewer messages than were due, and sent them late. RedBeat may send more
  than are due while it catches up with the messages that became due during its start-up.
- *statements*: round trips to this package's store, for each call of the scheduler's ``tick()``.
  *messages* are counted for each call of ``tick()``, too.
- *start-up*: from the start of the process to its first message, imports included.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from .beat_figures import Figures, Window, measure, prepare
from .beat_process import OURS, Schedule
from .drain import ROOT
from .measure import relate, take_turns
from .servers import Servers

CELERY = "celery.beat:PersistentScheduler"
REDBEAT = "redbeat.RedBeatScheduler"
NAMES = {"postgresql": "this package, PostgreSQL", "sqlite": "this package, SQLite"}
MIDDLE = 10_000


class Part:
    """One run of the ``beat`` part."""

    def __init__(self, servers: Servers, quick: bool, console: Console) -> None:
        self._servers, self._quick, self._console = servers, quick, console
        self._window = Window(1, 3) if quick else Window(5, 15)
        self._runs = 0

    def run(self) -> None:
        """Measure, and print all tables of this part."""
        sizes = (1_000, MIDDLE) if self._quick else (1_000, MIDDLE, 100_000)
        found = {size: self._side_by_side(size) for size in sizes}
        for size, figures in found.items():
            self._console.print(_table(size, figures))
        self._console.print(self._same_load(sizes))
        self._console.print(self._saturated())
        self._console.print(self._start_ups(found[sizes[-1]]))

    def _side_by_side(self, size: int) -> dict[str, Figures]:
        figures = {NAMES["postgresql"]: self._measure(self._ours(size))}
        if size == MIDDLE:
            figures[NAMES["sqlite"]] = self._measure(self._ours(size, "sqlite"))
        for name, scheduler in {"Celery's default": CELERY, "RedBeat": REDBEAT}.items():
            figures[name] = self._measure(replace(self._ours(size), scheduler=scheduler))
        return figures

    def _same_load(self, sizes: tuple[int, ...]) -> Table:
        """Measure more entries with longer intervals, so that equally many are due per second."""
        table = _columns(
            "beat: the same number due per second, from more entries with longer intervals",
            *(
                "entries",
                "due/s",
                "sent/s",
                "late p99 (s)",
                "busy (ms)",
                "ratio to the first",
                "target",
            ),
        )
        first = None
        for size in sizes:
            figures = self._measure(self._ours(size, stretch=size // sizes[0]))
            first = first or figures
            table.add_row(
                f"{size:,}",
                f"{figures.due_rate:.1f}",
                f"{figures.rate:.1f}",
                f"{figures.late(0.99):.3f}",
                f"{figures.busy * 1e3:.2f}",
                f"{figures.busy / first.busy:.2f}",
                "" if figures is first else "<= 1.2",
            )
        return table

    def _saturated(self) -> Table:
        """Measure a beat with more due messages than it can send, beside a loop that only sends."""
        schedule = self._ours(40_000 if self._quick else 100_000)
        window = Window(1, 3) if self._quick else Window(3, 8)
        found: list[Figures] = []

        def ours() -> float:
            found.append(self._measure(schedule, window))
            return found[-1].rate

        cases = {"apply_async in a loop": self._bare, NAMES["postgresql"]: ours}
        samples = take_turns(cases, 1 if self._quick else 3)
        table = _columns(
            f"beat: {found[-1].due_rate:.0f} due/s, more than can be sent",
            *("", "messages/s", "ratio to the loop", "target", "busy (ms)", "messages"),
        )
        loop, own = cases
        table.add_row(loop, f"{statistics.median(samples[loop]):.0f}", "1.00", "", "", "")
        table.add_row(
            own,
            f"{statistics.median(samples[own]):.0f}",
            str(relate(samples, own, loop)),
            ">= 0.80",
            f"{statistics.median(each.busy for each in found) * 1e3:.2f}",
            f"{statistics.median(each.messages_a_tick for each in found):.0f}",
        )
        return table

    def _start_ups(self, others: dict[str, Figures]) -> Table:
        size = MIDDLE if self._quick else 100_000
        table = _columns(
            f"beat: start-up with {size:,} entries",
            *("scheduler", "start", "seconds", "busy (s)", "statements", "target (s)"),
        )
        short = replace(self._window, warm_up=0, seconds=1)
        for database, name in NAMES.items():
            schedule = self._ours(size, database)
            for start in ("first, all are new", "second"):
                figures = self._measure(schedule, short)
                _add_start(table, name, start, figures, str(figures.start_statements), "<= 5")
        for name, figures in others.items():
            if name not in NAMES.values():
                _add_start(table, name, "first", figures, "", "")
        return table

    def _ours(self, size: int, database: str = "postgresql", stretch: int = 1) -> Schedule:
        self._runs += 1
        table = f"beat_{self._runs}"
        url = self._servers.postgres if database == "postgresql" else self._servers.sqlite(table)
        return Schedule(OURS, url, table, size, stretch)

    def _measure(self, schedule: Schedule, window: Window | None = None) -> Figures:
        what = schedule.scheduler.rpartition(":")[2]
        with self._console.status(f"beat: {what}, {schedule.entries:,} entries"):
            prepare(self._servers, schedule)
            return measure(self._servers, schedule, window or self._window)

    def _bare(self) -> float:
        with self._console.status("beat: a loop that sends"):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.beat_bare", "2" if self._quick else "4"],
                cwd=ROOT,
                env=self._ours(0).environment(self._servers),
                check=True,
                capture_output=True,
            )
        return float(done.stdout)


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print a table for each number of entries, and three tables about this package alone."""
    Part(servers, quick, console).run()


def _table(size: int, figures: dict[str, Figures]) -> Table:
    due_rate = list(figures.values())[-1].due_rate
    table = _columns(
        f"beat: {size:,} entries, {due_rate:.0f} due/s",
        *("scheduler", "sent/s", "ratio to due", "late p50 (s)", "p99 (s)", "busy (ms)"),
        *("statements", "messages"),
    )
    for name, each in figures.items():
        is_ours = name in NAMES.values()
        table.add_row(
            name,
            f"{each.rate:.1f}",
            f"{'saturated, ' if each.saturated else ''}{each.rate / each.due_rate:.3f}",
            f"{each.late(0.5):.3f}",
            f"{each.late(0.99):.3f}",
            f"{each.busy * 1e3:.2f}",
            f"{each.statements_a_tick:.2f}" if is_ours else "",
            f"{each.messages_a_tick:.2f}" if each.ticks else "all in one tick",
        )
    if size == MIDDLE:
        table.caption = "target of this package: all sent, p99 <= 0.25 s"
    return table


def _add_start(
    table: Table, name: str, start: str, figures: Figures, statements: str, target: str
) -> None:
    table.add_row(
        name, start, f"{figures.start:.1f}", f"{figures.start_busy:.1f}", statements, target
    )


def _columns(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    return table
