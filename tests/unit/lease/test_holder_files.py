"""Holder files: a process notes its leases in a file, which other processes read when it is dead.

The tests use real processes that die.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from celery_singleton_state.lease import holder_files
from celery_singleton_state.lease.holder_files import (
    SLOT,
    HolderFiles,
    HolderRecord,
    directory_of,
    file_of,
)

FORK = multiprocessing.get_context("fork")


def holder_record(n: int) -> HolderRecord:
    return HolderRecord(f"singleton-state:task-{n}", f"w@host:1:abc.{n:x}", 0)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[HolderFiles]:
    made = HolderFiles(tmp_path, f"{os.getpid()}-aaaa")
    yield made
    made.close()


def found(own: HolderFiles) -> list[list[HolderRecord]]:
    return list(own.of_dead_processes())


def hold_two(directory: Path, pipe: Connection) -> None:
    held = HolderFiles(directory, f"{os.getpid()}-bbbb")
    held.note(holder_record(1))
    slot = held.note(holder_record(2))
    held.note(holder_record(3))
    held.clear(slot)
    pipe.send("holds")
    pipe.recv()


def hold_and_close(directory: Path, pipe: Connection) -> None:
    held = HolderFiles(directory, f"{os.getpid()}-bbbb")
    held.note(holder_record(1))
    held.close()
    pipe.send("closed")
    pipe.recv()


def fork_and_hold(directory: Path, pipe: Connection) -> None:
    held = HolderFiles(directory, f"{os.getpid()}-bbbb")
    held.note(holder_record(1))
    child = os.fork()
    if not child:
        pipe.send(os.getpid())
        signal.pause()
    pipe.recv()


@contextmanager
def process(target: Any, directory: Path) -> Iterator[tuple[Any, Any]]:
    here, there = FORK.Pipe()
    running = FORK.Process(target=target, args=(directory, there))
    running.start()
    try:
        yield running, here.recv()
    finally:
        running.kill()
        running.join(30)


def test_the_leases_of_a_dead_process_are_found(own: HolderFiles, tmp_path: Path) -> None:
    with process(hold_two, tmp_path) as (running, _):
        assert found(own) == []
        running.kill()
        running.join(30)
        assert found(own) == [[holder_record(1), holder_record(3)]]
        assert found(own) == []


def test_a_lease_that_is_held_at_an_orderly_exit_is_found(own: HolderFiles, tmp_path: Path) -> None:
    """The process closes its holder file while one of its threads is in a run.

    This run counts as alive until the process has ended. Then its lease is found.
    """
    with process(hold_and_close, tmp_path) as (running, _):
        assert found(own) == []
        running.kill()
        running.join(30)
        assert found(own) == [[holder_record(1)]]


def test_a_stopped_process_does_not_count_as_dead(own: HolderFiles, tmp_path: Path) -> None:
    with process(hold_two, tmp_path) as (running, _):
        os.kill(running.pid, signal.SIGSTOP)
        assert found(own) == []


def test_a_dead_process_is_found_while_its_forked_child_lives(
    own: HolderFiles, tmp_path: Path
) -> None:
    """The child inherits the open file, its lock and the mapped memory. They must not make its
    parent look alive.
    """
    with process(fork_and_hold, tmp_path) as (running, child):
        assert found(own) == []
        running.kill()
        # join() would wait for a pipe that the forked child keeps open.
        os.waitpid(running.pid, 0)
        try:
            assert found(own) == [[holder_record(1)]]
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_does_not_change_its_parents_file(own: HolderFiles, tmp_path: Path) -> None:
    slot = own.note(holder_record(1))

    def end() -> None:
        own.clear(slot)
        assert own.note(holder_record(2)) is None
        own.close()

    child = FORK.Process(target=end)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    descriptor = os.open(tmp_path / f"{os.getpid()}-aaaa", os.O_RDONLY)
    assert holder_files._read(descriptor) == [holder_record(1)]
    os.close(descriptor)
    assert found(HolderFiles(tmp_path, "1-cccc")) == []
    own.clear(slot)


def test_leases_that_could_not_be_freed_are_found_again(own: HolderFiles, tmp_path: Path) -> None:
    with process(hold_two, tmp_path) as (running, _):
        running.kill()
        running.join(30)
    looking: Any = own.of_dead_processes()
    next(looking)
    with pytest.raises(ConnectionError):
        looking.throw(ConnectionError)
    assert found(own) == [[holder_record(1), holder_record(3)]]


def test_two_processes_do_not_both_find_a_dead_process(own: HolderFiles, tmp_path: Path) -> None:
    """A reads the file of a dead process. B searches at the same time, and leaves the file to A."""
    with process(hold_two, tmp_path) as (running, _):
        running.kill()
        running.join(30)
    first = own.of_dead_processes()
    assert next(first) == [holder_record(1), holder_record(3)]
    assert found(HolderFiles(tmp_path, "1-cccc")) == []
    assert list(first) == []


def test_a_process_does_not_find_itself(own: HolderFiles) -> None:
    own.note(holder_record(1))
    assert found(own) == []


def test_a_file_grows_with_the_number_of_leases(own: HolderFiles, tmp_path: Path) -> None:
    slots = [own.note(holder_record(n)) for n in range(100)]
    assert len(set(slots)) == 100
    for slot in slots[10:]:
        own.clear(slot)
    descriptor = os.open(tmp_path / f"{os.getpid()}-aaaa", os.O_RDONLY)
    assert {found.key for found in holder_files._read(descriptor)} == {
        holder_record(n).key for n in range(10)
    }
    os.close(descriptor)


def test_a_record_that_does_not_fit_into_a_slot_is_not_noted(own: HolderFiles) -> None:
    assert own.note(HolderRecord("x" * SLOT, "h", 0)) is None
    own.clear(None)


def test_a_full_disk_costs_the_record_and_not_the_process(
    own: HolderFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A write to mapped memory without room on the disk would kill the process with SIGBUS. So the
    process first allocates the room.
    """
    slot = own.note(holder_record(1))

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(holder_files.os, "posix_fallocate", refuse)
        assert own.note(holder_record(2)) is None
        assert "No space left" in caplog.text
        own.clear(slot)
        assert own.note(holder_record(3)) == slot
    assert own.note(holder_record(4)) is not None


def test_a_file_that_was_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process A makes its file. Process B finds it unlocked, believes that A is dead, and removes
    it.

    Only then does A lock the file.
    """
    made = HolderFiles(tmp_path, f"{os.getpid()}-dddd")
    lock, removed = holder_files.fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(1)
            (tmp_path / f"{os.getpid()}-dddd").unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(holder_files.fcntl, "flock", remove_first)
    slot = made.note(holder_record(1))
    assert (tmp_path / f"{os.getpid()}-dddd").exists()
    made.clear(slot)
    made.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("holder", ["", "somebody", "w@host:12", "a:b:c", "w@h:1:../../x.1"])
def test_a_holder_name_of_another_form_has_no_file(holder: str) -> None:
    assert file_of(holder) is None


def test_the_file_of_a_holder_is_found_by_its_name() -> None:
    assert file_of("worker@host:8080:4711:abcd1234.1f") == "4711-abcd1234"


def test_without_a_directory_nothing_is_noted() -> None:
    made = HolderFiles(None, "1-aaaa")
    assert made.note(holder_record(1)) is None
    assert found(made) == []
    made.close()


def test_a_directory_that_another_user_could_have_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(holder_files, "root", lambda: tmp_path / "taken")
    (tmp_path / "taken").symlink_to(tmp_path)
    assert directory_of("store") is None
    assert "if a process dies, its leases must expire" in caplog.text
    assert directory_of(None) is None


def test_processes_of_two_kernels_use_different_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kernels may share a disk: two hosts, two boots, or two virtual machines from one
    snapshot.
    """
    here = directory_of("store")
    assert here == directory_of("store") != directory_of("another store")
    uname = os.uname()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(holder_files.os, "uname", lambda: SimpleNamespace(nodename="elsewhere"))
        assert directory_of("store") != here
    assert os.uname() == uname
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(holder_files, "BOOT_ID", tmp_path / "boot_id")
    another = directory_of("store")
    assert another != here
    (tmp_path / "boot_id").unlink()
    assert directory_of("store") not in (here, another)


def test_a_directory_that_cannot_be_read_counts_as_empty(
    own: HolderFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "glob", refuse)
    assert found(own) == []


def test_a_damaged_record_hides_no_other(own: HolderFiles, tmp_path: Path) -> None:
    with process(hold_two, tmp_path) as (running, _):
        running.kill()
        running.join(30)
    (file,) = tmp_path.iterdir()
    with file.open("r+b") as broken:
        broken.seek(1)
        broken.write(b"?")
    assert found(own) == [[holder_record(3)]]
