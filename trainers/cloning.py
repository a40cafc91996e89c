"""Behaviour cloning: maximum likelihood on an expert's actions.

The loss is the mean negative log-likelihood of the action tokens (Pomerleau 1991), the observation tokens
masked out. Cloning can stop early, at a success rate on the evaluation split, to leave reinforcement
learning something to do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from agentgym.errors import UsageError
from agentgym.policies import make_policy
from agentgym.policies.base import PolicyContext
from agentgym.seeding import derive
from agentgym.trainers.aggregation import Denominators, aggregate
from agentgym.trainers.batch import Batch, Row, rows, tokenize
from agentgym.trainers.collect import TaskOrder, collect, plan
from agentgym.trainers.config import OptimiserSection, TrainConfig
from agentgym.trainers.learner import Loss
from agentgym.trainers.run import Algorithm, Run


class CloningConfig(TrainConfig):
    """Behaviour cloning's numbers."""

    algorithm: Literal["cloning"] = "cloning"
    demonstrations: int = Field(60, ge=1, description="expert episodes, one a task")
    batch_rows: int = Field(16, ge=1, description="rows in one optimiser step")
    stop_at_success: float | None = Field(
        None, ge=0, le=1, description="end as soon as an evaluation reaches this success rate"
    )
    optimiser: OptimiserSection = OptimiserSection(lr=3e-5)


async def train(config: CloningConfig, run: Run) -> None:
    """Clone the expert of the environment.

    Raises:
        UsageError: The expert wins no episode.
    """
    if run.extra.get("stopped"):
        return
    run.progress.phase(f"collecting {config.demonstrations} expert episodes")
    examples = await demonstrations(config, run)
    order_seed = derive(config.seed, "cloning")
    for step in range(run.first_step, config.steps):
        run.progress.phase("cloning")
        batch = _draw(examples, config.batch_rows, step, order_seed)
        lengths = [row.sampled for row in batch]
        metrics = run.learner.step(batch, _likelihood(lengths))
        reached = False
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0:
            await run.publish()
            metrics |= await run.evaluate(step)
            goal = config.stop_at_success
            reached = goal is not None and metrics["eval/success"] >= goal
        await run.finish_step(step, metrics, {"stopped": reached}, last=reached)
        if reached:
            break


async def demonstrations(config: CloningConfig, run: Run) -> list[Row]:
    """Rows of the expert's winning episodes on the first tasks of the training order."""
    stack = config.env.stack()
    answers = {"parser": stack.parser, "parser_options": dict(stack.parser_options)}
    expert = make_policy("expert", PolicyContext(stack.id, dict(stack.kwargs), answers))
    engine = run.engine(expert)
    started = time.perf_counter()
    try:
        order = TaskOrder(run.tasks(), config.seed, config.env.tasks)
        episodes = plan(order, 0, 0, config.demonstrations, 1)
        trajectories = await collect(engine, episodes, run.restored, max_failure_rate=config.max_failure_rate)
    finally:
        await engine.aclose()
        await expert.aclose()
    won = [t for t in trajectories if t.valid and t.success]
    if not won:
        raise UsageError(
            f"the expert won none of {len(trajectories)} episodes",
            hint="raise env.max_turns, or look at them with `agentgym eval … --policy expert`",
        )
    renderer = run.policy.renderer
    assert renderer is not None
    layout, role = config.rollout.layout, stack.observation_role
    examples = rows([tokenize(t, renderer, system=engine.system, layout=layout, role=role) for t in won])
    run.progress.phase(
        f"{len(won)} of {len(trajectories)} expert episodes won, {len(examples)} rows "
        f"in {time.perf_counter() - started:.0f} s"
    )
    return examples


def _draw(examples: list[Row], count: int, step: int, seed: int) -> list[Row]:
    """The rows of a step: seeded permutations of all examples, one after the other."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(examples))
        order = np.random.default_rng(derive(seed, epoch)).permutation(len(examples))
        chosen.append(examples[int(order[index])])
    return chosen


def _likelihood(lengths: list[int]) -> Loss:
    denominators = Denominators.of(torch.tensor(lengths))

    def loss(batch: Batch, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        nll = aggregate(-logp, batch.loss_mask, "token-mean", denominators)
        return nll, {"nll": nll.detach()}

    return loss


CLONING = Algorithm(CloningConfig, train)
