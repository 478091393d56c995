"""Renewal by the parent: children of a prefork worker leave their leases' renewal to the parent.

A body that keeps the GIL in C code (a regular expression that backtracks for seconds, say) lets no
other thread of its process run, the heartbeat's included. So the worker's own process renews the
leases of its children (:mod:`celery_singleton_state.worker.parent_renewal`). Parent and child
communicate through the child's holder file, which is mapped into its memory: shared memory, in
effect. The file has a slot for each lease
(:mod:`celery_singleton_state.lease.holder_files`). A slot has three areas::

    record (the lease, if the child dies) | request (by the child) | answer (by the parent)

The child writes a :class:`RenewalRequest` when it begins to hold a lease. It clears the request
before it releases the lease, or when the lease has expired. The parent polls the requests, renews
the leases, and writes a :class:`RenewalAnswer`. The answer says when the parent sent the successful
renewal, or that the store refused the renewal. After a refusal, or if a message asks the holder to
hand over, the parent also sends a signal. After a refusal it repeats the signal until the run has
ended, because a signal that arrives just before a thread begins to sleep does not wake the thread.

Why this is right
-----------------
*No lease is mistaken for another.* A holder's name is never given twice, and each answer names the
holder. The child accepts an answer only if it names the holder of the child's present lease, and
only until that lease is lost. So answers that earlier leases left in the slot are ignored.

*No half-written answer is accepted.* An answer's time and holder belong together, so they are
written as one text with a digest. A reader that finds a mix of several writes finds no matching
digest, and reads again later. So no lock is needed, which would be a danger: a process that is
stopped or dies could keep the lock.

*The child trusts its lease no longer than it should.* The answer has the time just before the
parent sent the request, by a clock that all processes of a host share. The child counts the lease's
life from that time, as if it had sent the request itself.

*The child does not depend on the parent.* The parent can die, be stopped, or have no connection. If
half of a lease's life has passed without a renewal, the child renews the lease itself. Parent and
child may renew at the same time, because a renewal only moves the expiry further away.

*The parent may be late.* If it renews a lease that was released, or that was freed because the
child died, the row does not name that holder any more, and the store refuses the renewal.
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
#: The time after which the parent renews a lease, as a fraction of the usual renewal interval. This
#: is well before half of the lease's life, when the child would renew the lease itself.
PARENTS_PART = 0.75
#: The largest size, in bytes, of the task id of the message that asks for a handoff, in a
#: :class:`RenewalAnswer`. A longer task id is cut.
_LONGEST_NAME = 400
_DIGEST = 8
_HEAD = _DIGEST + 2


class RenewalRequest(msgspec.Struct, frozen=True, array_like=True):
    """A child's request to its parent: renew this lease.

    :param parent: the mark of the parent, a random text (:func:`parents_mark`). The parent's
        process id would not be enough: the processes of another container can share the directory
        and have the same ids.
    :param key, holder, fence: which lease to renew.
    :param ttl: the lease's life in seconds.
    :param asked_at: :data:`~celery_singleton_state.lease.lease.clock` just before the child asked
        for the lease or last renewed it.
    :param every: seconds between renewals by the parent.
    :param is_apart: true if the lease is in the store of ``singleton_lease_url``; false if it is in
        the main store, which also has the states.
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
    """A parent's answer to its child: the outcome of the last renewal of a lease.

    :param holder: the holder of the lease.
    :param asked_at: :data:`~celery_singleton_state.lease.lease.clock` just before the renewal was
        sent; ``None`` if the store refused it.
    :param handoff_to: the task id of the message that asks the holder to hand over; ``None`` if no
        message does.
    """

    holder: str
    asked_at: float | None
    handoff_to: str | None = None


_request_decoder = msgspec.json.Decoder(RenewalRequest)
_answer_decoder = msgspec.json.Decoder(RenewalAnswer)


class LeftToParent:
    """In a child process: leaves the renewal of leases to the parent, and reads its answers.

    :param holder_files: the holder files, with the slots of this process's leases.
    :param parent: the parent's mark, from :func:`parents_mark`.
    :param is_apart: true if the leases are in the store of ``singleton_lease_url``; false if they
        are in the main store, which also has the states.
    """

    def __init__(self, holder_files: HolderFiles, parent: str, is_apart: bool = False) -> None:
        self._holder_files = holder_files
        self._parent = parent
        self._is_apart = is_apart

    def add(self, held: HeldLease) -> None:
        """Ask the parent to renew a lease from now on, and delay this process's own renewals."""
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
        """Withdraw the request to renew a lease."""
        self._holder_files.put(held.lease.holder, REQUEST_AT, bytes(_HEAD))

    def answer_to(self, held: HeldLease) -> RenewalAnswer | None:
        """Return the parent's last answer for a lease; ``None`` if there is none yet."""
        holder = held.lease.holder
        text = _unseal(self._holder_files.get(holder, ANSWER_AT, SLOT - ANSWER_AT))
        answer = _answer_decoder.decode(text) if text else None
        return answer if answer is not None and answer.holder == holder else None

    def _trust(self, held: HeldLease) -> None:
        """Extend this process's trust in a lease, counted from the parent's last renewal."""
        answer = self.answer_to(held)
        if answer is not None and answer.asked_at is not None:
            held.renewed(answer.asked_at)


def requests_in(path: Path) -> Iterator[tuple[int, RenewalRequest]]:
    """Yield the requests in a child's holder file, each with the start of its slot.

    A file that is missing or cannot be read yields nothing: its process then renews by itself.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        logger.debug(
            "singletons: cannot read %s, so its process renews its leases itself: %s", path, error
        )
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
    """Write an answer into the slot of its request.

    :param path: the child's holder file.
    :param start: the start of the slot, from :func:`requests_in`.
    :raises OSError: the answer cannot be written, or the file is gone because its process ended.
    """
    if answer.handoff_to is not None:
        # This task id can be any text. It is only shown to people, so it may be cut.
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
    """Return the JSON text in an area of a slot; empty if the text does not match its digest."""
    text = area[_HEAD : _HEAD + int.from_bytes(area[_DIGEST:_HEAD], "big")]
    return text if text and area[:_DIGEST] == _digest(text) else b""


def _digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=_DIGEST).digest()


# -- which process is the parent

#: The environment variable by which children find the mark of their parent: it has the parent's
#: process id and mark. Forked and spawned children inherit the variable. Programs that the children
#: start inherit it, too, but the process id shows that such a program is no child of the parent.
_MARK = "_CELERY_SINGLETON_STATE_PARENT"


def mark_as_parent() -> str:
    """Mark this process as the parent that renews its future children's leases; return the mark.

    The mark is a random text. Every call in a process returns the same mark.
    """
    mark = _mark_by(os.getpid())
    if mark is None:
        mark = secrets.token_hex(8)
        os.environ[_MARK] = f"{os.getpid()}:{mark}"
    return mark


def parents_mark() -> str | None:
    """Return the mark of this process's parent; ``None`` if the parent renews no leases for it."""
    return _mark_by(os.getppid())


def _mark_by(pid: int) -> str | None:
    owner, _, mark = os.environ.get(_MARK, "").partition(":")
    return mark if owner == str(pid) else None


# -- the parent's signal

#: The signal by which the parent tells a child to read an urgent answer now. SIGURG, because a
#: process without a handler ignores it; ``None`` where the system has no such signal.
ANSWERED = getattr(signal, "SIGURG", None)

_listening: list[weakref.WeakMethod[Callable[[], None]]] = []
#: A queue with one item for each signal from the parent. The signal's handler only puts an item
#: here. It must not take a lock, because the interrupted code can hold any lock, and because the
#: handler of another signal can raise an error within this one.
_signals: SimpleQueue[None] = SimpleQueue()
_installed = False
_previous: Any = None


def listen(callback: Callable[[], None]) -> None:
    """Call a method, in a thread of its own, whenever the parent sends its signal.

    This also works while C code keeps the GIL, if that code checks for signals, as ``re`` does.
    Such code calls the signal's handler. The handler is Python code, so other threads get the GIL
    while it runs.

    :param callback: a bound method; it is not called any more when its object is gone.
    """
    _listening.append(weakref.WeakMethod(callback))
    hear_signals()


def hear_signals() -> None:
    """Install the handler of the parent's signal, once.

    Only the main thread can install it. In other threads nothing happens.
    """
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
            except Exception:  # go on after any error: the next signal needs this thread
                logger.exception("singletons: cannot read the answers of the parent process")
