"""Correction for the mismatch between the engine that sampled and the trainer that learns.

The two compute the same log-probs with different arithmetic (and, asynchronously, different weights), so with
``w = exp(logp_old - logp_rollout)`` on sampled tokens the policy loss is weighted token by token, or tokens
and sequences that are too far apart are rejected.

Invariant: weights carry no gradient, are exactly 1 where engine and trainer agree, and are at most the upper
bound. A dropped or rejected token has weight 0 and stays in the denominators.

Both log-probs must be those of the same distribution: the same prompt tokens and the same temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName
from agentgym.trainers.kl import kl_estimate
from agentgym.trainers.refusals import refuse_idle

_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class CorrectionConfig:
    """Which correction.

    Attributes:
        rule: ``none`` (weight 1), ``truncate`` (truncated importance sampling, TIS: ``min(w, high)``, Yao et
            al. 2025) or ``mask`` (IcePop: ``w`` inside ``[low, high]``, 0 outside, Ling team 2025).
        level: ``token``, or ``sequence``: the product of a row's weights stands for each of its tokens.
        low: Lower bound of ``mask``.
        high: Upper bound; ``inf`` bounds nothing.
        reject: Beside the rule, give weight 0 to what is further apart than ``reject_above``, measured by
            ``ratio`` (the larger of w and 1/w), or by the estimate ``k1`` (``|log w|``), ``k2``
            (``log(w)^2 / 2``) or ``k3`` (``w - 1 - log w``) of the divergence; ``none`` rejects nothing.
        reject_level: ``token``, or ``sequence``: a row is rejected whole by its tokens' mean (``ratio`` and
            ``k1`` by that of ``log w``, with its sign).
        reject_above: The largest measure that stays: from 1 for ``ratio``, from 0 for the others.

    TRL's default is ``CorrectionConfig("mask", "sequence", 0.0, 3.0)``.

    Raises:
        UnknownName: An unknown rule, level or measure.
        ConfigError: Bounds that exclude the weight 1, or a number that would change nothing.
    """

    rule: Literal["none", "truncate", "mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    low: float = 0.5
    high: float = 2.0
    reject: Literal["none", "ratio", "k1", "k2", "k3"] = "none"
    reject_level: Literal["token", "sequence"] = "token"
    reject_above: float = 2.0

    def __post_init__(self) -> None:
        if self.rule not in ("none", "truncate", "mask"):
            raise UnknownName("correction rule", self.rule, ("none", "truncate", "mask"))
        for level in (self.level, self.reject_level):
            if level not in ("token", "sequence"):
                raise UnknownName("correction level", level, ("token", "sequence"))
        if self.reject not in ("none", "ratio", "k1", "k2", "k3"):
            raise UnknownName("rejection measure", self.reject, ("none", "ratio", "k1", "k2", "k3"))
        if not 0 <= self.low <= 1 <= self.high:
            raise ConfigError(
                f"correction bounds must satisfy 0 <= low <= 1 <= high, got [{self.low}, {self.high}]",
                hint="an engine that agrees with the trainer has weight 1, which must stay",
            )
        if self.reject_above < (agreement := 1.0 if self.reject == "ratio" else 0.0):
            raise ConfigError(
                f"reject_above must be at least {agreement:g} for {self.reject!r}, got {self.reject_above}",
                hint="that is the measure of an engine that agrees with the trainer, which must stay",
            )
        hint = "set correction.rule='mask'"
        if self.rule == "none":
            because = "rule is 'none'"
            refuse_idle(self, "level", "low", "high", section="correction", because=because, hint=hint)
        elif self.rule == "truncate":
            because = "rule 'truncate' has no lower bound"
            refuse_idle(self, "low", section="correction", because=because, hint=hint)
        if self.reject == "none":
            because, hint = "reject is 'none'", "set correction.reject='k3'"
            refuse_idle(
                self, "reject_level", "reject_above", section="correction", because=because, hint=hint
            )


def correction_weights(
    logp_old: Tensor, logp_rollout: Tensor, mask: Tensor, config: CorrectionConfig
) -> Tensor | None:
    """Importance weights for `policy_loss`.

    Args:
        logp_old: ``[B, T]``; the trainer's log-probs before the update.
        logp_rollout: ``[B, T]``; the engine's log-probs at sampling.
        mask: ``[B, T]`` bool; true on sampled tokens.
        config: Which correction.

    Returns:
        ``[B, T]`` without gradient, 0 where nothing was sampled; ``None`` where nothing is corrected.
    """
    if config.rule == "none" and config.reject == "none":
        return None
    log_weight = _log_weight(logp_old, logp_rollout, mask)
    kept = mask if config.reject == "none" else mask & ~_rejected(log_weight, mask, config)
    if config.rule == "none":
        return kept.to(log_weight.dtype)
    if config.level == "sequence":
        log_weight = log_weight.sum(1, keepdim=True).expand_as(log_weight)
    weight = log_weight.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    if config.rule == "truncate":
        weight = weight.clamp(max=config.high)
    else:
        weight = torch.where((weight >= config.low) & (weight <= config.high), weight, 0.0)
    return torch.where(kept, weight, 0.0)


def mismatch_metrics(logp_old: Tensor, logp_rollout: Tensor, mask: Tensor) -> dict[str, float]:
    """How far engine and trainer are apart, over the whole batch.

    Args:
        logp_old: ``[B, T]``; the trainer's log-probs.
        logp_rollout: ``[B, T]``; the engine's.
        mask: ``[B, T]`` bool; true on sampled tokens.

    Returns:
        ``rollout_train/{kl,k3}``: estimates of KL(engine || trainer) in nats a token;
        ``ratio_{mean,max,min}`` of ``w``; ``ess``: effective sample size of the token weights as a share of
        the tokens, in (0, 1]; ``ppl_gap``: the trainer's perplexity less the engine's. Empty without a token.
    """
    if not bool(mask.any()):
        return {}
    old, rollout = logp_old[mask].double(), logp_rollout[mask].double()
    weight = _log_weight(old, rollout, torch.ones_like(old, dtype=torch.bool))
    weight = weight.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    return {
        "rollout_train/kl": (rollout - old).mean().item(),
        "rollout_train/k3": kl_estimate(rollout, old, "k3").mean().item(),
        "rollout_train/ratio_mean": weight.mean().item(),
        "rollout_train/ratio_max": weight.max().item(),
        "rollout_train/ratio_min": weight.min().item(),
        "rollout_train/ess": (weight.sum() ** 2 / (len(weight) * (weight**2).sum())).item(),
        "rollout_train/ppl_gap": ((-old.mean()).exp() - (-rollout.mean()).exp()).item(),
    }


def _rejected(log_weight: Tensor, mask: Tensor, config: CorrectionConfig) -> Tensor:
    if config.reject == "k2":
        measure = 0.5 * log_weight**2
    elif config.reject == "k3":
        measure = torch.expm1(log_weight.clamp(max=_LARGEST_LOG_RATIO)) - log_weight
    else:
        measure = log_weight
    if config.reject_level == "sequence":
        mean = measure.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        measure = mean.expand_as(measure)
    bound = math.log(config.reject_above) if config.reject == "ratio" else config.reject_above
    return measure.abs() > bound


def _log_weight(logp_old: Tensor, logp_rollout: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, logp_old.detach() - logp_rollout.detach(), 0.0)
