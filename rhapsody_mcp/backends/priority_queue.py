"""A queue in which the higher priority comes first, and of equal priority what was added first."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar, overload

__all__ = ["PriorityQueue"]


class _HasPriority(Protocol):
    priority: int


_T = TypeVar("_T", bound=_HasPriority)


class PriorityQueue(Sequence[_T]):
    """Adding and removing take the same time however long it is; they look at each priority that occurs, mostly one.

    An item's `priority` must not change while it is in the queue, except by `move`.
    """

    def __init__(self) -> None:
        self.size = 0
        """The number of items, for those who cannot afford a call of `len`."""
        self._by_priority: dict[int, deque[_T]] = {}
        self._levels: list[tuple[int, deque[_T]]] = []
        """Minus the priority, and its items, the highest priority first; a level without items is dropped later."""

    def append(self, item: _T) -> None:
        self.size += 1
        level = self._by_priority.get(item.priority)
        (self._add_level(item.priority) if level is None else level).append(item)

    def appendleft(self, item: _T) -> None:
        """Add an item before all others of its priority."""
        self.size += 1
        level = self._by_priority.get(item.priority)
        (self._add_level(item.priority) if level is None else level).appendleft(item)

    def _add_level(self, priority: int) -> deque[_T]:
        level = self._by_priority[priority] = deque()
        insort(self._levels, (-priority, level), key=lambda entry: entry[0])
        return level

    def first(self) -> _T:
        """The first item, as `[0]` in less time."""
        level = self._levels[0][1]
        return level[0] if level else self[0]

    def popleft(self) -> _T:
        """Remove the first item. Raises IndexError for an empty queue."""
        while True:
            minus_priority, level = self._levels[0]
            if level:
                self.size -= 1
                return level.popleft()
            del self._levels[0], self._by_priority[-minus_priority]

    def remove(self, item: _T) -> None:
        """Remove an item; quick for one of the first of its priority. Raises ValueError where it is not there."""
        self._by_priority.get(item.priority, deque[_T]()).remove(item)
        self.size -= 1

    def take(self, is_wanted: Callable[[_T], bool]) -> list[_T]:
        """Remove the items of which `is_wanted` is true, and return them in order."""
        taken = [item for item in self if is_wanted(item)]
        if taken:
            self.size -= len(taken)
            for _, level in self._levels:
                kept = [item for item in level if not is_wanted(item)]
                level.clear()
                level.extend(kept)
        return taken

    def move(self, is_wanted: Callable[[_T], bool], priority_of: Callable[[_T], int]) -> None:
        """Give items another priority; each comes after the items that have this priority."""
        for item in self.take(is_wanted):
            item.priority = priority_of(item)
            self.append(item)

    def extend(self, items: Iterable[_T]) -> None:
        for item in items:
            self.append(item)

    def clear(self) -> None:
        self._levels.clear()
        self._by_priority.clear()
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return self.size > 0

    def __iter__(self) -> Iterator[_T]:
        for _, level in self._levels:
            yield from level

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        if isinstance(index, slice):
            return list(self)[index]
        for _, level in self._levels:
            if index < len(level):
                return level[index]
            index -= len(level)
        raise IndexError("the queue is not that long")
