"""The critic's loss, clipped around the old values as PPO does.

Invariant: as in `agentgym.trainers.policy_loss`, positions outside the mask are never read, and the loss is a
share of the whole optimiser step's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentgym.trainers.aggregation import AggregationMode, Denominators, aggregate


def value_loss(
    values: Tensor,
    values_old: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    denominators: Denominators,
    clip: float | None = 0.5,
    aggregation: AggregationMode = "token-mean",
) -> Tensor:
    """``0.5 * agg(max((V - Ret)^2, (clip(V, V_old -/+ eps) - Ret)^2))``.

    Args:
        values: ``[B, T]``; the critic's values, with gradient.
        values_old: ``[B, T]``; the values at collection.
        returns: ``[B, T]``; targets.
        mask: ``[B, T]`` bool; true on sampled tokens.
        denominators: Of the whole optimiser step.
        clip: eps, in units of the return; ``None`` for a plain squared error.
        aggregation: How token losses become one number.

    Returns:
        A scalar.
    """
    values = torch.where(mask, values, 0.0)
    values_old = torch.where(mask, values_old, 0.0).detach()
    returns = torch.where(mask, returns, 0.0).detach()
    losses = (values - returns) ** 2
    if clip is not None:
        near = torch.clamp(values, values_old - clip, values_old + clip)
        losses = torch.maximum(losses, (near - returns) ** 2)
    return 0.5 * aggregate(losses, mask, aggregation, denominators)
