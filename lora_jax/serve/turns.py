"""Order in which waiting jobs get rows: adapters take turns.

A turn is up to `most` jobs of one adapter, so that a batch with one slot is full. The next turn is
that of the job that has waited longest. So every job runs after finitely many others, however many
come for another adapter.
"""

import itertools
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Turns(Generic[Job]):
    """Waiting jobs by adapter.

    Example:
        >>> turns = Turns(2)
        >>> for job in ("a1", "a2", "a3", "b1"):
        ...     turns.add(job[0], job)
        >>> [turns.take() for _ in range(4)]
        ['a1', 'a2', 'a3', 'b1']
        >>> for job in ("a1", "b1", "a2", "a3"):
        ...     turns.add(job[0], job)
        >>> [turns.take() for _ in range(4)]
        ['a1', 'a2', 'b1', 'a3']
    """

    def __init__(self, most: int):
        self._most, self._left = most, 0
        self._numbers = itertools.count()
        self._lines: dict[Hashable, deque[tuple[int, Job]]] = {}
        self._key: Hashable = None

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, key: Hashable, job: Job) -> None:
        """Append a job of the adapter `key`."""
        self._lines.setdefault(key, deque()).append((next(self._numbers), job))

    def take(self) -> Job:
        """Remove and return the job that is next; there must be one."""
        if not self._left or self._key not in self._lines:
            self._key = min(self._lines, key=lambda key: self._lines[key][0][0])
            self._left = self._most
        self._left -= 1
        _, job = self._lines[self._key].popleft()
        self._drop_if_empty(self._key)
        return job

    def remove(self, key: Hashable, job: Job) -> bool:
        """Remove a job; return False if it does not wait."""
        line = self._lines.get(key, deque())
        kept = deque(entry for entry in line if entry[1] is not job)
        if len(kept) == len(line):
            return False
        self._lines[key] = kept
        self._drop_if_empty(key)
        return True

    def jobs(self) -> list[Job]:
        """Return the waiting jobs; any thread may call it."""
        return [job for line in [*self._lines.values()] for _, job in line.copy()]

    def _drop_if_empty(self, key: Hashable) -> None:
        if not self._lines[key]:
            del self._lines[key]
            if key == self._key:
                self._left = 0
