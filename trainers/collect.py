"""Collections: which tasks a step samples, and what came of them as tensors.

Invariant: the tasks of a step depend on the seed and the position alone; an episode that infrastructure
failed is in no statistic and in no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from agentgym.errors import EnvironmentFailed, UsageError
from agentgym.rollout.engine import Episode, RolloutEngine
from agentgym.seeding import derive
from agentgym.task import TaskSet
from agentgym.trainers.batch import Batch, Row, collate, rows
from agentgym.trajectory import Trajectory


class TaskOrder:
    """An endless order of a split's tasks: seeded permutations, one after the other.

    Args:
        tasks: The split.
        seed: The run's seed.
        first: Use the first so many tasks of the split; ``None``: all.

    Raises:
        UsageError: There is no task.
    """

    def __init__(self, tasks: TaskSet, seed: int, first: int | None = None) -> None:
        self.tasks = tasks if first is None else tasks[: min(first, len(tasks))]
        if not len(self.tasks):
            raise UsageError(f"split {tasks.split!r} has no tasks", hint="choose another split")
        self._seed = seed
        self._epoch = -1
        self._order: np.ndarray[tuple[int], np.dtype[np.int64]] = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> str:
        epoch, index = divmod(position, len(self.tasks))
        if epoch != self._epoch:
            self._order = np.random.default_rng(derive(self._seed, "tasks", epoch)).permutation(
                len(self.tasks)
            )
            self._epoch = epoch
        return self.tasks.ids[int(self._order[index])]


def plan(order: TaskOrder, step: int, position: int, groups: int, group_size: int) -> list[Episode]:
    """The episodes of ``groups`` groups from ``position`` on; members of a group share task and seed."""
    return [
        Episode(
            id=f"s{step:05d}-g{group:06d}-m{member:03d}",
            task_id=order[group],
            split=order.tasks.split,
            group=group,
            member=member,
        )
        for group in range(position, position + groups)
        for member in range(group_size)
    ]


async def collect(
    engine: RolloutEngine,
    episodes: Sequence[Episode],
    restored: Mapping[str, Trajectory],
    *,
    max_failure_rate: float,
) -> list[Trajectory]:
    """Run ``episodes``; turns that an interrupted run recorded are not sampled again.

    In deterministic mode a collection is taken up whole or not at all: only then are its batches the
    uninterrupted run's. Recorded failures stand, as the run went on without them, unless they are so many
    that they stopped it: then they are tried again.

    Raises:
        EnvironmentFailed: More than ``max_failure_rate`` of them failed by infrastructure.
    """
    recorded = {e.id: restored[e.id] for e in episodes if e.id in restored}
    lost = {id for id, t in recorded.items() if t.outcome is not None and not t.valid}
    if len(lost) <= max_failure_rate * len(episodes):
        lost = set()
    mine = {id: t for id, t in recorded.items() if id not in lost}
    if engine.config.deterministic and not (
        len(mine) == len(episodes) and all(t.outcome is not None for t in mine.values())
    ):
        mine, lost = {}, set(recorded)
    episodes = [replace(e, attempt=recorded[e.id].attempt + 1) if e.id in lost else e for e in episodes]
    trajectories = await engine.collect(episodes, restored=mine)
    failed = [t for t in trajectories if not t.valid]
    if len(failed) > max_failure_rate * len(trajectories):
        raise EnvironmentFailed(
            f"{len(failed)} of {len(trajectories)} episodes failed by infrastructure; "
            f"the last one: {failed[-1].outcome}: {failed[-1].outcome.detail if failed[-1].outcome else ''}",
            hint="mend the cause and resume the run, or raise max_failure_rate",
        )
    return trajectories


@dataclass(frozen=True, slots=True)
class Units:
    """The turns of all trajectories as flat vectors, by trajectory and then in order of time.

    Attributes:
        trajectory: ``[U]`` integer; index of each turn's trajectory.
        turn: ``[U]`` integer; its index there.
        rewards: ``[U]`` float; of the turn, 0 where the trajectory is not valid.
        index: ``[B, T-1]`` integer; the unit of each sampled token, -1 elsewhere: for `credit.broadcast`.
    """

    trajectory: Tensor
    turn: Tensor
    rewards: Tensor
    index: Tensor

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], whole: Batch) -> Units:
        """The units of ``trajectories``, whose rows are ``whole``."""
        counts = torch.tensor([len(t.turns) for t in trajectories], dtype=torch.long)
        first = counts.cumsum(0) - counts
        turn = torch.cat([torch.arange(int(n)) for n in counts]) if len(counts) else counts
        rewards = [turn.reward if t.valid else 0.0 for t in trajectories for turn in t.turns]
        index = torch.where(whole.loss_mask, first[whole.trajectory][:, None] + whole.turn, -1)
        return cls(
            torch.repeat_interleave(torch.arange(len(trajectories)), counts),
            turn,
            torch.tensor(rewards, dtype=torch.float32),
            index,
        )


@dataclass(frozen=True, slots=True)
class Collection:
    """The trajectories of a step and their tensors, in full width and before any micro-batch.

    Attributes:
        trajectories: ``N`` of them.
        rows: Rows of the valid ones.
        whole: All rows as one batch, ``[B, T]``; ``None`` without rows.
        groups: ``[N]`` integer.
        valid: ``[N]`` bool.
        rewards: ``[N]`` float; 0 where not valid, and never read there.
    """

    trajectories: Sequence[Trajectory]
    rows: list[Row]
    whole: Batch | None
    groups: Tensor
    valid: Tensor
    rewards: Tensor

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Collection:
        """Tensors of ``trajectories``."""
        made = rows(trajectories)
        return cls(
            trajectories,
            made,
            collate(made) if made else None,
            torch.tensor([t.group for t in trajectories], dtype=torch.long),
            torch.tensor([t.valid for t in trajectories], dtype=torch.bool),
            torch.tensor([t.reward if t.valid else 0.0 for t in trajectories], dtype=torch.float32),
        )

    @property
    def units(self) -> Units:
        """Turns as units of reward and credit.

        Raises:
            UsageError: There is no row.
        """
        if self.whole is None:
            raise UsageError(
                "a collection without rows has no units", hint="ask for them after checking whole"
            )
        return Units.of(self.trajectories, self.whole)

    @property
    def sampled(self) -> Tensor:
        """``[N]`` sampled tokens of each trajectory."""
        return torch.tensor([t.sampled_tokens for t in self.trajectories], dtype=torch.long)


def environment_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What the environments and the engine say of a step; means are over valid trajectories."""
    good = [t for t in trajectories if t.valid]
    turns = [turn for t in good for turn in t.turns]
    outcomes: dict[str, float] = {}
    for trajectory in trajectories:
        name = f"outcome/{trajectory.outcome}"
        outcomes[name] = outcomes.get(name, 0.0) + 1.0
    count, of_turns = max(len(good), 1), max(len(turns), 1)
    return {
        "success": sum(t.success for t in good) / count,
        "episodes": float(len(trajectories)),
        "infra_failed": float(len(trajectories) - len(good)),
        "turns/mean": len(turns) / count,
        "valid_action_ratio": sum(turn.valid_action for turn in turns) / of_turns,
        "response_len/mean": sum(t.sampled_tokens for t in good) / of_turns,
        "response_len/clip_ratio": sum(turn.finish_reason == "length" for turn in turns) / of_turns,
        "time/generate": sum(turn.seconds.get("generate", 0.0) for turn in turns),
        "time/env": sum(turn.seconds.get("step", 0.0) for turn in turns),
        **outcomes,
    }
