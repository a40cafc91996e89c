"""What an environment says of itself, played as a policy: its own solutions, and doing nothing.

Invariants: the plan is asked of a private instance of the environment, never of one that an episode runs
in; the event loop never waits for it; each task is asked once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import gymnasium

from agentgym.actions import Parser, PlainParser
from agentgym.env import Env
from agentgym.errors import UsageError
from agentgym.policies.base import Completion, Policy, PolicyContext, Request, TurnView
from agentgym.policies.simple import draw
from agentgym.registry import base, make
from agentgym.task import Task


class ExpertPolicy(Policy):
    """Plays ``env.expert(task)``.

    Past the plan's end its last action is repeated: give the environment a limit of turns.

    With noise the plan goes on where it stopped: its next action is the first one that the actions taken so
    far do not hold in order. A noisy action that moves the world may thus break the plan, and the episode
    fails: that is the point of mixed data.

    Args:
        context: The environment's id and arguments.
        parser: The format to answer in.
        epsilon: Chance of a random admissible action in the plan's place, on turns that list any; 0 to 1.

    Raises:
        UsageError: The context names no environment, or ``epsilon`` is out of range.
    """

    name = "expert"

    def __init__(self, context: PolicyContext, parser: Parser | None = None, epsilon: float = 0.0) -> None:
        if context.env_id is None:
            raise UsageError(
                "the expert policy asks the environment, and none is named",
                hint='give PolicyContext(env_id="…")',
            )
        if not 0 <= epsilon <= 1:
            raise UsageError(f"epsilon is {epsilon}", hint="give a probability from 0 to 1")
        self._env_id, self._env_kwargs = context.env_id, context.env_kwargs
        self._parser, self._epsilon = parser or PlainParser(), epsilon
        self._plans: dict[str, Sequence[str]] = {}
        self._env: gymnasium.Env[Any, Any] | None = None
        # One thread owns the private instance: plans are made one after the other.
        self._thread: ThreadPoolExecutor | None = None

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The plan's action of each turn.

        Raises:
            UsageError: A task has no known solution.
            UnknownName: The environment has no such task.
        """
        for task_id in dict.fromkeys(request.turn.task_id for request in requests):
            if task_id not in self._plans:
                await self._in_thread(self._solve, task_id)
        actions = [self._action(request) for request in requests]
        # No parser's format carries an empty action.
        return [Completion(self._parser.format(action) if action else "") for action in actions]

    async def aclose(self) -> None:
        """Close the private instance."""
        if self._thread is not None:
            await self._in_thread(self._close)
            self._thread.shutdown()
            self._thread = None

    def _action(self, request: Request) -> str:
        turn, plan = request.turn, self._plans[request.turn.task_id]
        if self._epsilon and turn.admissible_actions:
            random = Random(request.seed)
            if random.random() < self._epsilon:
                return draw(random, turn.admissible_actions)
        played = _played(plan, turn) if self._epsilon else turn.turn
        return plan[min(played, len(plan) - 1)]

    async def _in_thread(self, function: Any, *args: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "agentgym-expert")
        await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _solve(self, task_id: str) -> None:
        if task_id in self._plans:  # another episode of the group asked meanwhile
            return
        if self._env is None:
            self._env = make(self._env_id, **self._env_kwargs)
        env = base(self._env)
        self._plans[task_id] = tuple(self._plan(env, env.find_task(task_id)))

    def _plan(self, env: Env[Any], task: Task) -> Sequence[str]:
        if plan := env.expert(task):
            return plan
        raise UsageError(
            f"no solution of the task {task.id!r} of {self._env_id} is known",
            hint="use another policy: random, human, or a model",
        )

    def _close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()


class OraclePolicy(ExpertPolicy):
    """The expert under the name that benchmarks of code give it."""

    name = "oracle"


class NopPolicy(ExpertPolicy):
    """Plays ``env.nop(task)``: what doing nothing earns, the floor under every other figure.

    Args:
        context: The environment's id and arguments.
        parser: The format to answer in; an empty action is an empty completion in any.

    Raises:
        UsageError: The context names no environment.
    """

    name = "nop"

    def __init__(self, context: PolicyContext, parser: Parser | None = None) -> None:
        super().__init__(context, parser)

    def _plan(self, env: Env[Any], task: Task) -> Sequence[str]:
        return env.nop(task)


def _played(plan: Sequence[str], turn: TurnView) -> int:
    position = 0
    for action in turn.history:
        if position < len(plan) and action == plan[position]:
            position += 1
    return position
