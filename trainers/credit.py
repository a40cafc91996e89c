"""Credit: how one number a trajectory or a turn reaches its sampled tokens, and how tokens line up in time.

Invariant: only sampled tokens carry credit. Whatever reaches tokens addresses them through an *index*, a
``[B, T]`` tensor that names the unit (trajectory or turn) each sampled token belongs to and is -1 elsewhere,
so whatever stands in the other positions (observations, padding, NaN) is never read.

Rows are segments. A trajectory may spread over several rows (one a turn, in a windowed layout); its rows
stand in temporal order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def token_index(owner: Tensor, mask: Tensor) -> Tensor:
    """The index that gives every sampled token of a row to the row's owner.

    Args:
        owner: ``[B]`` integer; the trajectory of each row.
        mask: ``[B, T]`` bool; true on sampled tokens.

    Returns:
        ``[B, T]`` integer; -1 where no token was sampled.
    """
    return torch.where(mask, owner[:, None], -1)


def broadcast(values: Tensor, index: Tensor) -> Tensor:
    """Give every sampled token its unit's value.

    Args:
        values: ``[K]``; one value a trajectory or a turn.
        index: ``[B, T]`` integer; the unit of each token, -1 for none.

    Returns:
        ``[B, T]``; 0 where the index is -1.
    """
    return torch.where(index >= 0, values[index.clamp(min=0)], 0.0)


def at_last_token(values: Tensor, index: Tensor) -> Tensor:
    """Put every unit's value on its last sampled token: terminal rewards by trajectory, step rewards by turn.

    Args:
        values: ``[K]``; one value a trajectory or a turn.
        index: ``[B, T]`` integer; the unit of each token, -1 for none.

    Returns:
        ``[B, T]``; 0 everywhere else. The value of a unit without a token is lost.
    """
    flat = index.flatten()
    places = torch.arange(len(flat), device=index.device)
    owned = flat >= 0
    last = torch.full((len(values),), -1, dtype=torch.long, device=index.device)
    last.scatter_reduce_(0, flat[owned], places[owned], "amax")
    placed = torch.zeros(len(flat), dtype=values.dtype, device=values.device)
    placed[last[last >= 0]] = values[last >= 0]
    return placed.view(index.shape)


def at_first_token(tokens: Tensor, mask: Tensor, trajectory: Tensor, count: int) -> Tensor:
    """What every trajectory's first sampled token has.

    Args:
        tokens: ``[B, T]``.
        mask: ``[B, T]`` bool; true on sampled tokens.
        trajectory: ``[B]`` integer; the trajectory of each row.
        count: N, how many trajectories there are.

    Returns:
        ``[N]``; 0 without a token.
    """
    first = mask.float().argmax(1)
    own = tokens.new_zeros(count)
    # The last of equal places is written: in reverse order, the first row of a trajectory.
    own[trajectory.flip(0)] = tokens.gather(1, first[:, None])[:, 0].flip(0)
    return own


def accumulate(rewards: Tensor, turn_trajectory: Tensor, gamma: float) -> Tensor:
    """Discounted sums from each turn to the end of its trajectory, ``sum_{k >= t} gamma^(k-t) r_k``.

    Args:
        rewards: ``[U]``; one a turn.
        turn_trajectory: ``[U]`` integer; the turns of a trajectory stand in temporal order.
        gamma: Discount from one turn to the next.

    Returns:
        ``[U]`` float64.
    """
    sums, owners = rewards.double().tolist(), turn_trajectory.tolist()
    following: dict[int, float] = {}
    for u in reversed(range(len(sums))):
        sums[u] += gamma * following.get(owners[u], 0.0)
        following[owners[u]] = sums[u]
    return torch.tensor(sums, dtype=torch.float64, device=rewards.device)


class SampledTokens(NamedTuple):
    """Where each trajectory's sampled tokens stand, in the order of time.

    ``gather`` lines them up as ``[S, L]`` (S trajectories, L the most tokens of one) with nothing in between:
    observation tokens vanish, and a trajectory of several rows becomes one sequence. ``scatter`` goes back.

    Attributes:
        row: ``[K]``; row of each sampled token.
        position: ``[K]``; its position in the row.
        sequence: ``[K]``; its trajectory, counted from 0 by ascending id.
        step: ``[K]``; its place among the trajectory's sampled tokens.
        shape: ``(B, T)`` of the rows.
    """

    row: Tensor
    position: Tensor
    sequence: Tensor
    step: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor, trajectory: Tensor | None = None) -> SampledTokens:
        """Locate the sampled tokens.

        Args:
            mask: ``[B, T]`` bool; true on sampled tokens.
            trajectory: ``[B]`` integer; the trajectory of each row. ``None``: a row is a trajectory.
        """
        row, position = mask.nonzero(as_tuple=True)
        owner = row if trajectory is None else trajectory[row]
        order = torch.argsort(owner, stable=True)
        row, position = row[order], position[order]
        _, sequence, counts = torch.unique_consecutive(owner[order], return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        step = torch.arange(len(row), device=mask.device) - first[sequence]
        return cls(row, position, sequence, step, (mask.shape[0], mask.shape[1]))

    def gather(self, rows: Tensor) -> Tensor:
        """``[B, T]`` to ``[S, L]``; 0 behind a trajectory's last token."""
        sequences, steps = (int(x.max()) + 1 if len(x) else 0 for x in (self.sequence, self.step))
        line = rows.new_zeros(sequences, steps)
        line[self.sequence, self.step] = rows[self.row, self.position]
        return line

    def scatter(self, line: Tensor) -> Tensor:
        """``[S, L]`` to ``[B, T]``; 0 where no token was sampled."""
        rows = line.new_zeros(self.shape)
        rows[self.row, self.position] = line[self.sequence, self.step]
        return rows
