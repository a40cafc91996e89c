"""Behaviour cloning: maximum likelihood on an expert's actions.

The loss is the mean negative log-likelihood of the action tokens (Pomerleau 1991), the observation tokens
masked out. Cloning can stop early, at a success rate on the evaluation split, to leave reinforcement
learning something to do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from agentgym.errors import UsageError
from agentgym.policies import make_policy
from agentgym.policies.base import Policy, PolicyContext
from agentgym.seeding import derive
from agentgym.trainers.aggregation import Denominators, aggregate
from agentgym.trainers.batch import Batch, Row, rows, tokenize
from agentgym.trainers.collect import TaskOrder, collect, plan
from agentgym.trainers.config import OptimiserSection, TrainConfig
from agentgym.trainers.learner import Loss, Outputs
from agentgym.trainers.refusals import refuse_idle
from agentgym.trainers.run import Algorithm, Run
from agentgym.trajectory import Trajectory


class CloningConfig(TrainConfig):
    """Behaviour cloning's numbers."""

    algorithm: Literal["cloning"] = "cloning"
    demonstrations: int = Field(60, ge=1, description="expert episodes, one a task")
    batch_rows: int = Field(16, ge=1, description="rows in one optimiser step")
    stop_at_success: float | None = Field(
        None, ge=0, le=1, description="end as soon as an evaluation reaches this success rate"
    )
    optimiser: OptimiserSection = OptimiserSection(lr=3e-5)

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if not self.evaluation.every:
            because = "evaluation.every is 0: the run is never evaluated"
            refuse_idle(self, "stop_at_success", section="", because=because, hint="set evaluation.every")
        return self


async def train(config: CloningConfig, run: Run) -> None:
    """Clone the expert of the environment.

    Raises:
        UsageError: The expert wins no episode.
    """
    if run.extra.get("stopped"):
        return
    run.progress.phase(f"collecting {config.demonstrations} expert episodes")
    await fit(config, run, await demonstrations(config, run))


async def fit(config: CloningConfig, run: Run, examples: list[Row]) -> None:
    """Take the steps over ``examples``, and evaluate on the way."""
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
    started = time.perf_counter()
    trajectories = await play(config, run, expert)
    won = [t for t in trajectories if t.valid and t.success]
    if not won:
        raise UsageError(
            f"the expert won none of {len(trajectories)} episodes",
            hint="raise env.max_turns, or look at them with `agentgym eval … --policy expert`",
        )
    made = examples(config, run, won)
    run.progress.phase(
        f"{len(won)} of {len(trajectories)} expert episodes won, {len(made)} rows "
        f"in {time.perf_counter() - started:.0f} s"
    )
    return made


async def play(config: CloningConfig, run: Run, policy: Policy) -> list[Trajectory]:
    """The episodes of ``policy``, which is closed after them, on the first tasks of the training order."""
    engine = run.engine(policy)
    try:
        order = TaskOrder(run.tasks(), config.seed, config.env.tasks)
        episodes = plan(order, 0, 0, config.demonstrations, 1)
        return await collect(engine, episodes, run.restored, max_failure_rate=config.max_failure_rate)
    finally:
        await engine.aclose()
        await policy.aclose()


def examples(config: CloningConfig, run: Run, trajectories: Sequence[Trajectory]) -> list[Row]:
    """The rows of ``trajectories`` as the policy's own rollouts would have them; all actions in the loss."""
    renderer, stack = run.policy.renderer, config.env.stack()
    assert renderer is not None
    system = stack.system_message(config.rollout.system)
    layout, role = config.rollout.layout, stack.observation_role
    return rows([tokenize(t, renderer, system=system, layout=layout, role=role) for t in trajectories])


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

    def loss(batch: Batch, outputs: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        nll = aggregate(-outputs.log_probs, batch.loss_mask, "token-mean", denominators)
        return nll, {"nll": nll.detach()}

    return loss


CLONING = Algorithm(CloningConfig, train)
