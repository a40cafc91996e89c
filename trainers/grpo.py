"""GRPO and its nearest relatives: collect, score, advantage, loss, update, publish.

Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, algorithm 1), with the switches that make
it Dr.GRPO (Liu et al. 2025), RLOO (Ahmadian et al. 2024), REINFORCE++ (Hu et al. 2025) or DAPO (Yu et al.
2025); ``trainers/presets/`` has a file of settings for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from agentgym.config import Config
from agentgym.errors import ConfigError
from agentgym.policies import models
from agentgym.rollout.engine import RolloutEngine
from agentgym.seeding import derive
from agentgym.trainers import advantages as estimators
from agentgym.trainers.aggregation import Denominators
from agentgym.trainers.batch import Batch, Row
from agentgym.trainers.collect import Collection, TaskOrder, collect, environment_metrics, plan
from agentgym.trainers.config import TrainConfig
from agentgym.trainers.correction import CorrectionConfig, correction_weights, mismatch_metrics
from agentgym.trainers.credit import at_last_token, broadcast, token_index
from agentgym.trainers.kl import kl_estimate
from agentgym.trainers.learner import Learner, Loss
from agentgym.trainers.policy_loss import PolicyLossConfig, combine_metrics, policy_loss
from agentgym.trainers.reward_shaping import kl_penalised, soft_overlong_penalty
from agentgym.trainers.run import Algorithm, Run
from agentgym.trajectory import Trajectory

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"]
_SEEN_MEANS = {"approx_kl", "kl_ref", "ratio_mean", "weight_mean"}


class OverlongSection(Config):
    """DAPO's soft overlong punishment, on a trajectory's sampled tokens."""

    max_length: int = Field(ge=1)
    cache: int = Field(ge=1)


class GRPOConfig(TrainConfig):
    """GRPO's numbers. Defaults are the paper's where it states them."""

    algorithm: Literal["grpo"] = "grpo"
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

    @property
    def planned_updates(self) -> int:
        """Every pass over a collection makes ``minibatches`` updates."""
        return self.steps * self.epochs * self.minibatches


async def train(config: GRPOConfig, run: Run) -> None:
    """The algorithm box."""
    if config.kl_in_reward and config.estimator != "reinforce++":
        raise ConfigError(
            f"kl_in_reward needs token rewards, and estimator {config.estimator!r} has one a trajectory",
            hint="use loss.kl_coef, or estimator='reinforce++'",
        )
    reference = Reference(run) if config.loss.kl_coef or config.kl_in_reward else None
    order = TaskOrder(run.tasks(), config.seed, config.env.tasks)
    position = int(run.extra.get("position", 0))
    engine = run.engine()
    try:
        await run.publish()
        for step in range(run.first_step, config.steps):
            run.progress.phase("sampling")
            started = time.perf_counter()
            everything, kept, position = await sample(config, run, engine, order, step, position)
            metrics = {"time/rollout": time.perf_counter() - started, **environment_metrics(everything)}

            run.progress.phase("updating")
            metrics |= update(config, run, Collection.of(kept), reference, step)
            await run.publish()
            if config.evaluation.every and (step + 1) % config.evaluation.every == 0:
                metrics |= await run.evaluate(step)
            await run.finish_step(step, metrics, {"position": position})
    finally:
        await engine.aclose()


async def sample(
    config: GRPOConfig,
    run: Run,
    engine: RolloutEngine,
    order: TaskOrder,
    step: int,
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
        episodes = plan(order, step, position, wanted, config.group_size)
        position += wanted
        ended = await collect(engine, episodes, run.restored, max_failure_rate=config.max_failure_rate)
        everything += ended
        if config.filter_groups:
            collection = Collection.of(ended)
            useful = estimators.informative(shaped(config, collection), collection.groups, collection.valid)
            teaching = set(collection.groups[useful].tolist())
            ended = [t for t in ended if t.group in teaching]
        kept += ended
        groups = len({t.group for t in kept})
        if groups == config.groups:
            break
    return everything, kept, position


def shaped(config: GRPOConfig, collection: Collection) -> Tensor:
    """Score: the environment's reward, less the overlong penalty; ``[N]``."""
    if config.overlong is None:
        return collection.rewards
    penalty = soft_overlong_penalty(
        collection.sampled, max_length=config.overlong.max_length, cache=config.overlong.cache
    )
    return collection.rewards + penalty


def advantages(
    config: GRPOConfig, collection: Collection, whole: Batch, divergence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advantages of trajectories ``[N]`` (the first token's, where tokens differ) and tokens ``[B, T-1]``."""
    rewards, groups, valid = shaped(config, collection), collection.groups, collection.valid
    index = token_index(whole.trajectory, whole.loss_mask)
    if config.estimator == "reinforce++":
        token_rewards = at_last_token(rewards, index)
        if divergence is not None:
            token_rewards = kl_penalised(token_rewards, divergence, whole.loss_mask, config.kl_in_reward)
        tokens = estimators.reinforce_plus_plus(token_rewards, whole.loss_mask, whole.trajectory)
        first = whole.loss_mask.float().argmax(1)
        own = torch.zeros_like(rewards)
        own[whole.trajectory.flip(0)] = tokens.gather(1, first[:, None])[:, 0].flip(0)
        return own, tokens
    if config.estimator == "reinforce++-baseline":
        own = estimators.reinforce_plus_plus_baseline(rewards, groups, collection.sampled, valid)
    else:
        estimator = {"grpo": estimators.grpo, "dr_grpo": estimators.dr_grpo, "rloo": estimators.rloo}
        own = estimator[config.estimator](rewards, groups, valid)
    return own, broadcast(own, index)


def update(
    config: GRPOConfig, run: Run, collection: Collection, reference: Reference | None, step: int
) -> dict[str, float]:
    """Advantage, loss, update: the optimiser steps of one collection."""
    metrics = estimators.reward_metrics(shaped(config, collection), collection.groups, collection.valid)
    whole = collection.whole
    metrics["updates_per_step"] = 0.0
    if whole is None:
        return metrics
    # With one optimiser step the policy that is optimised is the one that sampled: no second pass is needed.
    on_policy = config.epochs * config.minibatches == 1
    needs_old = not on_policy or config.kl_in_reward > 0
    old = run.learner.score(collection.rows) if needs_old else None
    ref = reference.score(collection.rows) if reference is not None else None
    divergence = (
        kl_estimate(old, ref, "k1") if config.kl_in_reward and old is not None and ref is not None else None
    )
    own, tokens = advantages(config, collection, whole, divergence)
    for trajectory, value in zip(collection.trajectories, own.tolist(), strict=True):
        if trajectory.valid:
            run.journal.train(step, trajectory.id, {"advantage": value})
    metrics |= _spread("adv", tokens[whole.loss_mask])

    updates: list[dict[str, float]] = []
    skipped = 0
    for epoch in range(config.epochs):
        for chosen in _minibatches(collection, config, step, epoch):
            loss, seen = make_loss(config, chosen, tokens, old, ref)
            # A row whose advantages are all 0 has no gradient unless a penalty acts on it: it is counted in
            # the denominators and not computed.
            acts = bool(config.loss.kl_coef or config.loss.entropy_coef)
            live = [row for row in chosen if acts or bool(tokens[row.index].any())]
            skipped += len(chosen) - len(live)
            if not live:
                continue
            result = run.learner.step(live, loss, with_entropy=bool(config.loss.entropy_coef))
            updates.append(result | seen())
    metrics["updates_per_step"] = float(len(updates))
    metrics["rows_skipped"] = skipped / config.epochs
    for name in updates[0] if updates else ():
        values = [u[name] for u in updates if name in u]
        metrics[name] = sum(values) if name == "time/update" else sum(values) / len(values)
    return metrics


def make_loss(
    config: GRPOConfig,
    chosen: Sequence[Row],
    tokens: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
) -> tuple[Loss, Callable[[], dict[str, float]]]:
    """The loss of one optimiser step over the rows ``chosen``, and a function that tells what it saw.

    Args:
        config: Clipping, aggregation, KL, correction.
        chosen: Rows of this optimiser step; the denominators count all of them.
        tokens: ``[B, T-1]`` advantages.
        old: ``[B, T-1]`` log-probs before the update; ``None``: the present ones (on-policy).
        ref: ``[B, T-1]`` log-probs of the reference.
    """
    lengths = torch.tensor([row.sampled for row in chosen])
    denominators = Denominators.of(lengths, length_norm=config.loss.length_norm)
    shares: list[Mapping[str, Tensor]] = []
    pairs: list[tuple[Tensor, Tensor]] = []

    def loss(batch: Batch, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        mask, width = batch.loss_mask, batch.loss_mask.shape[1]

        def here(x: Tensor) -> Tensor:
            return x[batch.row.cpu(), :width].to(logp.device)

        logp_old = logp.detach() if old is None else here(old)
        value, metrics = policy_loss(
            logp,
            logp_old,
            here(tokens),
            mask,
            config=config.loss,
            denominators=denominators,
            weights=correction_weights(logp_old, batch.logp_rollout, mask, config.correction),
            logp_ref=None if ref is None else here(ref),
            entropy=entropy,
        )
        shares.append(metrics)
        pairs.append((logp_old[mask], batch.logp_rollout[mask]))
        return value, {}

    def seen() -> dict[str, float]:
        trainer, engine = (torch.cat(side) for side in zip(*pairs, strict=True))
        everything = torch.ones_like(trainer, dtype=torch.bool)
        metrics = combine_metrics(shares)
        # Rows that were not computed are in the denominators, but no mean over tokens has seen them.
        for name in _SEEN_MEANS & metrics.keys():
            metrics[name] *= denominators.tokens / len(trainer)
        return metrics | mismatch_metrics(trainer, engine, everything)

    return loss, seen


class Reference:
    """The frozen policy that the KL penalty holds to: the weights that the run started from."""

    def __init__(self, run: Run) -> None:
        section = run.config.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
        model, _ = models.load(run.config.model.name, dtype=torch.float32)
        self._learner = Learner(model, section, run.config.optimiser, temperature=run.learner.temperature)

    def score(self, rows: Sequence[Row]) -> Tensor:
        """``[B, T-1]`` log-probs of the targets."""
        return self._learner.score(rows)


def _minibatches(collection: Collection, config: GRPOConfig, step: int, epoch: int) -> list[list[Row]]:
    """Rows of each optimiser step of a pass; a trajectory's rows stay together."""
    owners = sorted({row.trajectory for row in collection.rows})
    generator = torch.Generator().manual_seed(derive(config.seed, "minibatches", step, epoch))
    order = torch.randperm(len(owners), generator=generator).tolist()
    part = {owners[o]: i * config.minibatches // len(order) for i, o in enumerate(order)}
    parts: list[list[Row]] = [[] for _ in range(config.minibatches)]
    for row in collection.rows:
        parts[part[row.trajectory]].append(row)
    return [chosen for chosen in parts if chosen]


def _spread(name: str, values: Tensor) -> dict[str, float]:
    if not values.numel():
        return {}
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/std": float(values.std()) if values.numel() > 1 else 0.0,
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


GRPO = Algorithm(GRPOConfig, train)
