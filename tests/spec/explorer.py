"""Explore a small model exhaustively, breadth first."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

Item = TypeVar("Item")


class Model(Protocol):
    """What can be explored. States are hashable values."""

    def start(self) -> Hashable:
        """The first state."""

    def steps(self, state: Any) -> Iterable[tuple[str, Any]]:
        """All steps that can come next: each one's name and the state that follows.

        The state ``None`` stands for a step that the model's bounds rule out.

        :raises Broken: a step breaks an invariant.
        """

    def broken(self, state: Any) -> str | None:
        """Which invariant a state breaks, if any."""


class Broken(Exception):
    """A step breaks an invariant; the message says which, and how."""


class Explored(NamedTuple):
    """What an exploration found.

    :param states: the number of different states that were reached.
    :param fault: the steps of a shortest way to a broken invariant, which is the last line; empty
        if no reachable state breaks one.
    """

    states: int
    fault: tuple[str, ...]

    def __str__(self) -> str:
        found = "\n".join(("an invariant is broken:", *self.fault)) if self.fault else "holds"
        return f"{self.states:,} states: {found}"


def explore(model: Model) -> Explored:
    """Visit all states that can be reached, or all up to the first broken invariant.

    Visited states are told apart by their 64-bit hashes alone, which saves memory. A collision
    would hide a state; with a million states it has a chance of about one in 30 million.
    """
    start = model.start()
    came_from: dict[int, tuple[int | None, str]] = {hash(start): (None, "")}
    queue: deque[Any] = deque([start])
    while queue:
        state = queue.popleft()
        here = hash(state)
        try:
            for name, following in model.steps(state):
                key = hash(following)
                if following is None or key in came_from:
                    continue
                came_from[key] = (here, name)
                if broken := model.broken(following):
                    raise Broken(f"{name}\n=> {broken}")
                queue.append(following)
        except Broken as broken_by:
            return Explored(len(came_from), (*_way(came_from, here), *str(broken_by).split("\n")))
    return Explored(len(came_from), ())


def _way(came_from: dict[int, tuple[int | None, str]], last: int) -> list[str]:
    """The names of the steps that lead to a state."""
    names: list[str] = []
    at: int | None = last
    while at is not None:
        at, name = came_from[at]
        names.append(name)
    return names[-2::-1]


def replaced(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    """The tuple with another item at an index."""
    return (*items[:index], item, *items[index + 1 :])


def added(items: tuple[Item, ...], item: Item) -> tuple[Item, ...]:
    """The tuple, which is in order, with one more item."""
    return tuple(sorted((*items, item), key=_text))


#: Orders items of different types. There are few different ones, so that each is kept.
_text = cache(repr)
