"""The policy-gradient loop: collect, score, advantage, loss, update, publish.

Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, algorithm 1), with the switches that make
it Dr.GRPO (Liu et al. 2025), RLOO (Ahmadian et al. 2024), REINFORCE++ (Hu et al. 2025) or DAPO (Yu et al.
2025), and the methods that add to it: a section in the config switches each on. ``trainers/presets/`` has a
file of settings for every published algorithm.

Invariant: what a step samples, and in what order, depends on the config and the step alone, so a resumed run
goes on as the uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from agentgym.errors import ConfigError
from agentgym.rollout.engine import RolloutEngine
from agentgym.trainers import advantages as estimators
from agentgym.trainers.batch import Row
from agentgym.trainers.collect import Collection, TaskOrder, collect, environment_metrics, plan
from agentgym.trainers.config import TrainConfig
from agentgym.trainers.correction import CorrectionConfig
from agentgym.trainers.credit import at_first_token, at_last_token, broadcast, token_index
from agentgym.trainers.epo import EPO, EPOSection
from agentgym.trainers.filters import (
    FilterSection,
    filter_rows,
    group_metrics,
    keep_groups,
    refuse_groups_of_one,
)
from agentgym.trainers.gigpo import GiGPO, GiGPOSection
from agentgym.trainers.igpo import IGPO, IGPOSection
from agentgym.trainers.kl import kl_estimate
from agentgym.trainers.leave_one_out import loop
from agentgym.trainers.method import Method, Step, refuse_conflicts
from agentgym.trainers.policy_loss import PolicyLossConfig
from agentgym.trainers.ppo import PPO, PPOSection
from agentgym.trainers.refusals import refuse_idle
from agentgym.trainers.reward_shaping import OverlongSection, kl_penalised, soft_overlong_penalty
from agentgym.trainers.run import Algorithm, Run
from agentgym.trainers.spear import Spear, SpearSection
from agentgym.trainers.update import Reference, update
from agentgym.trajectory import Trajectory

METHODS: dict[str, type[Method]] = {"gigpo": GiGPO, "ppo": PPO, "igpo": IGPO, "spear": Spear, "epo": EPO}
Estimator = Literal["grpo", "dr_grpo", "rloo", "loop", "reinforce++", "reinforce++-baseline", "gae"]


_OF_GROUPS = {
    "grpo": estimators.grpo,
    "dr_grpo": estimators.dr_grpo,
    "rloo": estimators.rloo,
    "loop": loop,
}


class PolicyGradientConfig(TrainConfig):
    """The loop's numbers. Defaults are GRPO's, as its paper states them."""

    algorithm: Literal["policy-gradient"] = "policy-gradient"
    groups: int = Field(8, ge=1, description="tasks sampled a step")
    group_size: int = Field(8, ge=1, description="trajectories a task")
    estimator: Estimator = "grpo"
    epochs: int = Field(1, ge=1, description="passes over a collection")
    minibatches: int = Field(1, ge=1, description="optimiser steps a pass")
    loss: PolicyLossConfig = PolicyLossConfig()
    correction: CorrectionConfig = CorrectionConfig()
    kl_in_reward: float = Field(0.0, ge=0, description="coefficient of k1 in the reward")
    filter_groups: bool = Field(False, description="drop all-equal groups and sample others in their place")
    filter_rounds: int = Field(4, ge=1, description="rounds of sampling at most, with filter_groups")
    overlong: OverlongSection | None = None
    filters: FilterSection | None = None
    gigpo: GiGPOSection | None = None
    igpo: IGPOSection | None = None
    ppo: PPOSection | None = None
    spear: SpearSection | None = None
    epo: EPOSection | None = None

    @property
    def planned_updates(self) -> int:
        """Every pass over a collection makes ``minibatches`` updates; a critic's warm-up makes none."""
        still = min(self.steps, self.ppo.critic_warmup) if self.ppo is not None else 0
        return (self.steps - still) * self.epochs * self.minibatches

    @property
    def learner_heads(self) -> Literal["policy", "value", "both"]:
        """A critic that is shared is a head beside the policy's."""
        return "both" if self.ppo is not None and self.ppo.critic == "shared" else "policy"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kl_in_reward and self.estimator not in ("reinforce++", "gae"):
            raise ConfigError(
                f"kl_in_reward needs token rewards, and estimator {self.estimator!r} has one a trajectory",
                hint="use loss.kl_coef, or estimator='reinforce++' or 'gae'",
            )
        if self.estimator == "gae" and self.ppo is None:
            raise ConfigError(
                "estimator 'gae' takes its advantages from a critic, and there is none",
                hint="add [ppo]: agentgym train ppo has it",
            )
        if self.group_size == 1:
            refuse_groups_of_one(self.filters, all_equal_go=self.filter_groups)
        if self.loss.ratio == "trajectory" and self.rollout.layout == "turn":
            raise ConfigError(
                "loss.ratio 'trajectory' is that of a row, and rollout.layout 'turn' makes a row a turn",
                hint="set loss.ratio='turn', or rollout.layout='chat'",
            )
        if not self.filter_groups:
            because = "groups are replaced with filter_groups alone"
            refuse_idle(self, "filter_rounds", section="", because=because, hint="set filter_groups=true")
        if not self.loss.kl_coef and not self.kl_in_reward:
            because = "there is no reference to diverge from: loss.kl_coef is 0"
            refuse_idle(self.loss, "kl", section="loss", because=because, hint="set loss.kl_coef")
        refuse_conflicts(METHODS, self)
        return self


async def train(config: PolicyGradientConfig, run: Run) -> None:
    """The algorithm box."""
    methods = switched_on(config, run)
    reference = Reference(run) if config.loss.kl_coef or config.kl_in_reward else None
    order = TaskOrder(run.tasks(), config.seed, config.env.tasks)
    position = int(run.extra.get("position", 0))
    engine = run.engine()
    try:
        await run.publish()
        for number in range(run.first_step, config.steps):
            run.progress.phase("sampling")
            started = time.perf_counter()
            everything, kept, position = await sample(config, run, methods, engine, order, number, position)
            metrics = {"time/rollout": time.perf_counter() - started, **environment_metrics(everything)}

            run.progress.phase("updating")
            metrics |= learn(config, run, methods, Collection.of(kept), reference, number)
            await run.publish()
            if config.evaluation.every and (number + 1) % config.evaluation.every == 0:
                metrics |= await run.evaluate(number)
            await run.finish_step(
                number, metrics, {"position": position, "methods": {m.name: m.state() for m in methods}}
            )
    finally:
        await engine.aclose()


def switched_on(config: PolicyGradientConfig, run: Run) -> list[Method]:
    """The methods whose sections the config has, as a resumed run left them."""
    saved = run.extra.get("methods", {})
    made = [method(config, run) for name, method in METHODS.items() if getattr(config, name) is not None]
    for method in made:
        if method.name in saved:
            method.load(saved[method.name])
    return made


async def sample(
    config: PolicyGradientConfig,
    run: Run,
    methods: Sequence[Method],
    engine: RolloutEngine,
    order: TaskOrder,
    number: int,
    position: int,
) -> tuple[list[Trajectory], list[Trajectory], int]:
    """What a step sampled, what of it is trained on, and the next position in the task order.

    With ``filter_groups`` (DAPO's dynamic sampling) groups that teach nothing are replaced by further ones,
    in ``filter_rounds`` rounds at most; a step may be left with fewer groups, or none.
    """
    everything: list[Trajectory] = []
    kept: list[Trajectory] = []
    groups = 0
    for _ in range(config.filter_rounds if config.filter_groups else 1):
        wanted = config.groups - groups
        episodes = plan(order, number, position, wanted, config.group_size)
        position += wanted
        ended = await collect(engine, episodes, run.restored, max_failure_rate=config.max_failure_rate)
        everything += ended
        if config.filter_groups:
            collection = Collection.of(ended)
            rewards = shaped(config, methods, number, collection)
            useful = estimators.informative(rewards, collection.groups, collection.valid)
            teaching = set(collection.groups[useful].tolist())
            ended = [t for t in ended if t.group in teaching]
        kept += ended
        groups = len({t.group for t in kept})
        if groups == config.groups:
            break
    return everything, kept, position


def shaped(
    config: PolicyGradientConfig, methods: Sequence[Method], number: int, collection: Collection
) -> Tensor:
    """Score: the environment's reward, less the overlong penalty, and what methods add; ``[N]``."""
    rewards = collection.rewards
    if config.overlong is not None:
        rewards = rewards + soft_overlong_penalty(
            collection.sampled, max_length=config.overlong.max_length, cache=config.overlong.cache
        )
    for method in methods:
        rewards = method.shape(number, collection, rewards)
    return rewards


def learn(
    config: PolicyGradientConfig,
    run: Run,
    methods: Sequence[Method],
    collection: Collection,
    reference: Reference | None,
    number: int,
) -> dict[str, float]:
    """Advantage, loss, update: what one collection teaches; the step's metrics."""
    rewards = shaped(config, methods, number, collection)
    metrics = estimators.reward_metrics(rewards, collection.groups, collection.valid)
    metrics["updates_per_step"] = 0.0
    if collection.whole is None:
        return metrics
    step = Step(number, collection, collection.whole, rewards, list(collection.rows), metrics=metrics)
    # With one optimiser step the policy that is optimised is the one that sampled: no second pass is needed.
    on_policy = config.epochs * config.minibatches == 1
    if not on_policy or config.kl_in_reward or any(m.needs_old for m in methods):
        step.old = run.learner.score(collection.rows)
    if config.filters is not None:
        step.rows = filtered(config.filters, config.rollout.max_tokens, step)
    step.ref = reference.score(collection.rows) if reference is not None else None
    if config.kl_in_reward and step.old is not None and step.ref is not None:
        step.divergence = kl_estimate(step.old, step.ref, "k1")

    own, base = advantages(config, step)
    tokens = base
    for method in methods:
        tokens = method.advantages(step, tokens)
    if tokens is not base:
        own = at_first_token(tokens, step.whole.loss_mask, step.whole.trajectory, len(own))
    for trajectory, value in zip(collection.trajectories, own.tolist(), strict=True):
        if trajectory.valid:
            run.journal.train(number, trajectory.id, {"advantage": value})
    metrics |= estimators.advantage_metrics(tokens[step.whole.loss_mask])
    for method in methods:
        method.before(step, tokens)
    if step.rows:
        update(
            run, methods, step, tokens, loss=config.loss, correction=config.correction,
            epochs=config.epochs, minibatches=config.minibatches,
        )  # fmt: skip
    for method in methods:
        method.finish(step, tokens)
    return metrics


def filtered(section: FilterSection, max_tokens: int, step: Step) -> list[Row]:
    """The rows that no filter takes out; the counts go to the step's metrics."""
    collection = step.collection
    judged = filter_rows(step.rows, collection.trajectories, section, max_tokens=max_tokens)
    kept = keep_groups(step.rewards, collection.groups, collection.valid, section.groups)
    step.metrics |= judged.metrics | group_metrics(kept, collection.groups)
    return [
        row
        for row, out in zip(step.rows, judged.out.tolist(), strict=True)
        if not out and bool(kept[row.trajectory])
    ]


def advantages(config: PolicyGradientConfig, step: Step) -> tuple[Tensor, Tensor]:
    """Advantages of trajectories ``[N]`` (the first token's, where tokens differ) and tokens ``[B, T-1]``."""
    collection, whole = step.collection, step.whole
    rewards, groups, valid = step.rewards, collection.groups, collection.valid
    index = token_index(whole.trajectory, whole.loss_mask)
    if config.estimator == "gae":  # the critic's, which its method takes
        return rewards.new_zeros(rewards.shape), broadcast(rewards.new_zeros(rewards.shape), index)
    if config.estimator == "reinforce++":
        token_rewards = at_last_token(rewards, index)
        if step.divergence is not None:
            token_rewards = kl_penalised(token_rewards, step.divergence, whole.loss_mask, config.kl_in_reward)
        tokens = estimators.reinforce_plus_plus(token_rewards, whole.loss_mask, whole.trajectory)
        return at_first_token(tokens, whole.loss_mask, whole.trajectory, len(rewards)), tokens
    if config.estimator == "reinforce++-baseline":
        own = estimators.reinforce_plus_plus_baseline(rewards, groups, collection.sampled, valid)
    else:
        own = _OF_GROUPS[config.estimator](rewards, groups, valid)
    return own, broadcast(own, index)


POLICY_GRADIENT = Algorithm(PolicyGradientConfig, train)
