"""The lease: who may run, for how long, and what happens when that goes wrong.

Terms
-----
A *lease* is the expiring, exclusive right to run one singleton. It is a part of the
singleton's row in the store and has a *holder* (``nodename:pid:nonce``, new for each
acquisition), a *fence* (a number that only grows) and an expiry. Only the store's clock decides
whether a lease has expired, so clocks of different machines are never compared.

An acquisition sets the fence to the larger of the last fence + 1 and the store's clock in
milliseconds. So the store never gives a fence twice, even after it lost its newest commits, was
restored from a backup, was wiped, or had the row pruned. The one exception is a store whose clock
is behind by more than the time that was lost.

Two guards, of different strength
---------------------------------
*The expiry* keeps two bodies from running at the same time. It is as good as clocks and
schedulers are: a process that is stopped for longer than its lease's life wakes up while the next
run is in progress, and does not know of that run.

*The fence* keeps such a process from doing harm. Every write to the row names the fence and
the holder, and changes nothing if the row has another fence or holder by then. This guard needs no
clock at all. A write does not need an expiry in the future: a holder whose lease has expired is
still the only process that may write, until another holder acquires the lease.

Late requests
-------------
The server can carry out a request after its client gave it up: a moment or a day later, after the
client repeated it, after the run has ended, after the process has died. Or the server never carries
it out. An answer can be lost. Five rules make all of that harmless:

1. *Writes are numbered.* A run numbers its writes of the state 1, 2, 3 …, and each write names the
   newest number that the store has answered. The store refuses a write if it has carried out a
   newer one (the refused write is late), or if a write that it answered is missing (it lost
   commits). A run never gives one number to two contents, so a write can be repeated.
2. *A repeated acquisition changes nothing*, except that it can move the expiry further away.
3. *The first life is short*: at most the heartbeat's interval times its threshold. A run whose
   ``lease_ttl`` is longer renews the lease once before its body begins, to get the whole life. So
   an acquisition that is carried out late blocks the singleton for a short time only.
4. *A process releases each lease that it may still hold although no run uses it*, for example
   because the answer to an acquisition was lost (:mod:`celery_singleton_state.lease.unreleased`). A
   lease that a run has used is released only after the run's body has ended.
5. *An outcome is known or unknown, and nothing is assumed.* After a COMMIT without an answer, the
   run reads the row under the row's lock. If the store does not answer this request either, the run
   writes nothing more.

How long a holder may trust its lease
-------------------------------------
::

    trusted until = its own clock just before the request was sent + 0.9 * the lease's life

The store starts to count when the request arrives, which is later. So the holder stops trusting its
lease before the store can give it to another holder. The last tenth is for the body: by default,
the body is told of the loss 0.8 s before the lease expires. Two bodies do not overlap if the first
one ends within this tenth, minus twice the error that the two clocks build up over a lease's life.
The holder's clock keeps counting while the machine is suspended. A renewal that succeeds moves the
end of the trust: it is then counted from the time just before the renewal was sent. A lease is
renewed every interval, and never later than half-way through the time for which it is trusted, so
that one renewal can fail and be repeated.

::

                      acquire                    save and release
            free ----------------->  held  -----------------------------> free
              ^                      |  ^
              |               renew, |  | renewed or saved in time
              |                 save +--+
              |                      |
              |                      |  refused, or trusted no longer
              |                      v
              |                     lost      every write from here is refused
              |                      .
              |                      .  the row still names the lost holder ...
              +----------------------+  ... until its expiry: then acquire takes it, fence + 1

What happens in each case
-------------------------
- *The body raises*: the run releases the lease without saving; the last checkpoint stays.
- *The holder dies*: a process on its host that learns of the death releases the lease in the
  holder's name. The store refuses this if another holder has the lease by then.
  (:mod:`celery_singleton_state.lease.holder_files` says how a process learns of a death.)
  Another host cannot tell; there, the next acquisition after the expiry succeeds.
- *The lease is kept after a run* (``hold_at_least``): the release removes the holder, and notes in
  ``hold_until`` the time before which the store refuses each acquisition. The row has no holder in
  this hold period, so late and repeated requests of the run are refused like a stale holder's.
- *A message asks the holder to hand over*: the answer to the holder's next renewal or save says so,
  and the holder releases.
- *The holder is paused and wakes up*: if another holder acquired the lease meanwhile, the store
  refuses the first holder's renewal and save, and its run ends as ``HeartbeatFailed``.
- *The store is unavailable*: the holder trusts its lease for 0.9 of its life, and counts it as lost
  then; the store gives it to no other holder earlier.
- *A request was carried out and its answer lost*: if the same holder acquires again, the store
  answers the same fence. A repeated save changes nothing. After a release, the row's history names
  the run and its outcome, and the holder recognises them. If so many runs ended since then that the
  history may have dropped the entry, the outcome is unknown, and the run fails as
  ``StatePersistFailed``.
"""
