"""The importer demo imports each line exactly once and leaves nothing behind; and its proof can
fail.
"""

import importlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

DEMO = Path(__file__).parents[3] / "examples" / "importer"
PATIENCE = 150

# Run these tests in one process, because they share one run of the demo, which takes half a minute.
pytestmark = pytest.mark.xdist_group("importer")


@contextmanager
def started_demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the demo in a process of its own, with a temporary folder of its own."""
    command = [sys.executable, "-X", "dev", "-W", "error", str(DEMO)]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def leftovers(folder: Path) -> list[Any]:
    """Return the files and processes of a demo that still exist."""

    def is_ours(process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR", "").startswith(str(folder))
        except psutil.Error:
            return False

    return [*folder.iterdir(), *filter(is_ours, psutil.process_iter())]


# -- a whole run of the demo


@pytest.fixture(scope="module")
def performance(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("demo")
    with started_demo(folder) as process:
        output, _ = process.communicate(timeout=PATIENCE)
    return SimpleNamespace(output=output, status=process.returncode, left=leftovers(folder))


def test_the_demo_proves_that_every_line_is_there_exactly_once(
    performance: SimpleNamespace,
) -> None:
    assert performance.status == 0, performance.output
    assert "every line is there exactly once" in performance.output
    assert re.search(r"data set +24,000 lines, sha256 (\S+)", performance.output)
    assert re.search(r"database +24,000 rows, 24,000 distinct, sha256", performance.output)


def test_the_demo_leaves_no_file_and_no_process_behind(performance: SimpleNamespace) -> None:
    assert performance.left == []


def test_the_worker_is_killed_while_files_keep_arriving(performance: SimpleNamespace) -> None:
    before, kill, after = performance.output.partition("SIGKILL for worker")
    assert kill
    assert before.count("has arrived") >= 3
    assert after.count("has arrived") >= 3
    assert "all its processes are dead, exit status -9" in after


def test_the_next_run_goes_on_where_the_dead_one_committed(performance: SimpleNamespace) -> None:
    committed = found(r"committed are [\d,]+ lines, up to (\S+)", performance.output)
    resumed, fence = found(r"resumed at\W+(\S+), with fence (\d+)", performance.output)
    assert resumed == committed
    assert int(fence) > int(found(r"killed\W+1, with fence (\d+)", performance.output))


def test_the_leading_beat_is_killed_and_the_other_one_leads(performance: SimpleNamespace) -> None:
    killed = found(r"SIGKILL for (beat-\d), which leads", performance.output)
    successor = found(r"(beat-\d) leads, and goes on", performance.output)
    assert {killed, successor} == {"beat-1", "beat-2"}


def test_deliveries_are_skipped_while_a_run_is_active(performance: SimpleNamespace) -> None:
    assert int(found(r"skipped deliveries\W+(\d+)", performance.output)) >= 1


def found(pattern: str, text: str) -> Any:
    """Return the groups of the pattern's only match in a text."""
    (match,) = re.findall(pattern, text)
    return match


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    with started_demo(tmp_path) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "has arrived" in line)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert output.endswith("interrupted\n")
    assert leftovers(tmp_path) == []


# -- the proof


@pytest.fixture
def demo() -> Iterator[SimpleNamespace]:
    """An object whose attributes are the demo's modules."""
    names = ("orders", "proof", "watch")
    sys.path.insert(0, str(DEMO))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(DEMO))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def lines(demo: SimpleNamespace) -> list[Any]:
    return [line for lines in demo.orders.data_set().values() for line in lines]


@pytest.fixture
def prove(demo: SimpleNamespace, lines: list[Any], tmp_path: Path) -> Callable[[list[Any]], Any]:
    """A function that puts rows into the demo's table and compares them with the data set."""

    def prove_rows(rows: list[Any]) -> Any:
        database = tmp_path / "shop.db"
        demo.watch.make_table(database)
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.executemany("INSERT INTO order_lines VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        return demo.proof.prove(database, lines)

    return prove_rows


def test_the_data_set_is_large_and_the_same_each_time(
    demo: SimpleNamespace, lines: list[Any]
) -> None:
    assert len({(line.order_id, line.line_no) for line in lines}) == len(lines) >= 20_000
    assert [line for part in demo.orders.data_set().values() for line in part] == lines


def test_the_proof_holds_in_whatever_order_the_lines_came(
    prove: Callable[[list[Any]], Any], lines: list[Any]
) -> None:
    proof = prove(lines[::-1])
    assert proof.holds
    assert proof.differences == []


def test_the_proof_names_a_missing_and_a_doubled_line(
    prove: Callable[[list[Any]], Any], lines: list[Any]
) -> None:
    missing, doubled = lines[0], lines[-1]
    proof = prove([*lines[1:], doubled])
    assert not proof.holds
    assert proof.rows == proof.lines
    assert proof.missing == [missing]
    assert proof.surplus == [doubled]
    assert f"missing: {missing}" in proof.report()


def test_the_proof_sees_a_line_with_another_content(
    prove: Callable[[list[Any]], Any], lines: list[Any]
) -> None:
    wrong = lines[7]._replace(quantity=lines[7].quantity + 1)
    proof = prove([*lines[:7], wrong, *lines[8:]])
    assert not proof.holds
    assert proof.rows == proof.distinct == proof.lines
    assert (proof.missing, proof.surplus) == ([lines[7]], [wrong])
