"""LOOP: proximal policy optimisation with a leave-one-out baseline (Chen et al. 2025, arXiv 2502.01600).

Invariant: it needs no critic, no reference and no standard deviation; what is new beside RLOO is the clipped
loss over several epochs, so its advantage is RLOO's under its own name. Its ratio granularities (``token``,
``turn``, ``trajectory``) and its bound ``1 / (1 + eps)`` are numbers of `agentgym.trainers.policy_loss`.
"""

from __future__ import annotations

from torch import Tensor

from agentgym.trainers.advantages import rloo


def loop(rewards: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """``R_k`` less the mean reward of the other members: exactly `rloo`.

    Members that were cancelled or failed are in no mean. A group of one has nothing to compare with and gets
    0, where the authors' code refuses it. Their code also leaves out trajectories with ``|A|`` below 0.01;
    here a group of equal rewards has exactly 0, and ``filter_groups`` puts another in its place.

    Args:
        rewards: ``[N]``; one a trajectory.
        groups: ``[N]`` integer.
        valid: ``[N]`` bool; ``None``: all are valid.

    Returns:
        ``[N]``; they sum to 0 in every group.
    """
    return rloo(rewards, groups, valid)
