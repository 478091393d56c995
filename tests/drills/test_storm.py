"""Promises P1, P2 and P3: a fleet works through a storm; no runs overlap, nothing is lost or
doubled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.helpers.mariadb import MariaDB
from tests.helpers.queues import KIND
from tests.helpers.rabbitmq import RabbitMQ
from tests.helpers.servers import Postgres, Valkey, running
from tests.storm.checker import Findings, check
from tests.storm.drill import Drill, Storm

pytestmark = pytest.mark.xdist_group("storm")

#: The seed of the storm and its length in seconds; ``SINGLETON_TEST_STORM=<seed>:<seconds>`` asks
#: for another storm.
SEED, SECONDS = map(int, os.environ.get("SINGLETON_TEST_STORM", "1:40").split(":"))
#: The least number of runs of a storm that proves anything: two for each of the ten singletons. A
#: machine without other work has some hundred.
LEAST_RUNS = 20


@pytest.fixture
def durable_valkey() -> Iterator[Valkey]:
    yield from running(lambda: Valkey(durable=True))


def work_through(
    storm: Storm, directory: Path, store: Postgres | MariaDB, broker: Valkey | RabbitMQ
) -> Findings:
    database = store.create_database_for_shop(f"storm_{storm.seed}")
    findings = check(Drill(storm, directory, store, database, broker, broker.url).run())
    print(findings)
    return findings


def test_a_storm_on_valkey(durable_valkey: Valkey, own_postgres: Postgres, tmp_path: Path) -> None:
    found = work_through(Storm(SEED, SECONDS), tmp_path, own_postgres, durable_valkey)
    assert found.wrong == {}
    assert found.runs >= LEAST_RUNS


#: The kinds of RabbitMQ queues that are tested; ``SINGLETON_TEST_STORM_QUEUES`` asks for others,
#: for example ``direct,topic``.
QUEUES = os.environ.get("SINGLETON_TEST_STORM_QUEUES", "classic,topic").split(",")


@pytest.mark.parametrize("kind", QUEUES)
def test_a_storm_on_rabbitmq(
    own_rabbitmq: RabbitMQ, own_postgres: Postgres, tmp_path: Path, kind: str
) -> None:
    storm = Storm(SEED, SECONDS, environment={KIND: kind})
    found = work_through(storm, tmp_path, own_postgres, own_rabbitmq)
    assert found.wrong == {}
    assert found.lost_by_broker == 0
    assert found.runs >= LEAST_RUNS


def test_a_storm_on_mariadb(durable_valkey: Valkey, own_mariadb: MariaDB, tmp_path: Path) -> None:
    found = work_through(Storm(SEED, SECONDS), tmp_path, own_mariadb, durable_valkey)
    assert found.wrong == {}
    assert found.runs >= LEAST_RUNS


#: The number of short storms after which a planted fault must have been found: each storm reveals
#: it only by chance.
STORMS_FOR_A_FAULT = 5


@pytest.mark.parametrize(
    ("fault", "kinds", "findings"),
    [
        ("without fence", ["stop worker"], {"lost_updates", "doubled_effects"}),
        ("without renewal", [], {"overlaps"}),
    ],
)
def test_a_planted_fault_is_found(
    fault: str,
    kinds: list[str],
    findings: set[str],
    durable_valkey: Valkey,
    own_postgres: Postgres,
    tmp_path: Path,
) -> None:
    """The package is broken on purpose, and the checker finds it: without the fence, stale writes
    are accepted; without renewal, leases expire during bodies.
    """
    broken = {"STORM_FAULT": fault}

    def finds(seed: int) -> bool:
        storm = Storm(seed, 15, rate=3, slow=50, calm=5, kinds=kinds, environment=broken)
        directory = tmp_path / str(seed)
        directory.mkdir()
        with redis.Redis(port=durable_valkey.port) as client:
            client.flushall()
        found = work_through(storm, directory, own_postgres, durable_valkey)
        return not findings.isdisjoint(found.wrong)

    assert any(finds(seed) for seed in range(SEED, SEED + STORMS_FOR_A_FAULT))
