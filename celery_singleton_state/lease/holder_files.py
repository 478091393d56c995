"""What the processes of this host hold, on file, so that the leases of the dead can be freed.

Each process that runs singletons keeps a file in a directory of its own user and store, notes each
lease there before it asks for it, and holds a lock (``flock``) on the file for as long as it
lives. The kernel gives that lock up when the last descriptor of the file is closed, and so never
while the process lives, and always when it has died. Whoever gets the lock of another's file
knows, therefore, that its process is gone, and releases what the file names.

This holds only among processes of one kernel: on many network file systems hosts share files and
not their locks. So the directory is one boot's of one host, and nobody looks into another's
(:func:`_kernel`). Process ids are not asked, which may be given again, in a container for
instance. What is released is named by its holder, which is never given twice, and by its fence.

A child that a process forks has a copy of the lock, and gives it up at once: what a run holds is
its process's, and not its children's (:func:`_leave_to_parent`).
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

#: Bytes of a file that one lease has.
SLOT = 4096
#: The first bytes of a slot are the :class:`HolderRecord`'s: a key has 255 characters, a holder a
#: host's name. :mod:`celery_singleton_state.lease.renewal_slots` says what is in the others.
RECORD = 1536


class HolderRecord(msgspec.Struct, frozen=True, array_like=True):
    """A lease that a process holds, or was about to ask for.

    :param generation: of the message that it runs.
    :param sent: the value that tells the message from others with the same id, if it has one.
    """

    key: str
    holder: str
    generation: int
    sent: str | None = None


_decoder = msgspec.json.Decoder(HolderRecord)


class HolderFiles:
    """This process's own file, and those of the dead.

    :param directory: of :func:`directory_of`; ``None``: nothing is noted and nobody found.
    :param name: of this process's file: no other process ever has the same.
    """

    def __init__(self, directory: Path | None, name: str) -> None:
        self._directory = directory
        self._name = name
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._free: list[int] = []
        #: The holder's name of each slot in use.
        self._holders: dict[int, str] = {}
        _all.add(self)

    @property
    def directory(self) -> Path | None:
        """Where the files of this store's processes are, if leases are noted at all."""
        return self._directory

    def note(self, holder_record: HolderRecord) -> int | None:
        """Note a lease; returns the slot that it was given, if it could be."""
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
            # Only now is it one: who dies before has not asked for it.
            memory[start] = 1
            self._holders[start] = holder_record.holder
        return start

    def put(self, holder: str, at: int, data: bytes) -> bool:
        """Write bytes into a holder's slot; false if it has none."""
        with self._lock:
            start = self._slot_of(holder)
            if start is None or self._memory is None:
                return False
            self._memory[start + at : start + at + len(data)] = data
            return True

    def get(self, holder: str, at: int, size: int) -> bytes:
        """Read bytes from a holder's slot; none if it has no slot.

        Takes no lock, because a body that reads can be interrupted at any moment.
        """
        start, memory = self._slot_of(holder), self._memory
        if start is None or memory is None:
            return b""
        try:
            return memory[start + at : start + at + size]
        except ValueError:  # closed meanwhile
            return b""

    def _slot_of(self, holder: str) -> int | None:
        # A process that leaves renewals to its parent runs one body at a time: there is one slot,
        # or a few.
        for start, name in tuple(self._holders.items()):
            if name == holder:
                return start
        return None

    def clear(self, slot: int | None) -> None:
        """The lease of this slot was given back, or never acquired."""
        with self._lock:
            if slot is not None and self._memory is not None:
                self._memory[slot] = 0
                self._holders.pop(slot, None)
                self._free.append(slot)

    def close(self) -> None:
        """Remove the file, unless this process still holds something.

        Then the kernel gives up the lock when the process is gone, and not before: a thread or
        greenlet can be left in mid-run at a process's orderly exit.
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
        """In a forked child: give up its copies of the file's lock, and note nothing any more."""
        # Another thread of the parent's may have it.
        self._lock = threading.Lock()
        self._directory = None
        if self._memory is not None:
            self._unlock(self._memory)

    def _unlock(self, memory: mmap.mmap) -> None:
        """Close all that keeps the file open: mapped memory does, too."""
        self._memory = None
        memory.close()
        os.close(self._descriptor)

    def of_dead_processes(self, name: str = "*") -> Iterator[list[HolderRecord]]:
        """What each dead process held whose file has such a name.

        The file is removed when the caller comes back for the next; not if it raises.
        """
        for path in self._others(name):
            with _locked(path) as descriptor:
                if descriptor is not None:
                    yield _read(descriptor)
                    with contextlib.suppress(OSError):
                        path.unlink()

    def lives(self, holder: str) -> bool | None:
        """Whether a holder's process lives; ``None`` if that cannot be known here."""
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
        except OSError as error:  # a directory that went away, or no descriptor for it
            logger.debug("singletons: dead processes are not looked for: %s", error)
            return []

    def _open(self, directory: Path) -> None:
        try:
            while True:
                descriptor = os.open(directory / self._name, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Somebody may have found it before it was locked, and taken it for a dead one's.
                if os.fstat(descriptor).st_nlink:
                    break
                os.close(descriptor)
            _make_room(descriptor, SLOT)
            self._memory = mmap.mmap(descriptor, SLOT)
        except OSError as error:
            logger.warning("singletons: leases of a dead process will have to run out: %s", error)
            self._directory = None
            return
        self._descriptor = descriptor
        self._free.append(0)
        atexit.register(self.close)

    def _grow(self, memory: mmap.mmap) -> mmap.mmap | None:
        size = len(memory)
        try:
            _make_room(self._descriptor, 2 * size)
            # Mapped anew, because some systems cannot resize mapped memory.
            grown = self._memory = mmap.mmap(self._descriptor, 2 * size)
        except OSError as error:
            logger.warning("singletons: this lease would have to run out: %s", error)
            return None
        memory.close()
        self._free.extend(range(size, 2 * size, SLOT))
        return grown


def _make_room(descriptor: int, size: int) -> None:
    """Lengthen a file; where the disk is full this fails, and not the write, with SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """The file's descriptor if its process is dead."""
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
            # A broken one must not keep the others from being found.
            with contextlib.suppress(msgspec.DecodeError):
                found.append(_decoder.decode(record.split(b"\0", 1)[0]))
    return found


def file_of(holder: str) -> str | None:
    """The name of the file of a holder's process; ``None`` for no holder of ours."""
    match = re.fullmatch(r".*:(\d+):([0-9a-f]+)\.[0-9a-f]+", holder)
    return match and f"{match[1]}-{match[2]}"


def root() -> Path:
    """This user's directory of all stores.

    :raises OSError: there is no directory for temporary files that can be written to.
    """
    return Path(tempfile.gettempdir(), f"celery-singletons-{os.getuid()}")


def directory_of(store: str | None) -> Path | None:
    """The directory of this user's processes on this kernel that use a store; made if need be.

    ``None`` where it cannot be made or belongs to somebody else, and for no store. Those of earlier
    boots are left to whatever empties the directory for temporary files: whether they are of an
    earlier boot of this host, or of another host that runs, cannot be told. They are small.
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
                raise OSError(f"{path} belongs to somebody else")
    except OSError as error:
        logger.warning("singletons: leases of a dead process will have to run out: %s", error)
        return None
    return directory


#: Where Linux tells a random number that it draws when it starts.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _kernel() -> str:
    """The same text for processes that surely share one kernel, and so its locks on files.

    Containers of a host are told the same boot, and their locks are seen by each other. But virtual
    machines that go on from one snapshot are told the same as well, and so are some sandboxes with
    a kernel of their own. So the host's name must be the same, too. Containers with different names
    that share a directory do not find each other's files then: their leases run out, which costs
    some seconds, where a live run that is taken for dead would cost the guard.
    """
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        # The address of its network card; if that cannot be had, it is random in each process.
        boot = f"{uuid.getnode():x}"
    return f"{boot} {os.uname().nodename}"


_all: weakref.WeakSet[HolderFiles] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: a parent that dies is dead, whatever its children still do."""
    for holder_files in list(_all):
        holder_files.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
