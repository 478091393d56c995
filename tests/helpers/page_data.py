"""Singletons and a beat for tests of the exporter's page, as the page receives them."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from celery_singleton_state.beat.entry_state import EntryState
from celery_singleton_state.exporter.page.document import Page, ShownBeat, ShownSingleton
from celery_singleton_state.health import SingletonHealth
from celery_singleton_state.history import Entry
from celery_singleton_state.store.base import Listed

NOW = datetime(2026, 3, 14, 12, 0, 5, tzinfo=UTC).timestamp()
HOLDER = "celery@worker-{}.shop.internal:{}:5f0c9a1e"
IN_TIME = "it finished 60 s ago"
ERRORS = (
    "ConnectionError: HTTPSConnectionPool(host='api.example', port=443): read timed out",
    "ValueError: order 48213 has no currency",
    "HeartbeatFailed: the lease was lost",
)


def row(name: str, **changes: Any) -> Listed:
    """Return the row of a free singleton whose last run succeeded a minute ago."""
    usual = Listed(
        key=f"singleton-state:{name}",
        task=None,
        schema_version=1,
        updated_at=NOW - 60,
        fence=12,
        holder=None,
        task_id=None,
        acquired_at=None,
        expires_in=None,
        run_count=12,
        last_outcome="succeeded",
        last_finished_at=NOW - 60,
        history=None,
        read_at=NOW,
    )
    return replace(usual, **changes)


def held(name: str, since: float = 30.0, **changes: Any) -> Listed:
    """Return the row of a singleton whose run began ``since`` seconds ago."""
    usual: dict[str, Any] = {
        "holder": HOLDER.format(3, 4711),
        "task_id": "0b2f",
        "acquired_at": NOW - since,
        "expires_in": 6.2,
    }
    return row(name, **(usual | changes))


def run(
    age: float, took: float = 2.0, outcome: str = "succeeded", error: str | None = None
) -> Entry:
    """Return a history entry of a run that ended ``age`` seconds ago."""
    holder = HOLDER.format(1, 99)
    return Entry("t", 0, holder, 11, None, outcome, error, NOW - age - took, NOW - age, True)


def shown(
    name: str,
    row: Listed | None,
    *runs: Entry,
    late: str = "",
    task: str | None = None,
    value: str | None = None,
) -> ShownSingleton:
    health = SingletonHealth(name, task or name.partition("{")[0], not late, late or IN_TIME)
    return ShownSingleton(health, row, runs, value)


def page(*singletons: ShownSingleton, **changes: Any) -> Page:
    usual = Page(
        app="shop",
        now=NOW,
        shown=singletons,
        total=len(singletons),
        running=sum(each.row is not None and each.row.held for each in singletons),
        unhealthy=sum(not each.health.healthy for each in singletons),
        query="",
        beat=None,
        error=None,
    )
    return replace(usual, **changes)


def entry(name: str, seconds: float | None, **changes: Any) -> EntryState:
    """Return an entry whose next tick is due in this many seconds; None: it has no next tick."""
    now = datetime.fromtimestamp(NOW, UTC)
    usual: dict[str, Any] = {
        "entry": name,
        "task": f"shop.tasks.{name}",
        "schedule": "every 30 s",
        "next_tick": None if seconds is None else now + timedelta(seconds=seconds),
        "last_tick": now - timedelta(seconds=25),
        "total_run_count": 4_218,
    }
    return EntryState(**(usual | changes))


def beat(**changes: Any) -> ShownBeat:
    usual = ShownBeat(
        name="shop",
        leader="celerybeat@beat-2.shop.internal:17:c01dbeef",
        fence=41,
        leads_since=NOW - 5_400,
        upcoming=(
            entry("import_orders", -14.2),
            entry("reindex", 4.8),
            entry("send_mails", 11.0, missed_count=3),
            entry("nightly_report", 59_395, schedule="crontab: 30 4 * * *", last_tick=None),
            entry("rates", 86_400 * 3, schedule="crontab: 0 12 * * mon"),
        ),
        entries=5,
    )
    return replace(usual, **changes)


def five() -> Page:
    """Return a page with five singletons: one is late, one fails, one runs, one was lost once, and
    one has never run.
    """
    orders = 'shop.tasks.import_orders{"tenant":"acme"}'
    mails = 'shop.tasks.send_mails{"list":"newsletter","tenant":"globex"}'
    late = "it finished 4512 s ago, and should have within 600 s"
    failing = [run(180 + 60 * n, 12 - n / 2) for n in range(12, 2, -1)] + [
        run(240, 3, "retried", ERRORS[0]),
        run(90, 31, "failed", ERRORS[0]),
    ]
    busy = [run(40 + 35 * n, 9 + n % 5) for n in range(14, -1, -1)]
    return page(
        shown(
            orders,
            row(orders, fence=1_204, run_count=1_198, last_finished_at=NOW - 4_512),
            *[run(4_512 + 300 * n, 40 + 9 * n) for n in range(12, -1, -1)],
            late=late,
        ),
        shown(
            mails,
            row(mails, fence=88, run_count=85, last_outcome="failed", last_finished_at=NOW - 90),
            *failing,
        ),
        shown(
            "shop.tasks.reindex",
            held("shop.tasks.reindex", fence=5_310, run_count=5_309, last_finished_at=NOW - 40),
            *busy,
        ),
        shown(
            "shop.tasks.rates",
            row("shop.tasks.rates", last_finished_at=NOW - 3_600),
            *[run(3_600 + 86_400 * n, 1) for n in range(15, 5, -1)],
            run(3_600 + 86_400 * 5, 100, "lost", ERRORS[2]),
            *[run(3_600 + 86_400 * n, 1) for n in range(4, -1, -1)],
        ),
        replace(
            shown("shop.tasks.nightly_report", None),
            health=SingletonHealth(
                *("shop.tasks.nightly_report", "shop.tasks.nightly_report", True),
                "it never ran, and has been expected for 70 s",
            ),
        ),
        beat=beat(),
    )


def many(drawn: int = 200, total: int = 2_000) -> Page:
    """Return a page that shows the first ``drawn`` of ``total`` singletons, the worst first."""
    dice = random.Random(7)
    names = [
        f'shop.tasks.{task}{{"tenant":"{tenant}-{number:04d}"}}'
        for number in range(total // 4)
        for task, tenant in zip(
            ("import_orders", "send_mails", "reindex", "sync_stock_levels"),
            ("acme", "globex", "initech", "umbrella"),
            strict=True,
        )
    ][:drawn]
    dice.shuffle(names)
    found = [_one_of_many(dice, number, name) for number, name in enumerate(names)]
    return page(*found, total=total, running=57, unhealthy=9, beat=beat(entries=640))


def _one_of_many(dice: random.Random, number: int, name: str) -> ShownSingleton:
    fence = dice.randrange(200, 90_000)
    pace = dice.choice((30, 60, 300, 3_600))
    outcomes = dice.choices(("succeeded", "failed", "retried", "duplicate"), (30, 1, 2, 1), k=16)
    age = dice.uniform(1, pace)
    runs = [
        run(age + pace * n, dice.uniform(0.05, 0.7) * pace, outcome, _error(dice, outcome))
        for n, outcome in zip(range(15, -1, -1), outcomes, strict=True)
    ]
    if number < 9:
        gone = [replace_times(each, 9_000.0 * (number + 1)) for each in runs]
        seconds = NOW - gone[-1].finished
        late = f"it finished {seconds:.0f} s ago, and should have within {2 * pace} s"
        ended = row(name, fence=fence, run_count=fence - 3, last_finished_at=gone[-1].finished)
        return shown(name, ended, *gone, late=late)
    if number < 21:
        bad = dice.choice(("failed", "lost"))
        runs[-1] = run(
            age, 0.4 * pace, bad, ERRORS[2] if bad == "lost" else dice.choice(ERRORS[:2])
        )
        ended = row(
            name, fence=fence, run_count=fence, last_outcome=bad, last_finished_at=NOW - age
        )
        return shown(name, ended, *runs)
    if number == 21:
        return shown(name, held(name, 80, fence=fence, expires_in=-72.0), *runs)
    runs[-1] = run(age, 0.3 * pace)
    if number < 78:
        holder = HOLDER.format(dice.randrange(1, 40), dice.randrange(10, 32_000))
        began = dice.uniform(0, age)
        busy = held(name, began, fence=fence, holder=holder, last_finished_at=NOW - age)
        return shown(name, replace(busy, expires_in=dice.uniform(4, 8)), *runs)
    return shown(name, row(name, fence=fence, run_count=fence, last_finished_at=NOW - age), *runs)


def replace_times(entry: Entry, earlier: float) -> Entry:
    """Return a copy of a history entry, whose run began and ended ``earlier`` seconds earlier."""
    return run(
        NOW - entry.finished + earlier, entry.finished - entry.started, entry.outcome, entry.error
    )


def _error(dice: random.Random, outcome: str) -> str | None:
    return dice.choice(ERRORS) if outcome in ("failed", "retried") else None
