"""Reward shaping: what is added to a reward before advantages are taken.

Invariant: shaping changes numbers of valid trajectories only; it never gives a reward to a failed one.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from agentgym.config import Config
from agentgym.errors import ConfigError


class OverlongSection(Config):
    """DAPO's soft overlong punishment, on a trajectory's sampled tokens."""

    max_length: int = Field(ge=1)
    cache: int = Field(ge=1)

    @model_validator(mode="after")
    def _ramp(self) -> Self:
        soft_overlong_penalty(torch.zeros(0), max_length=self.max_length, cache=self.cache)
        return self


def soft_overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13).

    Args:
        lengths: ``[N]``; sampled tokens of each response.
        max_length: The longest response that is allowed, in tokens (20480 in the paper).
        cache: Length of the ramp before it, in tokens (4096 in the paper).

    Returns:
        ``[N]``, to be added to the reward: 0 up to ``max_length - cache``, falling to -1 at ``max_length``,
        -1 beyond.

    Raises:
        ConfigError: Not ``0 < cache <= max_length``.
    """
    if not 0 < cache <= max_length:
        raise ConfigError(
            f"the overlong cache must lie in (0, max_length], got cache {cache}, max_length {max_length}",
            hint="the paper takes max_length 20480 and cache 4096",
        )
    dtype = torch.promote_types(lengths.dtype, torch.get_default_dtype())
    return ((max_length - cache - lengths.to(dtype)) / cache).clamp(-1.0, 0.0)


def kl_penalised(token_rewards: Tensor, divergence: Tensor, mask: Tensor, coef: float) -> Tensor:
    """KL in the reward: ``r_j - coef * k_j`` on sampled tokens.

    Args:
        token_rewards: ``[B, T]``.
        divergence: ``[B, T]``; from `agentgym.trainers.kl.kl_estimate`, usually k1.
        mask: ``[B, T]`` bool; true on sampled tokens.
        coef: beta.

    Returns:
        ``[B, T]``, detached; ``token_rewards`` where nothing was sampled.
    """
    return token_rewards - coef * torch.where(mask, divergence.detach(), 0.0)
