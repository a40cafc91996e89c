"""Covariance of advantage and log-prob: which tokens of an optimiser step lower the entropy most.

Invariant: the means are taken over all tokens of ONE optimiser step, never of a micro-batch; and what is
selected depends on the seed and on the tokens alone, not on the order of rows, their padding, or how they are
split over micro-batches and ranks: a token's random number is drawn from its row's id and its place among the
row's sampled tokens.

For a token j in the mask (Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning, eq. 9-12)::

    c_j = (A_j - mean A) (log pi_j - mean log pi)

``clip`` drops a few tokens of high covariance from the policy term; ``kl`` holds the tokens of highest
covariance to the old policy. `policy_loss` applies either to what `select` chose. The covariance scales with
the rewards: rescale ``low`` and ``high`` with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName, UsageError
from agentgym.seeding import derive
from agentgym.trainers.refusals import refuse_idle


@dataclass(frozen=True, slots=True)
class CovarianceConfig:
    """Which tokens, and how many.

    The defaults are SPEAR's for self-imitation where a success earns 10. Its scripts have 1 and 40 where it
    earns 1, and ``fraction=2e-4, low=1, high=5`` for the on-policy loss.

    Attributes:
        kind: ``clip`` (selected tokens leave the policy term and stay in the denominators) or ``kl`` (they
            get ``coef * |log pi - log pi_old|`` on top).
        fraction: Share of the step's tokens that is selected, rounded down, at least one token.
        low: ``clip`` alone: tokens with ``c > low`` are eligible ...
        high: ... if ``c < high``.
        coef: ``kl`` alone: the penalty's coefficient.

    Raises:
        UnknownName: An unknown kind.
        ConfigError: A number that cannot be, or would change nothing.
    """

    kind: Literal["clip", "kl"] = "clip"
    fraction: float = 0.02
    low: float = 2.0
    high: float = 60.0
    coef: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("clip", "kl"):
            raise UnknownName("covariance kind", self.kind, ("clip", "kl"))
        if not 0 <= self.fraction <= 1:
            raise ConfigError(
                f"fraction must be in [0, 1], got {self.fraction}",
                hint="SPEAR takes 0.02; leave the covariance section out to select nothing",
            )
        if not self.low < self.high:
            raise ConfigError(
                f"no covariance lies between low {self.low} and high {self.high}",
                hint="SPEAR takes 2 and 60 where a success earns 10, 1 and 40 where it earns 1",
            )
        if self.coef < 0:
            raise ConfigError(f"coef must not be negative, got {self.coef}", hint="1 is usual")
        if self.kind == "clip":
            because, hint = "kind is 'clip', which penalises no token", "set loss.covariance.kind='kl'"
            refuse_idle(self, "coef", section="loss.covariance", because=because, hint=hint)
        else:
            because = "kind is 'kl', which takes the largest covariances whatever they are"
            hint = "set loss.covariance.kind='clip'"
            refuse_idle(self, "low", "high", section="loss.covariance", because=because, hint=hint)


def covariances(advantages: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """Every token's covariance within its optimiser step.

    Args:
        advantages: ``[B, T]``; all rows of the step.
        logp: ``[B, T]``; log-probs under the policy before the step. No gradient passes.
        mask: ``[B, T]`` bool; true on sampled tokens that are in the loss.

    Returns:
        ``[B, T]`` float64; 0 off the mask, and exactly 0 everywhere where all advantages, or all log-probs,
        are equal.

    Raises:
        UsageError: Shapes differ, or the mask is not bool.
    """
    _check(mask, advantages=advantages, logp=logp)
    return _centred(advantages, mask) * _centred(logp, mask)


def select(
    advantages: Tensor,
    logp: Tensor,
    logp_old: Tensor,
    mask: Tensor,
    config: CovarianceConfig,
    clip_low: float,
    clip_high: float,
    seed: int,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """The tokens of an optimiser step that the policy loss treats apart.

    With n tokens in the mask and ``k = max(floor(fraction n), 1)``: ``clip`` draws ``min(k, eligible)`` at
    random among the tokens that are not clipped already and have ``low < c < high``; ``kl`` takes the k of
    largest covariance, of those above 0 (a token with ``c <= 0`` does not lower the entropy, and a batch
    whose advantages are all equal keeps a gradient of 0).

    Args:
        advantages: ``[B, T]``; all rows of the step.
        logp: ``[B, T]``; log-probs under the policy before the step.
        logp_old: ``[B, T]``; those of the proximal policy, which the ratio is taken to.
        mask: ``[B, T]`` bool.
        config: Which tokens.
        clip_low: The loss clips ratios below ``1 - clip_low``.
        clip_high: The loss clips ratios above ``1 + clip_high``.
        seed: Of this optimiser step.
        rows: ``[B]`` integer ids of the rows, which their random numbers hang on (`Batch.row`); ``None``: the
            rows' places, and then the draw depends on their order.

    Returns:
        ``[B, T]`` bool.

    Raises:
        UsageError: Shapes differ, or the mask is not bool.
    """
    _check(mask, advantages=advantages, logp=logp, logp_old=logp_old)
    covariance = covariances(advantages, logp, mask)
    # 0.29 of 100 tokens is 29, though the product is just below.
    wanted = max(math.floor(config.fraction * int(mask.sum()) + 1e-9), 1)
    if config.kind == "clip":
        gain = torch.where(mask, advantages.double(), 0.0)
        ratio = torch.where(mask, logp.double() - logp_old.double(), 0.0).exp()
        clipped = (gain > 0) & (ratio > 1 + clip_high) | (gain < 0) & (ratio < 1 - clip_low)
        eligible = mask & ~clipped & (covariance > config.low) & (covariance < config.high)
    else:
        eligible = mask & (covariance > 0)
    draws = _draws(mask, seed, rows)[eligible.cpu().numpy()]
    first = np.zeros_like(draws)
    if config.kind == "kl":
        first = -covariance[eligible].cpu().numpy()
    chosen = np.lexsort((draws, first))[:wanted]
    selected = torch.zeros_like(mask)
    places = eligible.nonzero()[torch.from_numpy(chosen).to(mask.device)]
    selected[places[:, 0], places[:, 1]] = True
    return selected


def covariance_metrics(covariance: Tensor, selected: Tensor, mask: Tensor) -> dict[str, float]:
    """What is logged of an optimiser step; empty without a token.

    Args:
        covariance: ``[B, T]``; of `covariances`.
        selected: ``[B, T]`` bool; of `select`.
        mask: ``[B, T]`` bool.

    Returns:
        ``cov_mean``, ``cov_max`` over the tokens in the mask, ``cov_masked_frac``: the share selected.
    """
    if not bool(mask.any()):
        return {}
    values = covariance[mask]
    return {
        "cov_mean": values.mean().item(),
        "cov_max": values.max().item(),
        "cov_masked_frac": int((selected & mask).sum()) / values.numel(),
    }


def _centred(values: Tensor, mask: Tensor) -> Tensor:
    x = values.detach().double()
    # In sorted order, the sum does not depend on the rows' order, in its last bits either.
    inside = x[mask].sort().values
    if not len(inside) or bool(inside[0] == inside[-1]):
        return torch.zeros_like(x)
    return torch.where(mask, x - inside.mean(), 0.0)


def _draws(mask: Tensor, seed: int, rows: Tensor | None) -> NDArray[np.float64]:
    inside = mask.cpu().numpy()
    draws = np.zeros(inside.shape)
    ids = range(len(inside)) if rows is None else rows.tolist()
    for place, row in enumerate(ids):
        generator = np.random.default_rng(derive(seed, "covariance", int(row)))
        draws[place, inside[place]] = generator.random(int(inside[place].sum()))
    return draws


def _check(mask: Tensor, **others: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise UsageError(
            f"the mask must be bool [B, T], got {mask.dtype} {tuple(mask.shape)}", hint="pass mask.bool()"
        )
    for name, x in others.items():
        if x.shape != mask.shape:
            raise UsageError(
                f"{name} has shape {tuple(x.shape)} but the mask has {tuple(mask.shape)}",
                hint="pass all rows of the optimiser step, padded to one width",
            )
