"""The lease: who may run, for how long, and what happens when that goes wrong.

Terms
-----
A *lease* is the expiring, exclusive right to run one singleton. It is a part of the
singleton's row in the store and has a *holder* (``nodename:pid:nonce``, new for each
acquisition), a *fence* (a number that only grows) and an expiry. Only the store's clock decides
whether a lease has expired, so no clock is ever compared with another machine's.

An acquisition makes the fence the larger of the last fence + 1 and the store's clock in
milliseconds. So a store that lost its newest commits, was restored from a backup or wiped, or whose
row was pruned, gives no fence twice, unless its clock is behind by more than it lost.

Two guards, of different strength
---------------------------------
*The expiry* keeps two bodies from running at the same time. It is as good as clocks and
schedulers are: a process that is stopped for longer than its lease's life wakes up beside its
successor and does not know.

*The fence* keeps such a process from doing harm. Every write to the row names the fence and
the holder, and changes nothing when either is no longer the row's. It needs no clock at all.
A write does not ask for an expiry in the future: a holder that is late but has no successor is
still the only one who may write.

Late requests
-------------
The server can carry out a request after its client gave it up: a moment or a day later, after the
client repeated it, after the run has ended, after the process has died. Or never. An answer can be
lost. Five rules make all of that harmless:

1. *Writes are numbered.* A run numbers the writes of a state within its lease 1, 2, 3 …, and each
   names the newest number whose answer has come. The store refuses a write when a newer one was
   carried out (it is late), or when an answered one is missing (the store lost commits). The same
   number is the same content for ever, so a write can be repeated.
2. *A repeated acquisition changes nothing*, except that it never brings the expiry nearer.
3. *The first life is short*: at most interval times threshold. A run whose ``lease_ttl`` is longer
   confirms it by one renewal before its body begins. So an acquisition that is carried out late
   holds the lease for nobody for a short time only.
4. *What a process may hold without knowing it gives back*
   (:mod:`celery_singleton_state.run.unreleased`), but not before the body has ended.
5. *An outcome is known or unknown, and nothing is assumed.* After a COMMIT without an answer the
   run asks the row under its lock. If that is not answered either, the run writes nothing any more.

How long a holder may trust its lease
-------------------------------------
::

    trusted until = its own clock just before the request was sent + 0.9 * the lease's life

The store starts to count when the request arrives, which is later; so the holder stops trusting
its lease before the store gives it away. The last tenth is for the body: it hears of the loss with
0.8 s left by default, and two bodies do not overlap if it ends within that time (less twice the
difference between the rates of the two clocks over a life). The holder's clock goes on while the
machine is suspended. A renewal that succeeds moves the moment on, counted from before *that*
request. A lease is renewed every interval, and never later than half-way through the time that it
is trusted, so that one renewal can fail and be repeated.

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

What happens when
-----------------
- *The body raises*: released without saving; what was checkpointed stays.
- *The holder dies*: whoever on its host learns of it releases the lease in its name, and is
  refused if somebody else has it by then (:mod:`celery_singleton_state.lease.holder_files` says how
  one can know). From another host nobody can tell; the next acquisition after the expiry succeeds.
- *The lease is kept after a run* (``hold_at_least``): the release strikes out the holder, and
  notes in ``hold_until`` until when nobody can acquire the lease. Nobody is the holder in this hold
  period, so what the run sent before, and repeats, is refused like a stale holder's.
- *Somebody asks the holder to hand over*: it is told by its next renewal or save, and releases.
- *The holder is paused and wakes up*: if somebody acquired meanwhile, its renewal and its save
  are refused, and its run ends as ``HeartbeatFailed``.
- *The store is out of reach*: the holder trusts its lease to the end of its life, and is lost
  then; the store gives it to nobody earlier.
- *A request was carried out and its answer lost*: acquiring again with the same holder answers
  the same fence; saving again is the same save; after a release, the row's history names the
  run and its outcome, which is how its holder knows. If so many runs ended since that the history
  may have dropped it, the outcome is unknown, and the run fails as ``StatePersistFailed``.
"""
