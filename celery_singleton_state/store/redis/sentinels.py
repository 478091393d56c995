"""Sentinels, which say where the primary is."""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError, TimeoutError
from redis.sentinel import MasterNotFoundError, Sentinel

from celery_singleton_state.store.base import one_line

#: What all sentinels say of a name that none of them watches over.
UNKNOWN = "no sentinel knows a master of this name"


class Sentinels(Sentinel):
    """The client library's, but for the text of its error: it has the representation of each
    client in it, which is long, and has the sentinels' password in some releases.
    """

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """The host and the port of the primary.

        :raises MasterNotFoundError: no sentinel says it; the text says why.
        """
        answers = {}
        for number, sentinel in enumerate(self.sentinels):
            try:
                masters: Any = sentinel.sentinel_masters()
            except (ConnectionError, TimeoutError) as error:
                answers[_place(sentinel)] = one_line(error)
                continue
            state = masters.get(service_name)
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]
                # The next look begins with a sentinel that answers.
                self.sentinels[0], self.sentinels[number] = sentinel, self.sentinels[0]
                return state["ip"], state["port"]
            answers[_place(sentinel)] = "it calls the master down" if state else UNKNOWN
        if set(answers.values()) == {UNKNOWN}:
            raise MasterNotFoundError(f"{UNKNOWN}: {service_name!r}; asked: {', '.join(answers)}")
        said = "; ".join(f"{place}: {answer}" for place, answer in answers.items())
        raise MasterNotFoundError(f"no sentinel names a master for {service_name!r} ({said})")


def _place(sentinel: Redis) -> str:
    given: Any = sentinel.connection_pool.connection_kwargs
    return f"{given.get('host')}:{given.get('port')}"
