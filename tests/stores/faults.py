"""Faults that the model's tests must find. Each fault changes one place in one statement or script.

Faults of statements are planted into the store in memory, which uses SQLite's statements. Faults of
scripts are planted into Redis.
"""

from __future__ import annotations

from celery_singleton_state.store.sql.store import SqlStore

IN_ORDER = "AND write BETWEEN :seen AND :number"
NEW_QUEUE = "'now'), 0, 1)"
SAME = "CASE WHEN mine.holder = :holder THEN"
#: Maps each fault's name to the statement, the right text that is replaced in it, and the faulty
#: text.
FAULTS = {
    "acquire takes a held lease": ("acquire", "(mine.holder IS NULL OR", "(1 = 1 OR"),
    "acquire raises no fence": ("acquire", "abs(-1 - coalesce(mine.fence, 0))", "mine.fence"),
    "acquire ignores the clock": (
        "acquire",
        "mine.newest, 0)),\n",
        "mine.newest, 0)), 0 *\n",
    ),
    "acquire ignores the ranks for its fence": (
        "acquire",
        "abs(-1 - coalesce(mine.newest, 0))",
        "0",
    ),
    "acquire by an older message": (
        "acquire",
        "ELSE max(coalesce(mine.fence",
        "ELSE 0 * max(coalesce(mine.fence",
    ),
    "acquire by a message older than a fence": (
        "acquire",
        "max(coalesce(mine.fence, 0), coalesce(mine.newest, 0)) <= :rank",
        "coalesce(mine.newest, 0) <= :rank",
    ),
    "acquire by a message that was sent earlier": ("acquire", "NOT coalesce(", "1 OR coalesce("),
    "acquire does not store when its message was sent": ("acquire", "ELSE :sent END", "END"),
    "a new row's fence ignores the clock": (
        "acquire",
        " AS INTEGER), 0, 1,",
        " AS INTEGER) * 0 + 1, 0, 1,",
    ),
    "acquire again raises the fence": ("acquire", f"{SAME} mine.fence", f"{SAME} mine.fence + 1"),
    "acquire again resets the number": ("acquire", f"{SAME} mine.write", f"{SAME} 0"),
    "acquire again sets the first life": ("acquire", "coalesce(mine.expires_at", "coalesce(NULL"),
    "acquire again drops the handoff request": ("acquire", f"{SAME} mine.handoff_to END", "NULL"),
    "acquire again changes the queue": (
        "acquire",
        f"{SAME} mine.queue ",
        f"{SAME} mine.queue + 1 ",
    ),
    "acquire again sets a new time": (
        "acquire",
        f"acquired_at = {SAME} mine.acquired_at\n",
        "acquired_at = CASE WHEN 1 = 0 THEN 0\n",
    ),
    "acquire does not change the queue": ("acquire", "coalesce(mine.queue, 0) + 1", "mine.queue"),
    "acquire leaves its message queued": (
        "acquire",
        "queued_task_id = :task_id THEN NULL",
        "queued_task_id = :task_id THEN mine.queued_until",
    ),
    "acquire does not mark a takeover": ("acquire", "THEN -1 ELSE 0", "THEN 0 ELSE 0"),
    "save without the key": ("save", "key = :key AND", ""),
    "save without the fence": ("save", "AND fence = :fence", ""),
    "save without the holder": ("save", "AND holder = :holder", ""),
    "save in time only": ("save", "WHERE", "WHERE expires_at > '2001-01-01' AND"),
    "save in any order": ("save", IN_ORDER, ""),
    "save without what was seen": ("save", IN_ORDER, "AND write <= :number"),
    "save does not store its number": ("save", "write = :number,", ""),
    "release without the fence": ("release", "AND fence = :fence", ""),
    "release without the holder": ("release", "AND holder = :holder", ""),
    "release does not free the lease": ("release", "holder = NULL", "holder = holder"),
    "release in any order": ("release", IN_ORDER, ""),
    "release without what was seen": ("release", IN_ORDER, "AND write <= :number"),
    "a hold period is not stored": (
        "release",
        "> strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')\n    THEN",
        "IS NULL THEN",
    ),
    "acquire in a hold period": ("acquire", "AND (mine.hold_until IS NULL OR", "AND (1 = 1 OR"),
    "put in a hold period": ("put", "AND (mine.hold_until IS NULL OR", "AND (1 = 1 OR"),
    "a hold period counts from the release": ("release", "acquired_at, :hold", "'now', :hold"),
    "give back without the holder": ("give_back", "AND holder = :holder", ""),
    "give back does not free": ("give_back", "holder = NULL", "holder = holder"),
    "written is always true": ("written", "write >= :number", "1 = 1"),
    "written without the fence": ("written", "fence = :fence AND", ""),
    "renew without the fence": ("renew", "AND mine.fence = held.fence", ""),
    "renew without the holder": ("renew", "AND mine.holder = held.holder", ""),
    "record without the fence": ("record", "AND fence = :fence", ""),
    "record without the holder": ("record", "AND holder = :holder", ""),
    "record without a renewal": ("record", "expires_at = excluded.expires_at,", ""),
    "record in any order": ("record", IN_ORDER, ""),
    "record without what was seen": ("record", IN_ORDER, "AND write <= :number"),
    "record does not store its number": ("record", "write = excluded.write,", ""),
    "forget without the fence": ("forget", "AND fence = :fence", ""),
    "forget without the holder": ("forget", "AND holder = :holder", ""),
    "forget in any order": ("forget", IN_ORDER, ""),
    "request_run without the pending run that was seen": (
        "request_run",
        "AND wanted IS :wanted",
        "",
    ),
    "request_run without the holder": ("request_run", "AND holder IS :holder", ""),
    "request_handoff without the holder": ("request_handoff", "AND holder IS :holder", ""),
    "request_handoff without the fence": ("request_handoff", "AND fence = :fence", ""),
    "request_handoff in any order": (
        "request_handoff",
        "coalesce(newest, 0) < :rank OR",
        "1 = 1 OR",
    ),
    "a repeated request_handoff is refused": ("request_handoff", "newest = :rank AND", "1 = 0 AND"),
    "request_run without the fence": ("request_run", "AND fence = :fence", ""),
    "pending_run_sent removes any pending run": (
        "pending_run_sent",
        "AND wanted = :pending_run",
        "",
    ),
    "release_early without the fence": ("release_early", "AND fence = :fence", ""),
    "claim without the number": ("claim", "coalesce(mine.queue, 0) = :number OR", "1 = 1 OR"),
    "a repeated claim is refused": ("claim", "mine.queue = :number + 1 AND", "1 = 0 AND"),
    "a first claim counts as a repetition": ("claim", "AND :first = 0", ""),
    "claim does not change the number": ("claim", "queue = :number + 1\n", "queue = :number\n"),
    "dequeue does not change the number": ("dequeue", "coalesce(mine.queue, 0) + 1", "mine.queue"),
    "dequeue does not make a row": ("dequeue", NEW_QUEUE, NEW_QUEUE.replace("0, 1", "0, 0")),
    "put without the fence": ("put", "coalesce(mine.fence, 0) = :fence AND", ""),
    "put without the number": ("put", "AND coalesce(mine.write, 0) = :write", ""),
    "put does not change the number": ("put", "coalesce(mine.write, 0) + 1", "mine.write"),
    "put into a held lease": ("put", "mine.holder IS NULL", "1 = 1"),
}


#: Maps each fault's name to the Redis script, the right text that is replaced in it, and the faulty
#: text.
REDIS_FAULTS = {
    "release without the fence": (
        "RELEASE",
        "if other ~= holder or last ~= fence then",
        "if other ~= holder then",
    ),
    "acquire ignores the clock": ("ACQUIRE", "tonumber(newest or '0') < clock", "false"),
    "acquire does not mark a takeover": ("ACQUIRE", "write = other and -1 or 0", "write = 0"),
    "acquire by an older message": ("ACQUIRE", "other ~= holder and is_older", "false"),
    "request_handoff in any order": (
        "REQUEST_HANDOFF",
        "not is_larger(rank, newest) and",
        "false and",
    ),
    "give back without the holder": ("GIVE_BACK", "other ~= ARGV[1]", "not other"),
    "claim without the number": ("CLAIM", "queue ~= number and not is_repeated", "false"),
}


#: Maps a statement's name in ``FAULTS`` to several statements. A fault of that name is planted into
#: each of them that contains the right text.
SEVERAL = {"release": ("release", "save_and_release")}


def plant(store: SqlStore, statement: str, right: str, wrong: str) -> SqlStore:
    """Plant a fault: replace the right text of a store's statement by the wrong one. Return the
    store.
    """
    texts = vars(store._sql)
    names = [name for name in SEVERAL.get(statement, (statement,)) if right in texts[name]]
    assert names
    texts.update({name: texts[name].replace(right, wrong) for name in names})
    return store


#: The faults that are planted in the ordinary tests, because the random steps soon find them; ``tox
#: -e spec`` plants all faults.
BRIEFLY = (
    "acquire ignores the clock",
    "acquire again resets the number",
    "request_handoff in any order",
    "save without the fence",
    "save in any order",
    "save without what was seen",
    "record in any order",
    "claim without the number",
    "dequeue does not change the number",
    "request_run without the pending run that was seen",
)
REDIS_BRIEFLY = ("claim without the number", "request_handoff in any order")
