from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import UsageError
from agentgym.task import Task, TaskSet, of_list


def numbered(size: int, **kwargs: object) -> TaskSet:
    ids = [f"t{i}" for i in range(size)]
    return TaskSet("train", ids, lambda i: Task(i, "train", f"do {i}"), **kwargs)  # type: ignore[arg-type]


class Lazy:
    """A million ids that are never all built."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, position: int) -> str:
        if not 0 <= position < len(self):
            raise IndexError(position)
        return f"seed-{position}"


def test_a_set_is_a_sequence_of_tasks() -> None:
    tasks = numbered(5)
    assert len(tasks) == 5
    assert [t.id for t in tasks] == [tasks[i].id for i in range(5)] == ["t0", "t1", "t2", "t3", "t4"]
    assert tasks[-1].id == "t4"
    assert [t.id for t in tasks[1:3]] == ["t1", "t2"]
    assert "t3" in tasks
    assert tasks[3] in tasks
    assert "t9" not in tasks
    with pytest.raises(IndexError):
        tasks[5]


def test_a_slice_finds_only_its_own_tasks() -> None:
    part = numbered(5)[1:3]
    assert part.version == "1"
    assert part.get("t1") is not None
    assert part.get("t4") is None


def test_get_builds_a_known_task_only() -> None:
    tasks = numbered(3)
    assert tasks.get("t2") == Task("t2", "train", "do t2")
    assert tasks.get("T2") is None


def test_ids_may_be_computed_instead_of_listed() -> None:
    def index(task_id: str) -> int | None:
        number = task_id.removeprefix("seed-")
        return int(number) if number.isdecimal() and int(number) < 1_000_000 else None

    tasks = TaskSet("train", Lazy(), lambda i: Task(i, "train"), index=index)  # type: ignore[arg-type]
    assert tasks[999_999].id == "seed-999999"
    assert tasks.get("seed-123456") is not None
    assert tasks.get("seed-1000000") is None
    assert len(set(tasks.sample(1000, seed=1))) == 1000


@given(size=st.integers(1, 30), count=st.integers(0, 100), seed=st.integers(0, 2**32))
def test_a_sample_repeats_a_task_only_after_all_others(size: int, count: int, seed: int) -> None:
    tasks = numbered(size)
    drawn = tasks.sample(count, seed)
    assert len(drawn) == count
    assert len(set(drawn[:size])) == min(count, size)
    times = Counter(drawn)
    assert set(times.values()) <= {count // size, count // size + 1}
    assert drawn == tasks.sample(count, seed)
    assert drawn[: count // 2] == tasks.sample(count // 2, seed)


def test_a_sample_depends_on_its_seed() -> None:
    assert numbered(100).sample(10, 0) != numbered(100).sample(10, 1)


@pytest.mark.parametrize(("size", "count"), [(0, 1), (3, -1)])
def test_what_cannot_be_drawn(size: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"cannot draw {count} tasks from split 'train' of size {size}"):
        numbered(size).sample(count, 0)
    assert numbered(0).sample(0, 0) == []


def test_tasks_that_share_an_id_are_refused() -> None:
    with pytest.raises(UsageError, match="share an id"):
        of_list("test", [Task("a", "test"), Task("a", "test", "other")])
    assert [t.id for t in of_list("test", [Task("b", "test"), Task("a", "test")])] == ["b", "a"]


def test_what_is_private_is_not_shown() -> None:
    task = Task("a", "test", "Find it.", private={"answer": "forty-two"})
    assert "forty-two" not in repr(task)
    assert "forty-two" not in repr(of_list("test", [task])[0])
    with pytest.raises(TypeError):
        Task("a", "test").private["answer"] = "x"  # type: ignore[index]
