"""Tasks and splits.

Invariant: a split is finite, ordered and versioned; the same id is the same task for ever. What a task
keeps ``private`` (answers, hidden tests, the expert's plan) reaches scorers and trainers by task id and
nobody else: it is not in ``repr``, and ``info``, observations, servers and exports never hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, overload

import numpy as np

from agentgym.errors import UnknownName, UsageError


@dataclass(frozen=True)
class Task:
    """One task of a family.

    Attributes:
        id: Unique within the environment id, stable across releases.
        split: The split it belongs to.
        instruction: What the policy is asked to do. May be empty until the game is loaded.
        metadata: Public facts: difficulty, type, sizes.
        private: Answers, hidden tests, the expert's plan.
    """

    id: str
    split: str
    instruction: str = ""
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    private: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False)


class TaskSet(Sequence[Task]):
    """A split: an ordered set of tasks, built one at a time.

    Args:
        split: The split's name.
        ids: All ids, in order; a lazy sequence is welcome.
        build: Makes the task of an id.
        version: Changes whenever the set or its order changes.
        index: Position of an id, where that can be computed; otherwise a table is made on first use.
    """

    def __init__(
        self,
        split: str,
        ids: Sequence[str],
        build: Callable[[str], Task],
        *,
        version: str = "1",
        index: Callable[[str], int | None] | None = None,
    ) -> None:
        self.split, self.ids, self.version = split, ids, version
        self._build, self._index = build, index
        self._table: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, position: int) -> Task: ...
    @overload
    def __getitem__(self, position: slice) -> TaskSet: ...
    def __getitem__(self, position: int | slice) -> Task | TaskSet:
        if isinstance(position, slice):
            return TaskSet(self.split, self.ids[position], self._build, version=self.version)
        return self._build(self.ids[position])

    def __iter__(self) -> Iterator[Task]:
        return (self._build(i) for i in self.ids)

    def __contains__(self, task: object) -> bool:
        return self._position(task.id if isinstance(task, Task) else str(task)) is not None

    def get(self, task_id: str) -> Task | None:
        """The task of an id, or ``None``."""
        return None if self._position(task_id) is None else self._build(task_id)

    def sample(self, count: int, seed: int) -> list[str]:
        """``count`` task ids: a seeded sample without replacement; past the split's size it starts again.

        The first ``min(count, len)`` ids are distinct; repeats come in whole further permutations, so each
        task is drawn ``count // len`` or one more times.

        Raises:
            UsageError: The split is empty or ``count`` is negative.
        """
        if count < 0 or (count and not len(self)):
            raise UsageError(f"cannot draw {count} tasks from split {self.split!r} of size {len(self)}")
        drawn: list[str] = []
        epoch = 0
        while len(drawn) < count:
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            drawn += [self.ids[int(i)] for i in order[: count - len(drawn)]]
            epoch += 1
        return drawn

    def _position(self, task_id: str) -> int | None:
        if self._index is not None:
            return self._index(task_id)
        if self._table is None:
            self._table = {name: i for i, name in enumerate(self.ids)}
        return self._table.get(task_id)


def of_list(split: str, tasks: Sequence[Task], *, version: str = "1") -> TaskSet:
    """A :class:`TaskSet` over tasks that are already built.

    Raises:
        UsageError: Two tasks share an id.
    """
    table = {task.id: task for task in tasks}
    if len(table) != len(tasks):
        raise UsageError(f"split {split!r} has tasks that share an id")
    return TaskSet(split, [task.id for task in tasks], table.__getitem__, version=version)


def unknown_split(split: str, known: Sequence[str]) -> UnknownName:
    """The error for a split that does not exist."""
    return UnknownName("split", split, known)
