"""EPO: an entropy bonus over all turns, and a penalty where entropy leaves a band around its own history.

Source: Xu et al. 2025, Entropy-regularized Policy Optimization for multi-turn agents (arXiv 2509.22576)::

    L   = L_base - lambda (H - c_s w_k P),     H and P aggregated as the policy loss is
    P(h) = alpha (max(0, low - h) + max(0, h - high)),   low, high = kappa_low, kappa_high times H_ref

Invariant: ``H_ref`` is a number, taken from earlier steps alone and turn by turn; step k never sees its own
entropies in it, and without an earlier step there is no penalty. With ``coef = 0`` it is its base, bit for
bit; with ``smooth = 0`` its base with the plain entropy bonus.

What the paper writes as an indicator has no gradient (``mode = "parity"``): the hinge is what lets the
penalty act. The slope of the loss in a token's entropy is then, times ``lambda`` and the token's weight,

=============  ==========================
below          ``-(1 + c_s w_k alpha)``
in the band    ``-1``
above          ``-(1 - c_s w_k alpha)``
=============  ==========================

so above the band entropy falls only where ``c_s w_k alpha > 1``, as by default; else the bonus weakens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from agentgym.config import Config
from agentgym.errors import ConfigError
from agentgym.trainers.aggregation import Denominators, aggregate
from agentgym.trainers.batch import Batch, Row
from agentgym.trainers.learner import Outputs
from agentgym.trainers.method import Here, Method, Step, Term
from agentgym.trainers.refusals import refuse_idle
from agentgym.trainers.schedules import epo_beta, epo_release_weight

if TYPE_CHECKING:
    from agentgym.trainers.policy_gradient import PolicyGradientConfig
    from agentgym.trainers.run import Run

Reference = Literal["turn", "global"]


class EPOSection(Config):
    """EPO's numbers; the paper's, but for ``alpha`` and ``mode``, which the hinge gives another meaning."""

    coef: float = Field(0.001, ge=0, description="lambda; 0: the base algorithm")
    smooth: float = Field(1.0, ge=0, description="c_s, weight of the penalty; 0: the plain entropy bonus")
    kappa_low: float = Field(0.5, ge=0, description="lower edge of the band, times the reference")
    kappa_high: float = Field(1.5, ge=0, description="upper edge of the band, times the reference")
    alpha: float = Field(1.0, ge=0, description="slope outside the band; the indicator's height in parity")
    mode: Literal["hinge", "squared", "parity"] = Field(
        "hinge", description="distance to the band, its square, or the paper's indicator without a gradient"
    )
    reference: Reference = Field("turn", description="history of the same turn index, or of all tokens")
    phase: Literal["beta", "release", "constant"] = Field(
        "beta", description="w_k: the paper's beta_k, what its release computes, or 1"
    )
    k_mid: float | None = Field(None, gt=0, description="of beta, in steps; none: 60 % of the run")
    gamma: float = Field(1.0, ge=0, description="of beta: how fast it falls")

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.kappa_low > self.kappa_high:
            raise ConfigError(
                f"epo.kappa_low {self.kappa_low:g} is above epo.kappa_high {self.kappa_high:g}: no entropy "
                "is in such a band",
                hint="0.5 and 1.5 are the paper's, 0 and 2 its runs'",
            )
        if self.phase != "beta":
            because = f"phase is {self.phase!r}, which is no beta"
            refuse_idle(self, "k_mid", "gamma", section="epo", because=because, hint="set epo.phase='beta'")
        return self


def band(reference: Tensor, kappa_low: float, kappa_high: float) -> tuple[Tensor, Tensor]:
    """The edges ``kappa H_ref``, which are themselves in the band; an infinite kappa bounds nothing."""
    reference = reference.detach()
    # inf * 0 is NaN
    high = torch.full_like(reference, math.inf) if math.isinf(kappa_high) else kappa_high * reference
    return kappa_low * reference, high


def penalty(
    entropy: Tensor,
    reference: Tensor,
    *,
    kappa_low: float = 0.5,
    kappa_high: float = 1.5,
    alpha: float = 1.0,
    mode: Literal["hinge", "squared", "parity"] = "hinge",
) -> Tensor:
    """How far each entropy lies outside the band around its reference.

    Args:
        entropy: Any shape, in nats; receives the gradient, except in parity mode.
        reference: Of the same shape; never receives one.
        kappa_low: Lower edge of the band, as a multiple of the reference.
        kappa_high: Upper edge; may be infinite.
        alpha: Factor of the whole.
        mode: ``hinge`` (the distance), ``squared``, or ``parity`` (1 outside, 0 inside).

    Returns:
        The shape of ``entropy``; 0 inside the band and on its edges.
    """
    low, high = band(reference, kappa_low, kappa_high)
    if mode == "parity":
        return alpha * ((entropy < low) | (entropy > high)).to(entropy.dtype)
    below, above = (low - entropy).relu(), (entropy - high).relu()
    return alpha * (below.square() + above.square() if mode == "squared" else below + above)


def phase_weight(step: int, steps: int, section: EPOSection) -> float:
    """``w_k`` of the step ``step``, from 0, of a run of ``steps``."""
    if section.phase == "beta":
        return epo_beta(step, section.k_mid or 0.6 * steps, section.gamma)
    return epo_release_weight(step, steps) if section.phase == "release" else 1.0


class History:
    """Mean entropies of the steps so far, in nats: each step counts once, whatever its number of tokens.

    A turn's mean is over the steps that had a token of that turn, so that steps with fewer turns shift
    nothing.
    """

    def __init__(self) -> None:
        self._turns: dict[int, tuple[float, int]] = {}
        self._whole = (0.0, 0)

    def push(self, sums: Tensor, counts: Tensor) -> None:
        """Add a step.

        A step without a token, or with entropies that are not finite (its update was skipped), is left out.

        Args:
            sums: ``[S]`` float64; entropies of the turns 0 to S-1, summed over tokens.
            counts: ``[S]``; tokens of each.
        """
        if not int(counts.sum()) or not bool(torch.isfinite(sums).all()):
            return
        for turn in counts.nonzero()[:, 0].tolist():
            total, steps = self._turns.get(turn, (0.0, 0))
            self._turns[turn] = total + float(sums[turn] / counts[turn]), steps + 1
        total, steps = self._whole
        self._whole = total + float(sums.sum() / counts.sum()), steps + 1

    def reference(self, turns: int, kind: Reference = "turn") -> Tensor | None:
        """``[turns]`` float64: ``H_ref`` of each turn; ``None`` without an earlier step.

        A turn that no earlier step had gets the mean over all tokens.
        """
        total, steps = self._whole
        if not steps:
            return None
        whole = torch.full((turns,), total / steps, dtype=torch.float64)
        for turn, (own, count) in self._turns.items():
            if kind == "turn" and turn < turns:
                whole[turn] = own / count
        return whole

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"turns": {str(t): list(own) for t, own in self._turns.items()}, "whole": list(self._whole)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """Inverse of :meth:`state`."""
        history = cls()
        history._turns = {int(t): (float(own[0]), int(own[1])) for t, own in state["turns"].items()}
        history._whole = float(state["whole"][0]), int(state["whole"][1])
        return history


@dataclass
class _Measured:
    """What a step saw of its rows when each was read for the first time; sums over tokens."""

    turns: Tensor  # [S, 2]: entropies and tokens of each turn
    band: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # below, above, penalty
    rows: set[int] = field(default_factory=set)
    squares: list[float] = field(default_factory=list)  # of the penalty's gradient, an optimiser step each

    def add(self, batch: Batch, entropy: Tensor, outside: Sequence[Tensor]) -> None:
        own = batch.row.tolist()
        first = torch.tensor([row not in self.rows for row in own])
        self.rows.update(own)
        mask = batch.loss_mask.cpu() & first[:, None]
        values = entropy.detach().cpu().double()[mask]
        seen = torch.stack((values, torch.ones_like(values)), dim=-1)
        self.turns.index_add_(0, batch.turn.cpu()[mask], seen)
        for i, values in enumerate(outside):
            self.band[i] += values.detach().cpu().double()[mask].sum()


class EPO(Method):
    """Adds ``-coef (H - c_s w_k P)`` to the policy loss.

    Entropies are those of the sampled tokens of valid trajectories, at the temperature of sampling. The
    history takes them from the pass over each row that comes first in its step.
    """

    name = "epo"

    def __init__(self, config: PolicyGradientConfig, run: Run) -> None:
        super().__init__(config, run)
        assert config.epo is not None
        self.section = config.epo
        self.history = History()
        self.acts = self.with_entropy = self.section.coef != 0
        self._measured = _Measured(torch.zeros(0, 2, dtype=torch.float64))

    @classmethod
    def check(cls, config: PolicyGradientConfig) -> None:
        """EPO is the entropy bonus: a second one beside it is refused."""
        if config.loss.entropy_coef:
            raise ConfigError(
                f"epo is an entropy bonus, and loss.entropy_coef {config.loss.entropy_coef:g} is another",
                hint="set epo.coef and leave loss.entropy_coef at 0; epo.smooth=0 is the plain bonus",
            )

    def before(self, step: Step, tokens: Tensor) -> None:
        """Begin to measure."""
        self._measured = _Measured(torch.zeros(int(step.whole.turn.max()) + 1, 2, dtype=torch.float64))

    def term(self, step: Step, chosen: Sequence[Row], denominators: Denominators) -> Term | None:
        """The share of a micro-batch, aggregated as the policy loss is."""
        section, mode, measured = self.section, self.config.loss.aggregation, self._measured
        if not section.coef:
            return None
        weight = section.smooth * phase_weight(step.number, self.config.steps, section)
        known = self.history.reference(len(measured.turns), section.reference)
        place = len(measured.squares)
        measured.squares.append(0.0)

        def share(batch: Batch, outputs: Outputs, here: Here) -> tuple[Tensor, Mapping[str, Tensor]]:
            assert outputs.entropy is not None
            mask = batch.loss_mask
            entropy = torch.where(mask, outputs.entropy, 0.0)
            value = aggregate(entropy, mask, mode, denominators)
            outside: Sequence[Tensor] = ()
            if known is not None:
                reference = known.to(entropy)[batch.turn.clamp(min=0)]

                def penalised(h: Tensor) -> Tensor:
                    return penalty(
                        h, reference, kappa_low=section.kappa_low, kappa_high=section.kappa_high,
                        alpha=section.alpha, mode=section.mode,
                    )  # fmt: skip

                levels = penalised(entropy)
                value = value - weight * aggregate(levels, mask, mode, denominators)
                low, high = band(reference, section.kappa_low, section.kappa_high)
                outside = entropy < low, entropy > high, levels
                leaf = entropy.detach().requires_grad_()
                alone = aggregate(penalised(leaf), mask, mode, denominators)
                if alone.requires_grad:
                    (slope,) = torch.autograd.grad(alone, leaf)
                    measured.squares[place] += float((section.coef * weight * slope).double().square().sum())
            measured.add(batch, entropy, outside)
            return -section.coef * value, {}

        return share

    def finish(self, step: Step, tokens: Tensor) -> None:
        """Log what was seen, and only then let it become history."""
        sums, counts = self._measured.turns.unbind(1)
        total = float(counts.sum())
        if not total:
            return
        known = self.history.reference(len(sums), self.section.reference)
        log = step.metrics
        log["epo/beta"] = phase_weight(step.number, self.config.steps, self.section)
        log["epo/entropy_mean"] = float(sums.sum()) / total
        for turn in counts.nonzero()[:, 0].tolist():
            log[f"epo/entropy_turn_{turn}"] = float(sums[turn] / counts[turn])
            if known is not None:
                log[f"epo/ref_turn_{turn}"] = float(known[turn])
        if known is not None:
            for name, value in zip(("frac_below", "frac_above", "penalty"), self._measured.band, strict=True):
                log[f"epo/{name}"] = float(value) / total
            norms = [math.sqrt(square) for square in self._measured.squares]
            log["epo/penalty_grad_norm"] = sum(norms) / len(norms)
        self.history.push(sums, counts)

    def state(self) -> dict[str, Any]:
        """The history."""
        return self.history.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.history = History.of(state)
