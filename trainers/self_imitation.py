"""SPEAR's two buffers: what groups earned of late, and rows that did better than their group.

Invariant: a stored row is a copy that no later step touches; it is replayed at most once, with the log-probs
of the policy that sampled it. A reward is kept as two parts, outcome and bonus, and every comparison puts
them together with the same, present weight of the bonus: ``R = outcome + mu bonus``.

Source: Qin et al. 2025, SPEAR (arXiv 2509.22601): the recalibrated advantage ``A~ = R - P50(D_R)`` and the
double gate ``A > 0 and A~ > 0``.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agentgym.seeding import derive
from agentgym.trainers.advantages import group_statistics
from agentgym.trainers.batch import Row
from agentgym.trajectory import Segment


class Earned(NamedTuple):
    """What a group earned.

    Attributes:
        outcome: Mean over its valid members.
        bonus: Mean over its valid members.
        std: Unbiased standard deviation of their rewards; 0 for one member.
    """

    outcome: float
    bonus: float
    std: float


class BaselineFIFO:
    """The last groups' earnings, step by step, and their median.

    Args:
        capacity: Groups. It is looked at before a step is appended, and steps leave whole, so one step more
            may be held.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.steps: deque[list[Earned]] = deque()

    def __len__(self) -> int:
        return sum(map(len, self.steps))

    def push(self, groups: Sequence[Earned]) -> None:
        """Append a step's groups; oldest steps leave first."""
        while len(self) > self.capacity:
            self.steps.popleft()
        if groups:
            self.steps.append(list(groups))

    def median(self, mu: float = 0.0) -> float | None:
        """P50 of the groups' mean rewards at the bonus weight ``mu``, interpolated; ``None`` when empty."""
        means = [group.outcome + mu * group.bonus for step in self.steps for group in step]
        return statistics.median(means) if means else None

    def median_std(self) -> float | None:
        """P50 of the groups' standard deviations; ``None`` when empty."""
        spreads = [group.std for step in self.steps for group in step]
        return statistics.median(spreads) if spreads else None


def earnings(
    rewards: Tensor, outcomes: Tensor, bonuses: Tensor, groups: Tensor, valid: Tensor
) -> list[Earned]:
    """What each group with a valid member earned, by group id.

    Args:
        rewards: ``[N]``; outcome and bonus together, as advantages were taken of them.
        outcomes: ``[N]``.
        bonuses: ``[N]``.
        groups: ``[N]`` integer.
        valid: ``[N]`` bool.
    """
    whole = group_statistics(rewards, groups, valid)
    outcome = group_statistics(outcomes, groups, valid).mean.tolist()
    bonus = group_statistics(bonuses, groups, valid).mean.tolist()
    std = whole.std.tolist()
    first: dict[int, int] = {}
    for i in valid.nonzero()[:, 0].tolist():
        first.setdefault(int(groups[i]), i)
    return [Earned(outcome[i], bonus[i], std[i]) for _, i in sorted(first.items())]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row worth imitating, and what was known of it when it was sampled.

    Attributes:
        id: Of the trajectory, and the row's first turn in it: unique in a run.
        step: That sampled it.
        token_ids: The row's.
        positions: Of the tokens to imitate: sampled, with an advantage above 0.
        logp: The trainer's log-probs at ``positions``, before the update of ``step``.
        logp_rollout: The engine's.
        advantages: Those of ``step``, at ``positions``; all above 0.
        turns: ``(turn index, start, end)`` of the row's completions.
        outcome: The trajectory's reward without the bonus.
        bonus: Its bonus, unweighted.
        success: The environment's verdict.
    """

    id: str
    step: int
    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    logp: tuple[float, ...]
    logp_rollout: tuple[float, ...]
    advantages: tuple[float, ...]
    turns: tuple[tuple[int, int, int], ...]
    outcome: float
    bonus: float
    success: bool

    @classmethod
    def of(
        cls,
        row: Row,
        advantages: Tensor,
        logp: Tensor,
        *,
        trajectory_id: str,
        step: int,
        outcome: float,
        bonus: float,
        success: bool,
    ) -> Sample:
        """A copy of ``row``, which has a token with an advantage above 0.

        Args:
            row: What to copy.
            advantages: ``[T-1]`` of its targets.
            logp: ``[T-1]`` of its targets.
            trajectory_id: Of its trajectory.
            step: That sampled it.
            outcome: The trajectory's.
            bonus: The trajectory's.
            success: The trajectory's.
        """
        positions = tuple(better(row, advantages))
        gains, scores = advantages.tolist(), logp.tolist()
        return cls(
            id=f"{trajectory_id}/{row.turns[0][0]}",
            step=step,
            token_ids=tuple(row.segment.token_ids),
            positions=positions,
            logp=tuple(scores[p - 1] for p in positions),
            logp_rollout=tuple(row.segment.logp_rollout[p] for p in positions),
            advantages=tuple(gains[p - 1] for p in positions),
            turns=row.turns,
            outcome=outcome,
            bonus=bonus,
            success=success,
        )

    def reward(self, mu: float) -> float:
        """At the bonus weight ``mu``."""
        return self.outcome + mu * self.bonus

    def row(self, index: int) -> Row:
        """As row ``index`` of a replay, in a trajectory of its own; only ``positions`` are in the loss."""
        mask, engine = [False] * len(self.token_ids), [0.0] * len(self.token_ids)
        for position, logp in zip(self.positions, self.logp_rollout, strict=True):
            mask[position], engine[position] = True, logp
        return Row(Segment(list(self.token_ids), mask, engine), index, index, self.turns)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Sample:
        """Inverse of :meth:`state`."""
        lists = {name: tuple(value) for name, value in state.items() if isinstance(value, list | tuple)}
        return cls(**{**state, **lists, "turns": tuple((t[0], t[1], t[2]) for t in state["turns"])})


def better(row: Row, advantages: Tensor) -> list[int]:
    """Positions of a row's sampled tokens whose advantage is above 0; ``advantages`` is ``[T-1]``.

    The sign is a token's own, never that of a mean over the row: a mean over padding or over mixed signs
    would let losing tokens in.
    """
    good = (advantages[: len(row) - 1] > 0).tolist()
    return [p for p, sampled in enumerate(row.segment.loss_mask) if sampled and good[p - 1]]


class Selection(NamedTuple):
    """What a replay draws.

    Attributes:
        samples: By id.
        advantages: A~ of each; all above 0.
        eligible: How many passed the gate, drawn or not.
        dropped: How many did not.
    """

    samples: list[Sample]
    advantages: list[float]
    eligible: int
    dropped: int


class SampleBuffer:
    """Rows to imitate, until a replay takes them out.

    Args:
        capacity: Rows of one replay. The buffer itself may hold more: what is drawn is bounded.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self.samples)

    def above(self, baseline: float, mu: float) -> int:
        """Rows whose reward at the bonus weight ``mu`` is above ``baseline``."""
        return sum(sample.reward(mu) > baseline for sample in self.samples)

    def insert(self, samples: Iterable[Sample]) -> None:
        """Add ``samples``."""
        self.samples += samples

    def evict(self, tolerate_steps: int) -> None:
        """Drop what is older than the newest stored row by more than ``tolerate_steps``."""
        newest = max((sample.step for sample in self.samples), default=0)
        self.samples = [s for s in self.samples if newest - s.step <= tolerate_steps]

    def take(
        self, baseline: float, mu: float, seed: int, *, std: float | None = None, power_of_two: bool = False
    ) -> Selection:
        """Draw up to ``capacity`` rows with ``A~ = R - baseline > 0``, uniformly; the buffer is empty then.

        A row's random number hangs on its id, so neither the order of the buffer nor who else computes
        decides what is drawn.

        Args:
            baseline: P50.
            mu: Present weight of the bonus.
            seed: Of this step.
            std: Divide A~ by it (plus 1e-6).
            power_of_two: Draw at most the largest power of two of the eligible rows.
        """
        gains = {sample.id: sample.reward(mu) - baseline for sample in self.samples}
        eligible = sorted((s for s in self.samples if gains[s.id] > 0), key=lambda s: s.id)
        dropped = len(self.samples) - len(eligible)
        self.samples = []
        wanted = min(len(eligible), self.capacity)
        if power_of_two and eligible:
            wanted = min(1 << (len(eligible).bit_length() - 1), self.capacity)
        chance = {s.id: float(np.random.default_rng(derive(seed, s.id)).random()) for s in eligible}
        drawn = set(sorted(chance, key=lambda id: (chance[id], id))[:wanted])
        samples = [s for s in eligible if s.id in drawn]
        scale = 1.0 if std is None else 1.0 / (std + 1e-6)
        return Selection(samples, [gains[s.id] * scale for s in samples], len(eligible), dropped)


def replay_tensors(samples: Sequence[Sample], advantages: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A~ and the collection-time log-probs at the tokens to imitate, 0 elsewhere; ``[B, T-1]`` float64."""
    width = max(len(sample.token_ids) for sample in samples) - 1
    tokens, old = (torch.zeros(len(samples), width, dtype=torch.float64) for _ in range(2))
    for i, (sample, advantage) in enumerate(zip(samples, advantages, strict=True)):
        places = torch.tensor(sample.positions) - 1
        tokens[i, places] = advantage
        old[i, places] = torch.tensor(sample.logp, dtype=torch.float64)
    return tokens, old
