"""Explore a small model: visit all its states, breadth first."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

Item = TypeVar("Item")


class Model(Protocol):
    """A model that :func:`explore` can explore. The states of a model are hashable values."""

    def start(self) -> Hashable:
        """Return the first state of the model."""

    def steps(self, state: Any) -> Iterable[tuple[str, Any]]:
        """Return all steps that can come next: the name of each step, and the state after it.

        The state ``None`` stands for a step that the model's bounds rule out.

        :raises Broken: a step breaks an invariant.
        """

    def broken(self, state: Any) -> str | None:
        """Return which invariant a state breaks, and how; ``None`` if it breaks none."""


class Broken(Exception):
    """The error of a step that breaks an invariant; its message says which invariant, and how."""


class Explored(NamedTuple):
    """The result of an exploration.

    :param states: the number of different states that were reached.
    :param fault: the steps of a shortest interleaving that breaks an invariant; the last line names
        the invariant. Empty if no reachable state breaks an invariant.
    """

    states: int
    fault: tuple[str, ...]

    def __str__(self) -> str:
        found = "\n".join(("an invariant is broken:", *self.fault)) if self.fault else "holds"
        return f"{self.states:,} states: {found}"


def explore(model: Model) -> Explored:
    """Visit all states that can be reached; stop at the first broken invariant.

    To save memory, only the 64-bit hash of each visited state is kept. Two states with the same
    hash would hide one of them; with a million states the chance of that is about one in 30
    million.
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
    """Return the names of the steps from the first state to a state."""
    names: list[str] = []
    at: int | None = last
    while at is not None:
        at, name = came_from[at]
        names.append(name)
    return names[-2::-1]


def replaced(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    """Return a copy of a tuple in which the item at an index is replaced."""
    return (*items[:index], item, *items[index + 1 :])


def added(items: tuple[Item, ...], item: Item) -> tuple[Item, ...]:
    """Return a sorted tuple with one more item, in its place."""
    return tuple(sorted((*items, item), key=_text))


#: The sort key of a tuple's items: their text, because items can have different types. It is
#: cached, because few items differ.
_text = cache(repr)
