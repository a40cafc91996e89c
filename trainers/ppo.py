"""PPO: a critic's values as the baseline of every sampled token.

Source: Schulman et al. 2017, Proximal Policy Optimization; generalised advantages of Schulman et al. 2016.
The clipped policy loss is the loop's own (`agentgym.trainers.policy_loss`); what is here is the critic::

    r_j    = the turn's reward on the turn's last sampled token, less kl_in_reward * k1_j on every token
    d_j    = r_j + gamma V_next(j) - V_j          next(j): the next sampled token of the trajectory
    A_j    = d_j + gamma lam A_next(j)            0 behind the last one
    Ret_j  = A_j + V_j                            before A is whitened over the tokens in the loss
    L_V    = 0.5 mean_j max((V_j - Ret_j)^2, (clip(V_j, Vold_j -/+ value_clip) - Ret_j)^2)

Invariant: time runs over a trajectory's sampled tokens alone, through all of its rows; what the environment
said in between changes no advantage but through the critic that reads it. A trajectory's token rewards add up
to its reward: nothing is lost where a turn has no token. Values and returns are the collection's, taken once
before its first optimiser step. The value head starts at 0, so with gamma = lam = 1 the first advantages are
the rewards to come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from agentgym.config import Config
from agentgym.errors import ConfigError
from agentgym.policies import models
from agentgym.seeding import derive
from agentgym.trainers.advantages import gae, whiten
from agentgym.trainers.aggregation import Denominators, aggregate
from agentgym.trainers.batch import Batch, Row
from agentgym.trainers.config import OptimiserSection
from agentgym.trainers.credit import at_last_token
from agentgym.trainers.learner import Learner, Outputs
from agentgym.trainers.method import Here, Method, Step, Term
from agentgym.trainers.refusals import refuse_idle
from agentgym.trainers.reward_shaping import kl_penalised
from agentgym.trainers.update import over_updates, split
from agentgym.trainers.value_loss import value_loss

if TYPE_CHECKING:
    from agentgym.trainers.policy_gradient import PolicyGradientConfig
    from agentgym.trainers.run import Run


class CriticOptimiser(OptimiserSection):
    """A separate critic's optimiser: the policy's, but for a rate ten times as high."""

    lr: float = Field(1e-5, gt=0)


class PPOSection(Config):
    """The critic's numbers."""

    gamma: float = Field(1.0, gt=0, le=1, description="discount from one sampled token to the next")
    lam: float = Field(1.0, ge=0, le=1, description="lambda of the generalised advantages")
    value_clip: float = Field(
        0.5, ge=0, description="how far a value moves in one step, in units of the return; 0: unclipped"
    )
    critic: Literal["separate", "shared"] = Field(
        "separate", description="a model of its own, or a second head on the policy"
    )
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss, where the critic is shared")
    optimiser: CriticOptimiser = CriticOptimiser()
    critic_warmup: int = Field(0, ge=0, description="first steps, in which a separate critic learns alone")
    whiten: bool = Field(True, description="advantages of mean 0 and variance 1 over the tokens in the loss")


class PPO(Method):
    """Advantages from a critic, and the critic's own updates.

    A separate critic starts from the policy's model, has the same adapters and micro-batches, and takes its
    optimiser step after the policy's, over the same rows. A shared one is a head beside the policy's own, and
    its loss a term of the policy's.

    Attributes:
        critic: The separate one; ``None`` if it is shared.
        values: ``[B, T-1]``; the critic's before the first update of a step.
        returns: ``[B, T-1]``; its targets.
    """

    name = "ppo"
    refuses: ClassVar[Mapping[str, str]] = {
        "gigpo": "its advantages compare the turns of a group, PPO's compare a token with a critic's value",
        "igpo": "its advantages are of rewards normalised in a group, PPO's of rewards less a critic's value",
        "spear": "it recalibrates stored advantages against a group's later rewards, and PPO has no groups",
    }

    def __init__(self, config: PolicyGradientConfig, run: Run) -> None:
        super().__init__(config, run)
        assert config.ppo is not None
        self.section = config.ppo
        self.acts = self.section.critic == "shared"
        self.critic: Learner | None = None
        if not self.acts:
            model, _ = models.load(config.model.name, dtype=torch.float32)
            packed = {"micro_batch_tokens": config.optimiser.micro_batch_tokens}
            critic = Learner(
                model,
                config.model,
                self.section.optimiser.model_copy(update=packed),
                planned_updates=config.steps * config.epochs * config.minibatches,
                heads="value",
            )
            self.critic = run.add_learner("critic", critic)
        self.values = self.returns = torch.zeros(0)
        self._alone: list[Row] = []
        self._seen: list[dict[str, float]] = []

    @classmethod
    def check(cls, config: PolicyGradientConfig) -> None:
        """Hold the settings to what a critic needs."""
        section = config.ppo
        assert section is not None
        if config.estimator != "gae":
            raise ConfigError(
                f"[ppo] takes the critic's advantages, and estimator {config.estimator!r} has no critic",
                hint="set estimator='gae', or leave [ppo] out",
            )
        if section.critic == "shared" and section.critic_warmup:
            raise ConfigError(
                f"ppo.critic_warmup is {section.critic_warmup}, but a shared critic moves the policy's trunk",
                hint="set critic_warmup=0, or critic='separate'",
            )
        if section.critic == "shared":
            refuse_idle(
                section.optimiser, *OptimiserSection.model_fields,
                section="ppo.optimiser", because="a shared critic moves with the policy's optimiser",
                hint="set optimiser.*, for both, or ppo.critic='separate'",
            )  # fmt: skip
        else:
            refuse_idle(
                section, "value_coef",
                section="ppo", because="a separate critic's loss is no part of the policy's",
                hint="set ppo.critic='shared'",
            )  # fmt: skip
        ours = section.optimiser.micro_batch_tokens
        if ours not in (config.optimiser.micro_batch_tokens, CriticOptimiser().micro_batch_tokens):
            raise ConfigError(
                f"ppo.optimiser.micro_batch_tokens is {ours}, but the critic has the policy's micro-batches",
                hint="set optimiser.micro_batch_tokens, for both",
            )

    def advantages(self, step: Step, tokens: Tensor) -> Tensor:
        """Replace ``tokens`` by generalised advantages, whitened over the rows in the loss."""
        section, whole, dtype = self.section, step.whole, tokens.dtype
        values = (self.critic or self.run.learner).judge(step.collection.rows).value
        assert values is not None
        rewards = token_rewards(step)
        if step.divergence is not None:
            rewards = kl_penalised(rewards, step.divergence, whole.loss_mask, self.config.kl_in_reward)
        found = gae(
            rewards, values.double(), whole.loss_mask, whole.trajectory, gamma=section.gamma, lam=section.lam
        )
        self.values, self.returns = values, found.returns.to(values.dtype)
        kept = torch.zeros(len(whole.row), dtype=torch.bool)
        kept[[row.index for row in step.rows]] = True
        in_loss = whole.loss_mask & kept[:, None]
        step.metrics |= _fit(values[in_loss].double(), found.returns[in_loss])
        if section.whiten:
            return whiten(found.advantages, in_loss).to(dtype)
        return torch.where(in_loss, found.advantages, 0.0).to(dtype)

    def before(self, step: Step, tokens: Tensor) -> None:
        """In the warm-up, take all rows out of the policy's loss: `finish` gives them to the critic."""
        if step.number < self.section.critic_warmup:
            self._alone, step.rows = step.rows, []

    def term(self, step: Step, chosen: Sequence[Row], denominators: Denominators) -> Term | None:
        """A shared critic's loss."""
        if self.critic is not None:
            return None

        def term(batch: Batch, outputs: Outputs, here: Here) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss, metrics = self._value_loss(batch, outputs, here, denominators)
            return self.section.value_coef * loss, metrics

        return term

    def after_update(self, step: Step, chosen: Sequence[Row]) -> None:
        """A separate critic's optimiser step over ``chosen``."""
        if self.critic is None:
            return
        denominators = Denominators.of(torch.tensor([row.sampled for row in chosen]))

        def loss(batch: Batch, outputs: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
            def here(x: Tensor) -> Tensor:
                return x[batch.row.cpu(), : batch.loss_mask.shape[1]].to(batch.loss_mask.device)

            return self._value_loss(batch, outputs, here, denominators)

        seen = self.critic.step(chosen, loss)
        own = {f"critic/{name}": seen[name] for name in ("grad_norm", "lr", "skipped_updates")}
        shared = {name: seen[name] for name in ("loss/value", "clipfrac_value")}
        self._seen.append({**own, **shared, "time/critic": seen["time/update"]})

    def finish(self, step: Step, tokens: Tensor) -> None:
        """The critic's updates of the warm-up, in the policy's minibatches; then what all updates saw."""
        if self._alone:
            for epoch in range(self.config.epochs):
                seed = derive(self.run.config.seed, "minibatches", step.number, epoch)
                for chosen in split(self._alone, self.config.minibatches, seed):
                    self.after_update(step, chosen)
        step.metrics |= over_updates(self._seen)
        self._alone, self._seen = [], []

    def _value_loss(
        self, batch: Batch, outputs: Outputs, here: Here, denominators: Denominators
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.value is not None
        values, mask, clip = outputs.value, batch.loss_mask, self.section.value_clip or None
        old, returns = here(self.values), here(self.returns)
        loss = value_loss(values, old, returns, mask, denominators=denominators, clip=clip)
        clipped = torch.zeros_like(values)
        if clip is not None:
            near = values.detach().clamp(old - clip, old + clip)
            clipped = ((near - returns) ** 2 > (values.detach() - returns) ** 2).to(values.dtype)
        share = aggregate(clipped, mask, "token-mean", denominators)
        return loss, {"loss/value": loss.detach(), "clipfrac_value": share}


def token_rewards(step: Step) -> Tensor:
    """Every turn's reward on its last sampled token; what shaping added, on the trajectory's last turn.

    A turn without a token gives its reward to the nearest token before it in its trajectory, that is the last
    of an earlier turn, or where there is none to the nearest behind it, the first of a later turn.

    Returns:
        ``[B, T-1]`` float64; a trajectory's sum is its reward in ``step.rewards``.
    """
    collection, units = step.collection, step.collection.units
    owner, count = units.trajectory, len(units.trajectory)
    last = torch.ones(count, dtype=torch.bool)
    last[:-1] = owner[1:] != owner[:-1]
    added = torch.where(collection.valid, step.rewards.double() - collection.rewards.double(), 0.0)
    rewards = units.rewards.double() + torch.where(last, added[owner], 0.0)

    spoken = torch.bincount(units.index[units.index >= 0], minlength=count) > 0
    unit = torch.arange(count)
    before = torch.where(spoken, unit, -1).cummax(0).values
    behind = torch.where(spoken, unit, count).flip(0).cummin(0).values.flip(0)
    backwards = (before >= 0) & (owner[before.clamp(min=0)] == owner)
    forwards = ~backwards & (behind < count) & (owner[behind.clamp(max=count - 1)] == owner)
    nothing = torch.zeros_like(rewards)
    at_end = nothing.index_add(0, before[backwards], rewards[backwards])
    at_start = nothing.index_add(0, behind[forwards], rewards[forwards])
    # The first token of a turn is the last one of the flipped rows.
    return at_last_token(at_end, units.index) + at_last_token(at_start, units.index.flip(0, 1)).flip(0, 1)


def _fit(values: Tensor, returns: Tensor) -> dict[str, float]:
    """How well values ``[K]`` foretold returns ``[K]``; no explained variance where returns do not vary."""
    if not len(values):
        return {}
    found = {"value/mean": float(values.mean()), "return/mean": float(returns.mean())}
    # Equal returns come back from the sums over time equal but for rounding.
    if float(returns.max() - returns.min()) > 1e-6 * float(returns.abs().max()):
        left = (returns - values).var(correction=0) / returns.var(correction=0)
        found["value/explained_variance"] = 1.0 - float(left)
    return found
