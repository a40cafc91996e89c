"""From trajectories to tensors.

Invariant: a row is one segment of one valid trajectory, token for token as the model saw it; nothing is
decoded, re-encoded or cut. How rows are split into micro-batches changes no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agentgym.conversation import Conversation, Layout, Renderer
from agentgym.messages import Role
from agentgym.policies.base import Completion
from agentgym.trainers.families import families
from agentgym.trajectory import Segment, Trajectory

COPIED = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One segment, ready to be packed.

    Attributes:
        segment: Token ids, loss mask and the engine's log-probs.
        trajectory: Index of its trajectory in the collection.
        index: Its own index in the collection.
        turns: ``(turn index, start, end)`` of the completions in the segment.
    """

    segment: Segment
    trajectory: int
    index: int
    turns: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.segment)

    @property
    def sampled(self) -> int:
        """Number of tokens in the loss."""
        return sum(self.segment.loss_mask)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, right-padded. Column ``j`` of the target-aligned tensors speaks of token ``j + 1``.

    Attributes:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 1 on real tokens.
        loss_mask: ``[B, T-1]`` bool, true where the target was sampled by the policy.
        logp_rollout: ``[B, T-1]`` the engine's log-probs, 0 elsewhere.
        turn: ``[B, T-1]`` index of the target's turn in its trajectory, -1 elsewhere.
        trajectory: ``[B]`` index of each row's trajectory in the collection.
        row: ``[B]`` index of each row in the collection.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    logp_rollout: Tensor
    turn: Tensor
    trajectory: Tensor
    row: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))

    @property
    def targets(self) -> Tensor:
        """``[B, T-1]`` the next token of each position."""
        return self.input_ids[:, 1:]


def rows(trajectories: Sequence[Trajectory]) -> list[Row]:
    """The rows of all valid trajectories; segments without sampled tokens give none."""
    made: list[Row] = []
    for index, trajectory in enumerate(trajectories):
        if not trajectory.valid:
            continue
        for position, segment in enumerate(trajectory.segments):
            spans = tuple((t.index, *t.span) for t in trajectory.turns if t.segment == position)
            if any(end > start for _, start, end in spans):
                made.append(Row(_without_unused(segment, spans), index, len(made), spans))
    return made


def collate(chosen: Sequence[Row]) -> Batch:
    """Right-padded tensors of ``chosen``."""
    width = max(len(row) for row in chosen)
    shape = (len(chosen), width)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    logp = torch.zeros(shape, dtype=torch.float32)
    turn = torch.full(shape, -1, dtype=torch.long)
    for i, row in enumerate(chosen):
        length = len(row)
        input_ids[i, :length] = torch.tensor(row.segment.token_ids)
        attention[i, :length] = 1
        mask[i, :length] = torch.tensor(row.segment.loss_mask)
        logp[i, :length] = torch.tensor(row.segment.logp_rollout)
        for index, start, end in row.turns:
            turn[i, start:end] = index
    return Batch(
        input_ids,
        attention,
        mask[:, 1:],
        logp[:, 1:],
        turn[:, 1:],
        torch.tensor([row.trajectory for row in chosen]),
        torch.tensor([row.index for row in chosen]),
    )


def micro_batches(chosen: Sequence[Row], token_budget: int, *, packed: bool = False) -> Iterator[list[Row]]:
    """``chosen`` in micro-batches of at most ``token_budget`` tokens, longest rows first.

    Equal rows (members of a group that begin alike) lie together and count once: see :func:`distinct`. A row
    longer than the budget has a micro-batch of its own.

    Args:
        chosen: The rows.
        token_budget: Tokens to read, padding included.
        packed: Nothing is padded, and rows that begin alike lie together, their common beginning counted
            once: see :mod:`agentgym.trainers.packing`. The keys of that beginning are copied for each row,
            so the rows of a micro-batch together are at most :data:`COPIED` times the budget.
    """
    homes = _homes(chosen) if packed else {}

    def order(row: Row) -> tuple[Any, ...]:
        tokens, mask = row.segment.token_ids, row.segment.loss_mask
        return *(homes[tuple(tokens)] if packed else ()), -len(row), tokens, mask, row.index

    current: list[Row] = []
    read = whole = 0
    before: tuple[Any, ...] = ()
    for row in sorted(chosen, key=order):
        place = order(row)
        if not current or place[:-1] != before[:-1]:
            shared = homes[tuple(row.segment.token_ids)][2] if packed and place[:3] == before[:3] else 0
            more = len(row) - shared if packed else len(current[0] if current else row)
            if current and (read + more > token_budget or whole + len(row) > COPIED * token_budget):
                yield current
                current, read, whole, more = [], 0, 0, len(row)
            read, whole = read + more, whole + len(row)
        current.append(row)
        before = place
    if current:
        yield current


def _homes(chosen: Sequence[Row]) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """By token ids: minus the length of the family's longest row, the family's number, what it shares."""
    ids = sorted({tuple(row.segment.token_ids) for row in chosen})
    return {
        ids[member]: (-max(len(ids[m]) for m in family.members), number, family.shared)
        for number, family in enumerate(families(ids))
        for member in family.members
    }


def distinct(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which rows of a micro-batch a model has to read.

    Returns:
        ``[U]`` indices of rows that differ in tokens or loss mask, and ``[B]`` the place in them of each row.
    """
    content = torch.cat((batch.input_ids, batch.attention_mask, batch.loss_mask), 1)
    _, place = torch.unique(content, dim=0, return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(place), device=place.device)
    index = torch.arange(len(place), device=place.device)
    return first.scatter_reduce(0, place, index, "amin"), place


def tokenize(
    trajectory: Trajectory,
    renderer: Renderer,
    *,
    system: str = "",
    layout: Layout = "chat",
    role: Role = "user",
) -> Trajectory:
    """Token segments for a trajectory whose policy spoke text (an expert's, a person's).

    The completions are encoded once, followed by the end of turn; nothing here was ever sampled as tokens.
    The prompts describe the tools that the environment offered. ``system``, ``layout`` and ``role`` are the
    engine's, so that prompts are those that a rollout reads.

    Returns:
        A new trajectory with the same turns, their spans filled in; log-probs are 0.
    """
    if trajectory.tools:
        renderer = renderer.with_tools(trajectory.tools)
    conversation = Conversation(renderer, system=system, instruction=trajectory.instruction, layout=layout)
    turns = []
    for turn in trajectory.turns:
        conversation.read(turn.observation, role=turn.role or role)
        ids = tuple(renderer.encode(turn.completion + renderer.end_of_turn))
        segment, span = conversation.complete(Completion(turn.completion, ids, (0.0,) * len(ids)))
        turns.append(replace(turn, segment=segment, span=span))
    return replace(trajectory, segments=conversation.segments, turns=turns)


def _without_unused(segment: Segment, spans: Sequence[tuple[int, int, int]]) -> Segment:
    """The segment up to its last finished turn: what was sampled for a turn that never ended is left out."""
    end = max(end for _, _, end in spans)
    if end == len(segment):
        return segment
    return Segment(
        segment.token_ids[:end], segment.loss_mask[:end], segment.logp_rollout[:end], segment.parent
    )
