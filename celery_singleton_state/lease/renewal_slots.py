"""How a child of a prefork worker has its parent renew its leases: by shared memory.

A body that keeps the GIL in C code (a regular expression that backtracks for seconds, say) lets no
other thread of its process run, the heartbeat's included. So the worker's own process renews the
leases of its children (:mod:`celery_singleton_state.worker.parent_renewal`). Each child has a file,
mapped into its memory, with a slot for each lease
(:mod:`celery_singleton_state.lease.holder_files`). A slot has three areas::

    holding (for whoever finds the process dead) | request (of the child) | answer (of the parent)

The child writes a :class:`RenewalRequest` when it begins to hold a lease, and clears it before it
gives the lease back or when its life has run out. The parent looks for requests, renews, and writes
a :class:`RenewalAnswer`: that the lease was renewed by a request sent at some moment, or that the
renewal was refused. After a refusal, or if somebody asks the holder to hand over, it sends a signal
as well. After a refusal it sends the signal again and again until the run has ended: a signal that
arrives just before a thread begins to sleep does not wake it.

Why this is right
-----------------
*No lease is mistaken for another.* A holder's name is never given twice, and the answer carries
it. The child takes an answer only if it names the holder of the lease that the child holds now,
and only until the lease is lost. What is left of earlier leases of the same slot is ignored.

*No half of an answer is taken.* Time and holder, which belong together, are written as one text
with a digest of it. A reader that finds bytes of several writes, in whatever order the memory shows
them, finds no matching digest, and reads again later. So nobody needs a lock, with which a process
could die or be stopped.

*The child trusts its lease no longer than it should.* The parent passes on the time before it sent
the request, by a clock that all processes of a host share. The life is counted from there, as if
the child had sent the request itself.

*The parent is not needed.* It can die, be stopped, or have no connection. A child whose lease was
not renewed by half of its life renews the lease itself. Both may renew at a time: a renewal only
prolongs.

*The parent need not know exactly.* A late renewal of a lease that was given back, or that was freed
because the child died, names a holder that is the row's no more, and is refused.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

from celery_singleton_state.text.visible import logger_of

from .holder_files import RECORD, SLOT, HolderFiles
from .lease import TRUSTED_PART, HeldLease

logger = logger_of(__name__)

REQUEST_AT = RECORD
ANSWER_AT = 3072
#: Part of a renewal's interval after which the parent sends it: well before half of the life, when
#: the child would send its own.
PARENTS_PART = 0.75
#: Bytes of a name that an answer has room for.
_LONGEST_NAME = 400
_DIGEST = 8
_HEAD = _DIGEST + 2


class RenewalRequest(msgspec.Struct, frozen=True, array_like=True):
    """A lease that a child leaves to its parent to renew.

    :param parent: the :func:`parents_mark` of the parent: another container's processes can share
        the directory and have the same process ids.
    :param asked_at: when the lease was asked for, or renewed last.
    :param every: seconds between renewals.
    :param is_apart: whether the lease is kept apart from states.
    """

    parent: str
    key: str
    holder: str
    fence: int
    ttl: float
    asked_at: float
    every: float
    is_apart: bool = False


class RenewalAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What became of the last renewal of a holder's lease.

    :param asked_at: :data:`~celery_singleton_state.lease.lease.clock` before it was sent; ``None``
        if it was refused.
    :param who: asks the holder to hand over, if anybody does.
    """

    holder: str
    asked_at: float | None
    handoff_to: str | None = None


_request_decoder = msgspec.json.Decoder(RenewalRequest)
_answer_decoder = msgspec.json.Decoder(RenewalAnswer)


class LeftToParent:
    """In a child: the leases whose renewal it leaves to its parent.

    :param parent: the parent's mark.
    :param is_apart: whether they are kept apart from states.
    """

    def __init__(self, holder_files: HolderFiles, parent: str, is_apart: bool = False) -> None:
        self._holder_files = holder_files
        self._parent = parent
        self._is_apart = is_apart

    def add(self, held: HeldLease) -> None:
        """Ask the parent to renew a lease from now on, and put off this process's own renewals."""
        lease = held.lease
        every = held.renew_every * PARENTS_PART
        sealed = _seal(
            RenewalRequest(
                parent=self._parent,
                key=lease.key,
                holder=lease.holder,
                fence=lease.fence,
                ttl=lease.ttl,
                asked_at=held.asked_at,
                every=every,
                is_apart=self._is_apart,
            )
        )
        room = ANSWER_AT - REQUEST_AT
        if len(sealed) > room or not self._holder_files.put(lease.holder, REQUEST_AT, sealed):
            return
        held.refresh = partial(self._trust, held)
        held.renew_every = min(TRUSTED_PART * lease.ttl / 2, 2 * held.renew_every)
        held.renew_at = held.asked_at + held.renew_every

    def remove(self, held: HeldLease) -> None:
        """Ask for no more renewals of a lease."""
        self._holder_files.put(held.lease.holder, REQUEST_AT, bytes(_HEAD))

    def answer_to(self, held: HeldLease) -> RenewalAnswer | None:
        """The parent's last answer for a lease, if there is one."""
        holder = held.lease.holder
        text = _unseal(self._holder_files.get(holder, ANSWER_AT, SLOT - ANSWER_AT))
        answer = _answer_decoder.decode(text) if text else None
        return answer if answer is not None and answer.holder == holder else None

    def _trust(self, held: HeldLease) -> None:
        """Trust a lease for as long as the parent's last renewal of it allows."""
        answer = self.answer_to(held)
        if answer is not None and answer.asked_at is not None:
            held.renewed(answer.asked_at)


def requests_in(path: Path) -> Iterator[tuple[int, RenewalRequest]]:
    """The requests in a process's file, each with the start of its slot.

    A file that is gone, or cannot be read, has none: its process renews by itself.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        logger.debug("singletons: %s cannot be read: %s", path, error)
        return
    try:
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)
    for start in range(0, len(content), SLOT):
        text = _unseal(content[start + REQUEST_AT : start + ANSWER_AT])
        if content[start] and text:
            yield start, _request_decoder.decode(text)


def write_answer(path: Path, start: int, answer: RenewalAnswer) -> None:
    """Write the answer to the request that was found in a slot.

    :raises OSError: it cannot be written, or the file is gone with its process.
    """
    if answer.handoff_to is not None:
        # It is for people, and comes from a task's id, which can be any text.
        name = answer.handoff_to.encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")
        answer = msgspec.structs.replace(answer, handoff_to=name)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, _seal(answer), start + ANSWER_AT)
    finally:
        os.close(descriptor)


def _seal(what: msgspec.Struct) -> bytes:
    text = msgspec.json.encode(what)
    return _digest(text) + len(text).to_bytes(2, "big") + text


def _unseal(area: bytes) -> bytes:
    """The text that was sealed; nothing if there is none, or only a part of it."""
    text = area[_HEAD : _HEAD + int.from_bytes(area[_DIGEST:_HEAD], "big")]
    return text if text and area[:_DIGEST] == _digest(text) else b""


def _digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=_DIGEST).digest()


# -- which process is the parent

#: Forked and spawned children have their parent's environment, and so have others that they start.
_MARK = "_CELERY_SINGLETON_STATE_PARENT"


def mark_as_parent() -> str:
    """Have the children that this process will make leave renewals to it; returns its mark."""
    mark = _mark_by(os.getpid())
    if mark is None:
        mark = secrets.token_hex(8)
        os.environ[_MARK] = f"{os.getpid()}:{mark}"
    return mark


def parents_mark() -> str | None:
    """The mark of this process's parent, if that renews for its children."""
    return _mark_by(os.getppid())


def _mark_by(pid: int) -> str | None:
    owner, _, mark = os.environ.get(_MARK, "").partition(":")
    return mark if owner == str(pid) else None


# -- the parent's signal

#: By which the parent says that it has written an answer that cannot wait. A process without a
#: handler ignores it.
ANSWERED = getattr(signal, "SIGURG", None)

_listening: list[weakref.WeakMethod[Callable[[], None]]] = []
#: The handler only puts something here: it can interrupt code that holds any lock, and another
#: handler can raise within it.
_signals: SimpleQueue[None] = SimpleQueue()
_installed = False
_previous: Any = None


def listen(callback: Callable[[], None]) -> None:
    """Have a method called at each signal of the parent's, in a thread.

    C code that keeps the GIL, but looks for signals as ``re`` does, calls the handler. That is
    Python code, so while it runs, other threads get the GIL.
    """
    _listening.append(weakref.WeakMethod(callback))
    hear_signals()


def hear_signals() -> None:
    """Install the signal's handler, if this is the main thread and nobody has done so."""
    global _installed, _previous
    if _installed or ANSWERED is None:
        return
    if threading.current_thread() is threading.main_thread():
        _installed = True
        threading.Thread(target=_call_listeners, name="singleton-signals", daemon=True).start()
        _previous = signal.signal(ANSWERED, _on_signal)


def _on_signal(number: int, frame: Any) -> None:
    _signals.put(None)
    if callable(_previous):
        _previous(number, frame)


def _call_listeners() -> None:
    while True:
        _signals.get()
        for listening in _listening:
            callback = listening()
            try:
                if callback is not None:
                    callback()
            except Exception:  # the next signal must be heard as well
                logger.exception("singletons: the answers of the worker could not be taken")
