"""Ask Redis Sentinels for the address of the primary."""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError, TimeoutError
from redis.sentinel import MasterNotFoundError, Sentinel

from celery_singleton_state.store.base import one_line

#: The words by which an error reports that a sentinel does not watch a master of the given name.
#: The module ``errors`` recognises these words, in order to add advice.
UNKNOWN = "no sentinel knows a master of this name"


class Sentinels(Sentinel):
    """The client library's ``Sentinel``, with another error text for the case that no primary is
    found.

    The library's own text contains the ``repr`` of each client. A ``repr`` is long, and in some
    releases it shows the sentinels' password.
    """

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return the host and the port of the primary.

        :param service_name: the master's name, as the sentinels are configured.
        :raises MasterNotFoundError: no sentinel names a primary. The error's text has the answer of
            each sentinel.
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
                # Move this sentinel to the front, so that the next call asks one that answers.
                self.sentinels[0], self.sentinels[number] = sentinel, self.sentinels[0]
                return state["ip"], state["port"]
            answers[_place(sentinel)] = "it considers the master down" if state else UNKNOWN
        if set(answers.values()) == {UNKNOWN}:
            raise MasterNotFoundError(f"{UNKNOWN}: {service_name!r}; asked: {', '.join(answers)}")
        said = "; ".join(f"{place}: {answer}" for place, answer in answers.items())
        raise MasterNotFoundError(f"no sentinel names a master for {service_name!r} ({said})")


def _place(sentinel: Redis) -> str:
    given: Any = sentinel.connection_pool.connection_kwargs
    return f"{given.get('host')}:{given.get('port')}"
