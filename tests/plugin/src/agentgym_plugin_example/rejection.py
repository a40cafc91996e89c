"""Rejection sampling: act, keep the episodes that earned enough, and raise their likelihood.

The simplest algorithm that learns from its own episodes (Dong et al. 2023, RAFT; Zelikman et al. 2022, STaR).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from agentgym.trainers.aggregation import Denominators, aggregate
from agentgym.trainers.batch import Batch, Row
from agentgym.trainers.collect import Collection, TaskOrder, collect, environment_metrics, plan
from agentgym.trainers.config import TrainConfig
from agentgym.trainers.learner import Loss, Outputs
from agentgym.trainers.run import Algorithm, Run


class RejectionConfig(TrainConfig):
    """The numbers of rejection sampling."""

    algorithm: Literal["rejection"] = "rejection"
    groups: int = Field(8, ge=1, description="tasks sampled a step")
    group_size: int = Field(4, ge=1, description="trajectories a task")
    least_reward: float = Field(1.0, description="what a trajectory must earn to be learned from")


async def train(config: RejectionConfig, run: Run) -> None:
    """Collect, keep, update, publish."""
    order = TaskOrder(run.tasks(), config.seed, config.env.tasks)
    engine = run.engine()
    await run.publish()
    try:
        for step in range(run.first_step, config.steps):
            run.progress.phase("sampling")
            episodes = plan(order, step, step * config.groups, config.groups, config.group_size)
            ended = await collect(engine, episodes, run.restored, max_failure_rate=config.max_failure_rate)

            run.progress.phase("updating")
            collection = Collection.of(ended)
            enough = collection.rewards >= config.least_reward
            kept = [row for row in collection.rows if enough[row.trajectory]]
            metrics = environment_metrics(ended) | {"rows_kept": float(len(kept))}
            if kept:
                metrics |= run.learner.step(kept, likelihood(kept))
                await run.publish()
            await run.finish_step(step, metrics, {})
    finally:
        await engine.aclose()


def likelihood(kept: list[Row]) -> Loss:
    """Mean negative log-likelihood of the sampled tokens."""
    denominators = Denominators.of(torch.tensor([row.sampled for row in kept]))

    def loss(batch: Batch, outputs: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        value = aggregate(-outputs.log_probs, batch.loss_mask, "token-mean", denominators)
        return value, {"nll": value.detach()}

    return loss


REJECTION = Algorithm(RejectionConfig, train)
