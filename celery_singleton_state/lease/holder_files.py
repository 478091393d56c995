"""Holder files note on disk which leases a process holds, to free the leases of dead processes.

Each process that runs singletons keeps a file, in a directory for its user and store. It notes each
lease in the file before it asks the store for the lease, and it holds a lock (``flock``) on the
file as long as it lives. The kernel drops this lock when the file's last descriptor is closed:
never while the process lives, and always when it has died. So a process that gets the lock of
another process's file knows that the other process is dead, and releases the leases that the file
names.

This works only between processes of one kernel, because on many network file systems hosts share
files but not locks. So each boot of each host has a directory of its own, and no process reads the
directory of another host or boot (:func:`_kernel`). A process is never recognised by its process
id, because ids are reused, for instance in containers. A lease is released by the name of its
holder, and no name is ever given twice.

A forked child inherits the lock, and gives its copy up at once: the leases belong to the process
that runs the body, and not to its children (:func:`_leave_to_parent`).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import mmap
import os
import re
import stat
import tempfile
import threading
import uuid
import weakref
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import msgspec

from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: Size in bytes of a slot, the part of a holder file that describes one lease.
SLOT = 4096
#: Size in bytes of the first area of a slot, which has the :class:`HolderRecord`. It has room for a
#: key of 255 characters and a holder's name, which has a host's name in it.
#: :mod:`celery_singleton_state.lease.renewal_slots` describes the other areas.
RECORD = 1536


class HolderRecord(msgspec.Struct, frozen=True, array_like=True):
    """One lease in a holder file: the process holds the lease, or is about to ask for it.

    :param key: the row's key.
    :param holder: the name under which the process holds the lease.
    :param generation: the generation of the message that the process runs. It grows when a body or
        Celery retries the message, and when a body replaces itself.
    :param sent: the value that distinguishes the message from others with the same task id;
        ``None`` if the message has none.
    """

    key: str
    holder: str
    generation: int
    sent: str | None = None


_decoder = msgspec.json.Decoder(HolderRecord)


class HolderFiles:
    """This process's own holder file, and access to the files of dead processes.

    :param directory: the result of :func:`directory_of`. With ``None`` no lease is noted, and no
        dead process is found.
    :param name: the name of this process's file, which no file of another process ever has.
    """

    def __init__(self, directory: Path | None, name: str) -> None:
        self._directory = directory
        self._name = name
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._free: list[int] = []
        #: Maps the start of each slot in use, a position in the file, to the name of the holder
        #: whose lease the slot describes.
        self._holders: dict[int, str] = {}
        _all.add(self)

    @property
    def directory(self) -> Path | None:
        """The directory of this store's holder files; ``None`` if leases are not noted."""
        return self._directory

    def note(self, holder_record: HolderRecord) -> int | None:
        """Note a lease in this process's file.

        :returns: the slot that the lease got; ``None`` if it could not be noted.
        """
        with self._lock:
            if self._memory is None and self._directory is not None:
                self._open(self._directory)
            memory = self._memory
            if memory is None:
                return None
            record = msgspec.json.encode(holder_record)
            if len(record) > RECORD - 2:
                return None
            if not self._free:
                grown = self._grow(memory)
                if grown is None:
                    return None
                memory = grown
            start = self._free.pop()
            memory[start + 1 : start + 2 + len(record)] = record + b"\0"
            # The first byte marks the slot as used, and is written last. If the process dies before
            # that, it has not asked for the lease yet, so there is no lease to free.
            memory[start] = 1
            self._holders[start] = holder_record.holder
        return start

    def put(self, holder: str, at: int, data: bytes) -> bool:
        """Write bytes into the slot of a holder's lease.

        :param at: how many bytes after the start of the slot.
        :returns: false if the holder has no slot.
        """
        with self._lock:
            start = self._slot_of(holder)
            if start is None or self._memory is None:
                return False
            self._memory[start + at : start + at + len(data)] = data
            return True

    def get(self, holder: str, at: int, size: int) -> bytes:
        """Read bytes from the slot of a holder's lease; empty if the holder has no slot.

        This takes no lock, because a body that calls it can be interrupted anywhere, and would
        leave the lock held.

        :param at: how many bytes after the start of the slot.
        """
        start, memory = self._slot_of(holder), self._memory
        if start is None or memory is None:
            return b""
        try:
            return memory[start + at : start + at + size]
        except ValueError:  # another thread has closed the memory in between
            return b""

    def _slot_of(self, holder: str) -> int | None:
        # A search through all slots is quick enough, because only children of a prefork worker
        # search. They run one body at a time, so they use one slot or a few.
        for start, name in tuple(self._holders.items()):
            if name == holder:
                return start
        return None

    def clear(self, slot: int | None) -> None:
        """Free a slot, because its lease was released or never acquired.

        :param slot: the result of :meth:`note`; with ``None`` nothing happens.
        """
        with self._lock:
            if slot is not None and self._memory is not None:
                self._memory[slot] = 0
                self._holders.pop(slot, None)
                self._free.append(slot)

    def close(self) -> None:
        """Remove this process's file, unless the process still holds a lease.

        A thread or greenlet can be in the middle of a run at a process's orderly exit. Then the
        file and its lock stay until the process is gone, and another process frees the lease.
        """
        with self._lock:
            if self._memory is not None and len(self._free) * SLOT < len(self._memory):
                return
            directory, self._directory = self._directory, None
            if self._memory is None or directory is None:
                return
            atexit.unregister(self.close)
            with contextlib.suppress(OSError):
                (directory / self._name).unlink()
            self._unlock(self._memory)

    def leave_to_parent(self) -> None:
        """In a forked child: give up the lock of the parent's file, and stop noting leases."""
        # Make a new lock, because another thread of the parent may have held the old lock at
        # the fork.
        self._lock = threading.Lock()
        self._directory = None
        if self._memory is not None:
            self._unlock(self._memory)

    def _unlock(self, memory: mmap.mmap) -> None:
        """Close both the file and its mapped memory: while either is open, the file is locked."""
        self._memory = None
        memory.close()
        os.close(self._descriptor)

    def of_dead_processes(self, name: str = "*") -> Iterator[list[HolderRecord]]:
        """Yield the leases of each dead process, and remove its file afterwards.

        If the caller raises an error before it asks for the next process, the file stays, so that
        the leases can still be freed later.

        :param name: a pattern (``glob``) for the names of the files; left out: all files.
        """
        for path in self._others(name):
            with _locked(path) as descriptor:
                if descriptor is not None:
                    yield _read(descriptor)
                    with contextlib.suppress(OSError):
                        path.unlink()

    def lives(self, holder: str) -> bool | None:
        """Return whether a holder's process lives; ``None`` if it has no holder file here."""
        name = file_of(holder)
        if name is None or self._directory is None:
            return None
        if name == self._name:
            return True
        path = self._directory / name
        with _locked(path) as descriptor:
            if descriptor is not None:
                return False
            return True if path.exists() else None

    def _others(self, name: str) -> list[Path]:
        if self._directory is None:
            return []
        try:
            return [path for path in self._directory.glob(name) if path.name != self._name]
        except OSError as error:  # the directory was removed, or no descriptor is free
            logger.debug("singletons: cannot search for dead processes' leases: %s", error)
            return []

    def _open(self, directory: Path) -> None:
        try:
            while True:
                descriptor = os.open(directory / self._name, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Another process may have deleted the file between open and flock, in the belief
                # that the owner is dead. So check the file's link count, and retry.
                if os.fstat(descriptor).st_nlink:
                    break
                os.close(descriptor)
            _make_room(descriptor, SLOT)
            self._memory = mmap.mmap(descriptor, SLOT)
        except OSError as error:
            logger.warning("singletons: if this process dies, its leases must expire: %s", error)
            self._directory = None
            return
        self._descriptor = descriptor
        self._free.append(0)
        atexit.register(self.close)

    def _grow(self, memory: mmap.mmap) -> mmap.mmap | None:
        size = len(memory)
        try:
            _make_room(self._descriptor, 2 * size)
            # The file is mapped again, because some systems cannot resize mapped memory.
            grown = self._memory = mmap.mmap(self._descriptor, 2 * size)
        except OSError as error:
            logger.warning("singletons: if this process dies, one lease must expire: %s", error)
            return None
        memory.close()
        self._free.extend(range(size, 2 * size, SLOT))
        return grown


def _make_room(descriptor: int, size: int) -> None:
    """Lengthen a file and reserve its disk space.

    If the disk is full, this raises an ``OSError``. Without the reservation, a later write to the
    mapped memory would kill the process by SIGBUS.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Try to lock another process's file, which succeeds only if that process is dead.

    A context manager. It gives the file's descriptor, or ``None`` if the file cannot be locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> list[HolderRecord]:
    found = []
    for start in range(0, os.fstat(descriptor).st_size, SLOT):
        used, record = os.pread(descriptor, 1, start), os.pread(descriptor, RECORD - 1, start + 1)
        if used == b"\1":
            # Leave out a record that cannot be decoded, so that it does not hide the others.
            with contextlib.suppress(msgspec.DecodeError):
                found.append(_decoder.decode(record.split(b"\0", 1)[0]))
    return found


def file_of(holder: str) -> str | None:
    """Return the name of the holder file in which a holder's process notes its leases.

    :returns: ``None`` if the holder's name is not one that this package makes.
    """
    match = re.fullmatch(r".*:(\d+):([0-9a-f]+)\.[0-9a-f]+", holder)
    return match and f"{match[1]}-{match[2]}"


def root() -> Path:
    """Return this user's directory of holder files, which has a subdirectory for each store.

    :raises OSError: there is no writable directory for temporary files.
    """
    return Path(tempfile.gettempdir(), f"celery-singletons-{os.getuid()}")


def directory_of(store: str | None) -> Path | None:
    """Return the directory of the holder files of this user, kernel and store; make it if need be.

    Directories of earlier boots stay, because they may belong to another host that is running now.
    They are small; the system's cleaning of temporary files removes them.

    :param store: a text that identifies the store; ``None`` if no other process can use the store.
    :returns: ``None`` if ``store`` is ``None``, or if the directory cannot be made or belongs to
        another user.
    """
    if store is None:
        return None
    try:
        parent = root()
        directory = parent / sha256(f"{_kernel()} {store}".encode()).hexdigest()[:16]
        for path in (parent, directory):
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise OSError(f"{path} belongs to another user or is no directory")
    except OSError as error:
        logger.warning("singletons: if a process dies, its leases must expire: %s", error)
        return None
    return directory


#: The file in which Linux shows the boot id, a random text that is new at each boot.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _kernel() -> str:
    """Return a text that is equal only for processes of one kernel, which share file locks.

    The text has the boot id and the host's name. The boot id alone is not enough: virtual machines
    that resumed from one snapshot have the same id without sharing locks, and so do some sandboxes
    with kernels of their own. The host's name has a price: containers of one host share the boot id
    and the locks, but with different names they do not find each other's files. After a death,
    their leases must expire. That costs seconds, while a live process that is taken for dead would
    break the guard.
    """
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        # Without a boot id, use the address of the network card. Without a network card, the number
        # is random in each process, so that processes do not find each other's files.
        boot = f"{uuid.getnode():x}"
    return f"{boot} {os.uname().nodename}"


_all: weakref.WeakSet[HolderFiles] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: give up the inherited locks, so that they do not outlive the parent."""
    for holder_files in list(_all):
        holder_files.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
