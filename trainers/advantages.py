"""Advantages: what a trajectory earned against its baseline.

Invariant: statistics are taken over trajectories, never over rows, and over valid ones alone. A trajectory
that a failure of infrastructure ended, a group with one valid member, and a group whose rewards are all equal
get an advantage of exactly 0, in floating point too: equality is tested on the rewards (largest = smallest),
not on a standard deviation, which rounding makes positive.

Everything here sees the whole batch at once, before it is cut into micro-batches. Group methods take one
reward a trajectory and return one advantage a trajectory (``credit.broadcast`` brings it to the tokens);
REINFORCE++ and GAE work on tokens. Standard deviations are unbiased (``ddof=1``) unless said. Sums run in
float64, results come back in the rewards' type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agentgym.errors import UsageError
from agentgym.trainers.credit import SampledTokens


class GroupStatistics(NamedTuple):
    """Statistics of each element's group over the group's valid members.

    Attributes:
        mean: ``[N]`` float64; of an all-equal group exactly that value.
        std: ``[N]`` float64; of an all-equal group exactly 0.
        size: ``[N]`` integer; number of valid members.
        equal: ``[N]`` bool; the valid members' values are all equal (a lone member's are).
    """

    mean: Tensor
    std: Tensor
    size: Tensor
    equal: Tensor


def group_statistics(
    values: Tensor, groups: Tensor, valid: Tensor | None = None, *, ddof: int = 1
) -> GroupStatistics:
    """Mean and standard deviation of every element's group.

    Args:
        values: ``[N]``; what stands at invalid members (NaN too) is not read.
        groups: ``[N]`` integer; equal ids form a group.
        valid: ``[N]`` bool; ``None`` for all.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.

    Raises:
        UsageError: Shapes differ, or a valid member's value is not finite.
    """
    valid = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    if not values.shape == groups.shape == valid.shape or values.dim() != 1:
        raise UsageError(
            f"values {tuple(values.shape)}, groups {tuple(groups.shape)} and valid {tuple(valid.shape)} "
            "must be vectors of one length",
            hint="pass one element a trajectory (not a row): [N]",
        )
    x = torch.where(valid, values.double(), 0.0)
    if not bool(x.isfinite().all()):
        raise UsageError(
            f"{int((~x.isfinite()).sum())} valid trajectories have a reward that is not finite",
            hint="a failed trajectory has no reward: mark it invalid; otherwise the environment is at fault",
        )
    slot = torch.unique(groups, return_inverse=True)[1]
    slots = int(slot.max()) + 1 if len(slot) else 0

    def per_group(element: Tensor) -> Tensor:
        return x.new_zeros(slots).index_add(0, slot, element)

    size = per_group(valid.double())
    mean = per_group(x) / size.clamp(min=1)
    variance = per_group(torch.where(valid, (x - mean[slot]) ** 2, 0.0)) / (size - ddof).clamp(min=1)
    inf = float("inf")
    high = x.new_full((slots,), -inf).scatter_reduce(0, slot, torch.where(valid, x, -inf), "amax")
    low = x.new_full((slots,), inf).scatter_reduce(0, slot, torch.where(valid, x, inf), "amin")
    equal = high <= low
    # The mean of equal numbers may round away from them; the number itself keeps differences exactly 0.
    mean = torch.where(equal & (size > 0), high, mean)
    std = torch.where(equal, 0.0, variance.sqrt())
    return GroupStatistics(mean[slot], std[slot], size.long()[slot], equal[slot])


def _only_valid(advantages: Tensor, valid: Tensor | None, rewards: Tensor) -> Tensor:
    kept = advantages if valid is None else torch.where(valid, advantages, 0.0)
    return kept.to(rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype())


def grpo(rewards: Tensor, groups: Tensor, valid: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """GRPO: ``(R - mean_G) / (std_G + eps)`` (Shao et al. 2024, DeepSeekMath, 4.1.2).

    Args:
        rewards: ``[N]``; one a trajectory.
        groups: ``[N]`` integer; trajectories of one task form a group.
        valid: ``[N]`` bool; false for a trajectory that infrastructure failed. ``None``: all are valid.
        eps: Added to the standard deviation.

    Returns:
        ``[N]``; 0 for invalid members, groups of one and all-equal groups.
    """
    group = group_statistics(rewards, groups, valid)
    return _only_valid((rewards - group.mean) / (group.std + eps), valid, rewards)


def dr_grpo(rewards: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """Dr.GRPO: ``R - mean_G`` (Liu et al. 2025, Understanding R1-Zero-Like Training). As `grpo` otherwise.

    Its other half is the aggregation ``seq-mean-token-sum-norm``.
    """
    group = group_statistics(rewards, groups, valid)
    return _only_valid(rewards - group.mean, valid, rewards)


def rloo(rewards: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """RLOO: the reward less the mean of the *other* members (Ahmadian et al. 2024). As `grpo` otherwise.

    That is ``(R - mean_G) * G / (G - 1)``, with G the number of valid members.
    """
    group = group_statistics(rewards, groups, valid)
    leave_one_out = group.size / (group.size - 1).clamp(min=1)
    return _only_valid((rewards - group.mean) * leave_one_out, valid, rewards)


def whiten(values: Tensor, weights: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` with weighted mean and unbiased variance; 0 where the weight is 0.

    Args:
        values: Any shape; what stands at weight 0 (NaN too) is not read.
        weights: Same shape; how many tokens an element stands for (a mask, or counts).
        eps: Added to the variance.

    Returns:
        Same shape and type; exactly 0 everywhere when all values of positive weight are equal.
    """
    weights = weights.double()
    counted = weights > 0
    x = torch.where(counted, values.double(), 0.0)
    some = x[counted]
    if not len(some) or bool(some.max() == some.min()):
        return torch.zeros_like(values)
    total = weights.sum()
    mean = (weights * x).sum() / total
    variance = (weights * (x - mean) ** 2).sum() / (total - 1).clamp(min=1)
    return torch.where(counted, (x - mean) / (variance + eps).sqrt(), 0.0).to(values.dtype)


def reinforce_plus_plus_baseline(
    rewards: Tensor, groups: Tensor, tokens: Tensor, valid: Tensor | None = None
) -> Tensor:
    """REINFORCE++-baseline: ``R - mean_G``, whitened over the batch's tokens (Hu et al. 2025, REINFORCE++).

    The whitening counts a trajectory once a sampled token, so long answers weigh more; and an all-equal group
    gets 0 only where the whole batch's token mean is 0, as the batch mean is taken off it too.

    Args:
        rewards: ``[N]``; one a trajectory.
        groups: ``[N]`` integer.
        tokens: ``[N]``; sampled tokens of each trajectory.
        valid: ``[N]`` bool; ``None``: all are valid.

    Returns:
        ``[N]``; 0 for invalid members.
    """
    centred = dr_grpo(rewards, groups, valid)
    return whiten(centred, tokens if valid is None else torch.where(valid, tokens, 0))


def reinforce_plus_plus(
    token_rewards: Tensor, mask: Tensor, trajectory: Tensor | None = None, *, gamma: float = 1.0
) -> Tensor:
    """REINFORCE++: discounted token returns, whitened over the batch's tokens (Hu et al. 2025, REINFORCE++).

    Args:
        token_rewards: ``[B, T]``; usually a terminal reward less a KL penalty on every token.
        mask: ``[B, T]`` bool; true on sampled tokens of valid trajectories.
        trajectory: ``[B]`` integer; the trajectory of each row. ``None``: a row is a trajectory.
        gamma: Discount from one sampled token to the next.

    Returns:
        ``[B, T]``; 0 where nothing was sampled.
    """
    tokens = SampledTokens.of(mask, trajectory)
    returns = _discounted_sums(tokens.gather(token_rewards), gamma)
    return whiten(tokens.scatter(returns), mask)


class GAE(NamedTuple):
    """Advantages and returns, ``[B, T]`` each; 0 where nothing was sampled."""

    advantages: Tensor
    returns: Tensor


def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    trajectory: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> GAE:
    """Generalised advantage estimation over sampled tokens (Schulman et al. 2016, eq. 16).

    The next state of a token is the next *sampled* token of its trajectory, so observations in between change
    nothing; behind the last one value and advantage are 0. Returns are ``A + V``, formed before any
    `whiten` that PPO applies to the advantages.

    Args:
        token_rewards: ``[B, T]``.
        values: ``[B, T]``; the critic's values, without gradient.
        mask: ``[B, T]`` bool; true on sampled tokens of valid trajectories.
        trajectory: ``[B]`` integer; the trajectory of each row. ``None``: a row is a trajectory.
        gamma: Discount.
        lam: The lambda of the exponential average.
    """
    tokens = SampledTokens.of(mask, trajectory)
    reward, value = tokens.gather(token_rewards), tokens.gather(values)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    advantages = _discounted_sums(reward + gamma * following - value, gamma * lam)
    return GAE(tokens.scatter(advantages), tokens.scatter(advantages + value))


def _discounted_sums(x: Tensor, discount: float) -> Tensor:
    sums = torch.zeros_like(x)
    running = torch.zeros_like(x[:, 0]) if x.shape[1] else x
    for step in reversed(range(x.shape[1])):
        running = x[:, step] + discount * running
        sums[:, step] = running
    return sums


def informative(rewards: Tensor, groups: Tensor, valid: Tensor | None = None) -> Tensor:
    """DAPO's dynamic sampling: members of groups that teach something (Yu et al. 2025, 3.2).

    Args:
        rewards: ``[N]``.
        groups: ``[N]`` integer.
        valid: ``[N]`` bool; ``None``: all are valid.

    Returns:
        ``[N]`` bool; true for valid members of groups whose valid members' rewards are not all equal.
    """
    uneven = ~group_statistics(rewards, groups, valid).equal
    return uneven if valid is None else uneven & valid


def reward_metrics(rewards: Tensor, groups: Tensor, valid: Tensor | None = None) -> dict[str, float]:
    """What a trainer logs of a batch's rewards: the score's spread, and how many groups teach nothing.

    Args:
        rewards: ``[N]``.
        groups: ``[N]`` integer.
        valid: ``[N]`` bool; ``None``: all are valid.

    Returns:
        ``score/{mean,max,min,std}`` over valid trajectories; ``group_std_mean``, ``groups_all_equal_frac``
        and ``groups_all_zero_frac`` over groups with a valid member. Empty without a valid trajectory.
    """
    valid = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    stats = group_statistics(rewards, groups, valid)
    score = rewards[valid].double()
    if not len(score):
        return {}
    # One vote a group: the members of a group of n weigh 1/n each.
    vote = 1.0 / stats.size[valid]
    equal = stats.equal[valid]
    votes = vote.sum()
    return {
        "score/mean": score.mean().item(),
        "score/max": score.max().item(),
        "score/min": score.min().item(),
        "score/std": score.std().item() if len(score) > 1 else 0.0,
        "group_std_mean": ((vote * stats.std[valid]).sum() / votes).item(),
        "groups_all_equal_frac": ((vote * equal).sum() / votes).item(),
        "groups_all_zero_frac": ((vote * (equal & (score == 0))).sum() / votes).item(),
    }


def advantage_metrics(values: Tensor) -> dict[str, float]:
    """``adv/{mean,std,max,min}`` over tokens ``[K]``; empty without one."""
    if not values.numel():
        return {}
    return {
        "adv/mean": float(values.mean()),
        "adv/std": float(values.std()) if values.numel() > 1 else 0.0,
        "adv/max": float(values.max()),
        "adv/min": float(values.min()),
    }
