"""The policy loss: the one place where token masks are applied.

Invariant: a position outside the mask is never read. Whatever stands there, NaN included, changes neither the
loss nor a gradient. And the loss is a share of the whole optimiser step's loss
(`agentgym.trainers.aggregation`): shares of micro-batches add up, however the batch was split.

Methods differ in the advantages, masks and weights they pass and in the numbers of `PolicyLossConfig`:

=================  ====================================================================================
PPO, GRPO          ``clip_low = clip_high``
DAPO               ``clip_low=0.2, clip_high=0.28``, token-mean (Yu et al. 2025, eq. 8)
Dr.GRPO            seq-mean-token-sum-norm (Liu et al. 2025)
dual clip          ``clip_dual=3`` bounds the loss of tokens with A < 0 (Ye et al. 2020, eq. 5)
GSPO               ``ratio="sequence"``, bounds near 3e-4 (Zheng et al. 2025, eq. 5 and 11)
CISPO              ``objective="cispo"`` (MiniMax-M1 2025, eq. 4)
LOOP               ``clip_space="log"``, ratio ``token``, ``turn`` or ``trajectory`` (Chen et al. 2025, 3.2)
clip-cov, KL-cov   ``covariance`` and the tokens ``selected`` (`agentgym.trainers.covariance`)
off-policy data    ``weights`` (TIS, IcePop: `agentgym.trainers.correction`); weight 0 drops a token from the
                   policy term and keeps it in the denominators
=================  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName, UsageError
from agentgym.trainers.aggregation import AggregationMode, Denominators, aggregate, check_aggregation
from agentgym.trainers.covariance import CovarianceConfig
from agentgym.trainers.kl import KL_ESTIMATORS, KLEstimator, kl_estimate
from agentgym.trainers.refusals import refuse_idle

_LARGEST_LOG_RATIO = 20.0
_RATIOS = ("token", "sequence", "turn", "trajectory")


@dataclass(frozen=True, slots=True)
class PolicyLossConfig:
    """The numbers of a policy loss.

    Attributes:
        objective: ``clip`` (PPO's pessimistic minimum) or ``cispo`` (clipped, detached ratio times log-prob).
        ratio: ``token``; ``sequence`` for GSPO: a row's mean log-ratio stands for each of its tokens;
            ``turn`` or ``trajectory`` for LOOP: the product of the token ratios of a turn, or of a row (where
            a trajectory is one row), stands for each of its tokens. With seq-mean-token-mean that is LOOP's
            objective; other modes count a trajectory once a token.
        clip_low: The ratio is clipped below ``1 - clip_low``; 1 or more clips nothing below.
        clip_high: The ratio is clipped above ``1 + clip_high``; more than ``clip_low`` is clip-higher.
        clip_space: ``linear``, or ``log``: the lower bound is ``1 / (1 + clip_low)``, so that equal numbers
            bound the log-ratio symmetrically.
        clip_dual: For A < 0 the loss is at most ``-A * clip_dual``; ``None`` or 0 for no bound, else above 1.
        aggregation: How token losses become one number.
        length_norm: The fixed factor of ``seq-mean-token-sum-norm``, in tokens; ``None`` or 0 for none.
        kl: Estimator of the KL term.
        kl_coef: Coefficient of the KL term; 0 leaves it out of loss and gradient.
        entropy_coef: Coefficient of the entropy bonus; 0 leaves it out of loss and gradient.
        covariance: What is done with the tokens ``selected``; ``None``: nothing is selected.

    Raises:
        ConfigError: A number that cannot be, or would change nothing.
        UnknownName: An unknown objective, ratio, clip space, aggregation mode or estimator.
    """

    objective: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence", "turn", "trajectory"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_space: Literal["linear", "log"] = "linear"
    clip_dual: float | None = None
    aggregation: AggregationMode = "token-mean"
    length_norm: float | None = None
    kl: KLEstimator = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    covariance: CovarianceConfig | None = None

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """The smallest and the largest ratio that is not clipped."""
        low = 1 - self.clip_low if self.clip_space == "linear" else 1 / (1 + self.clip_low)
        return low, 1 + self.clip_high

    def __post_init__(self) -> None:
        for name in ("clip_dual", "length_norm"):
            if getattr(self, name) == 0:  # how a preset's is taken back: TOML has no null
                object.__setattr__(self, name, None)
        if self.objective not in ("clip", "cispo"):
            raise UnknownName("policy objective", self.objective, ("clip", "cispo"))
        if self.ratio not in _RATIOS:
            raise UnknownName("ratio", self.ratio, _RATIOS)
        if self.clip_space not in ("linear", "log"):
            raise UnknownName("clip space", self.clip_space, ("linear", "log"))
        if self.kl not in KL_ESTIMATORS:
            raise UnknownName("KL estimator", self.kl, KL_ESTIMATORS)
        check_aggregation(self.aggregation, self.length_norm)
        if self.clip_low < 0 or self.clip_high < 0:
            raise ConfigError(
                f"clip_low {self.clip_low} and clip_high {self.clip_high} must not be negative",
                hint="0.2 and 0.2 are PPO's; 0.2 and 0.28 DAPO's",
            )
        if self.kl_coef < 0:
            raise ConfigError(
                f"kl_coef must not be negative, got {self.kl_coef}: it would drive the policy away",
                hint="0 leaves the KL term out",
            )
        if self.clip_dual is not None and self.clip_dual <= 1:
            raise ConfigError(
                f"clip_dual must be above 1, got {self.clip_dual}",
                hint="3 is usual, 10 is loose; leave it out for no dual clip",
            )
        if self.clip_dual is not None and self.covariance is not None and self.covariance.kind == "clip":
            raise ConfigError(
                f"clip-cov has no dual clip, but clip_dual is {self.clip_dual}",
                hint="set clip_dual=0, or leave out covariance",
            )
        if self.covariance is not None and self.covariance.kind == "clip" and self.ratio != "token":
            raise ConfigError(
                "clip-cov passes over tokens that are clipped already, judged by token ratios, and the loss "
                f"clips those of ratio {self.ratio!r}",
                hint="set ratio='token', take covariance.kind='kl', or select nothing: leave out covariance, "
                "and in a replay spear.covariance_fraction=0",
            )
        if self.objective == "cispo":
            because, hint = "objective 'cispo' bounds the ratio itself", "set loss.objective='clip'"
            refuse_idle(self, "clip_dual", section="loss", because=because, hint=hint, off=0)
        if self.aggregation != "seq-mean-token-sum-norm":
            because = f"aggregation {self.aggregation!r} divides by no fixed length"
            hint = "set loss.aggregation='seq-mean-token-sum-norm'"
            refuse_idle(self, "length_norm", section="loss", because=because, hint=hint, off=0)


class PolicyLoss(NamedTuple):
    """A micro-batch's share of the loss, and of the metrics (`combine_metrics` puts those together)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: PolicyLossConfig,
    denominators: Denominators,
    weights: Tensor | None = None,
    logp_ref: Tensor | None = None,
    entropy: Tensor | None = None,
    row_weight: Tensor | None = None,
    turn: Tensor | None = None,
    selected: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy loss with optional importance weights, KL term and entropy bonus.

    Every tensor but ``row_weight`` is ``[B, T]``, aligned with the target tokens; only ``logp`` and
    ``entropy`` receive gradients.

    Args:
        logp: Log-probs under the policy being optimised.
        logp_old: Log-probs under the proximal policy (the trainer's, before the update).
        advantages: One a token.
        mask: Bool; true on sampled tokens that are in the loss.
        config: The loss's numbers.
        denominators: Of the whole optimiser step, counted with the same masks and ``row_weight``.
        weights: Importance weights of the policy term, multiplied before aggregation; detached.
        logp_ref: Log-probs under the reference policy. Needed with ``kl_coef``; without it, only measured.
        entropy: Entropy of the policy's next-token distribution. Needed with ``entropy_coef``; without it,
            only measured.
        row_weight: ``[B]``; how many rows a row counts as.
        turn: Integer index of each token's turn; needed with ``ratio="turn"``.
        selected: Bool; the tokens that `agentgym.trainers.covariance.select` chose. Needed with
            ``covariance``: ``clip`` takes them out of the policy term (not out of the KL term, the entropy
            bonus and the denominators), ``kl`` adds ``coef * |logp - logp_old|`` to theirs.

    Returns:
        The share of the loss, and of ``loss/{total,pg,kl,entropy}``, ``clipfrac_{low,high,dual}``,
        ``approx_kl`` (mean of ``logp_old - logp``), ``ratio_{mean,max,min}``, ``kl_ref``, ``entropy_mean``,
        ``weight_mean``, ``tokens_in_loss``, ``rows_in_loss``.

    Raises:
        UsageError: Shapes differ, the mask is not bool, or a coefficient lacks its tensor.
    """
    _check(
        logp,
        mask,
        logp_old=logp_old,
        advantages=advantages,
        weights=weights,
        logp_ref=logp_ref,
        entropy=entropy,
        turn=turn,
        selected=selected,
    )
    if config.ratio == "turn" and turn is None:
        raise UsageError(
            'ratio is "turn" but no turn was passed', hint="pass the batch's turn, or another ratio"
        )
    if (config.covariance is None) != (selected is None):
        raise UsageError(
            "covariance is configured but no tokens were passed as selected"
            if selected is None
            else "tokens were passed as selected but no covariance is configured",
            hint="select over all rows of the optimiser step with covariance.select, or leave out both",
        )
    if config.kl_coef and logp_ref is None:
        raise UsageError(
            f"kl_coef is {config.kl_coef:g} but no logp_ref was passed",
            hint="compute the reference's log-probs, or set kl_coef to 0",
        )
    if config.entropy_coef and entropy is None:
        raise UsageError(
            f"entropy_coef is {config.entropy_coef:g} but no entropy was passed",
            hint="ask token_logprobs for entropy=True, or set entropy_coef to 0",
        )
    dtype = torch.promote_types(logp.dtype, torch.float32)

    def inside(x: Tensor) -> Tensor:
        # where, not a product: NaN * 0 is NaN, in the gradient too.
        return torch.where(mask, x.to(dtype), 0.0)

    def total(x: Tensor) -> Tensor:
        return aggregate(x, mask, config.aggregation, denominators, row_weight=row_weight)

    def share(x: Tensor) -> Tensor:
        mean = aggregate(x.detach().to(dtype), mask, "token-mean", denominators, row_weight=row_weight)
        return mean / denominators.world_size

    logp, logp_old, advantages = inside(logp), inside(logp_old).detach(), inside(advantages).detach()
    ratio = _ratio(logp, logp_old, mask, turn, config)
    losses = _token_losses(ratio, logp, advantages, config)
    if config.covariance is not None and selected is not None:
        if config.covariance.kind == "clip":
            losses = torch.where(selected, 0.0, losses)
        else:
            penalty = config.covariance.coef * (logp - logp_old).abs()
            losses = losses + torch.where(selected, penalty, 0.0)
    if weights is not None:
        weights = inside(weights).detach()
        losses = losses * weights
    pg = total(losses)
    loss = pg
    metrics = {"loss/pg": pg, **_clip_fractions(ratio, advantages, config)}
    metrics["approx_kl"] = logp_old - logp
    metrics["ratio_mean"] = ratio
    if weights is not None:
        metrics["weight_mean"] = weights
    if logp_ref is not None:
        divergence = kl_estimate(logp, inside(logp_ref), config.kl)
        metrics["kl_ref"] = divergence
        if config.kl_coef:
            kl = config.kl_coef * total(divergence)
            loss = loss + kl
            metrics["loss/kl"] = kl
    if entropy is not None:
        entropy = inside(entropy)
        metrics["entropy_mean"] = entropy
        if config.entropy_coef:
            bonus = -config.entropy_coef * total(entropy)
            loss = loss + bonus
            metrics["loss/entropy"] = bonus
    metrics["loss/total"] = loss
    shares = {
        name: x.detach() / denominators.world_size if x.dim() == 0 else share(x)
        for name, x in metrics.items()
    }
    shares["ratio_max"] = torch.where(mask, ratio.detach(), -math.inf).max()
    shares["ratio_min"] = torch.where(mask, ratio.detach(), math.inf).min()
    shares["tokens_in_loss"] = mask.sum()
    shares["rows_in_loss"] = mask.any(1).sum()
    return PolicyLoss(loss, shares)


def combine_metrics(shares: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Put the metrics of one step's micro-batches (and ranks) together.

    Args:
        shares: What `policy_loss` returned for each; means came divided by the step's denominators.

    Returns:
        The step's metrics: extremes of ``*_max`` and ``*_min``, sums of everything else. An extreme over no
        token at all is left out.
    """
    combined: dict[str, float] = {}
    for name in sorted({name for share in shares for name in share}):
        values = [float(share[name]) for share in shares if name in share]
        if name.endswith("_max"):
            combined[name] = max(values)
        elif name.endswith("_min"):
            combined[name] = min(values)
        else:
            combined[name] = math.fsum(values)
    return {
        name: value
        for name, value in combined.items()
        if not (name.endswith(("_max", "_min")) and math.isinf(value))
    }


def _ratio(
    logp: Tensor, logp_old: Tensor, mask: Tensor, turn: Tensor | None, config: PolicyLossConfig
) -> Tensor:
    log_ratio = logp - logp_old
    if config.ratio == "sequence":
        mean = log_ratio.detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        # GSPO-token: the sequence's ratio in value, the token's log-prob in gradient. With one advantage a
        # row it is GSPO itself; with one a turn each token keeps its own.
        log_ratio = torch.where(mask, mean + (logp - logp.detach()), 0.0)
    elif config.ratio == "trajectory":
        log_ratio = torch.where(mask, log_ratio.sum(1, keepdim=True), 0.0)
    elif config.ratio == "turn" and turn is not None:
        # Slot 0 takes what is off the mask; a row's own smallest turn is its slot 1.
        first = torch.where(mask, turn, torch.iinfo(turn.dtype).max).amin(1, keepdim=True)
        slot = torch.where(mask, turn - first + 1, 0)
        sums = log_ratio.new_zeros(len(turn), int(slot.max()) + 1).scatter_add(1, slot, log_ratio)
        log_ratio = torch.where(mask, sums.gather(1, slot), 0.0)
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def _token_losses(ratio: Tensor, logp: Tensor, advantages: Tensor, config: PolicyLossConfig) -> Tensor:
    clipped_ratio = ratio.clamp(*config.clip_bounds)
    if config.objective == "cispo":
        return -clipped_ratio.detach() * advantages * logp
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    if config.clip_dual is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * config.clip_dual), losses)


def _clip_fractions(ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> dict[str, Tensor]:
    """Where each bound binds: only where it changes the loss, so never for A = 0."""
    low, high = config.clip_bounds
    fractions = {
        "clipfrac_low": (advantages < 0) & (ratio < low),
        "clipfrac_high": (advantages > 0) & (ratio > high),
    }
    if config.objective == "cispo":
        fractions = {
            "clipfrac_low": (advantages != 0) & (ratio < low),
            "clipfrac_high": (advantages != 0) & (ratio > high),
        }
    elif config.clip_dual is not None:
        fractions["clipfrac_dual"] = (advantages < 0) & (ratio > config.clip_dual)
    return fractions


def _check(logp: Tensor, mask: Tensor, **others: Tensor | None) -> None:
    if mask.dtype != torch.bool:
        raise UsageError(f"the mask must be bool, got {mask.dtype}", hint="pass mask.bool()")
    if logp.dim() != 2:
        raise UsageError(f"logp must be [B, T], got {tuple(logp.shape)}", hint="one row a segment")
    for name, x in {"mask": mask, **others}.items():
        if x is not None and x.shape != logp.shape:
            raise UsageError(
                f"{name} has shape {tuple(x.shape)} but logp has {tuple(logp.shape)}",
                hint="bring values of a trajectory or turn to its tokens with credit.broadcast",
            )
