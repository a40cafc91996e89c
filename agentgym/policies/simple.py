"""Policies that need no model: random and scripted.

Invariant: none keeps state of an episode; what a policy answers depends on its arguments and the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from agentgym import spaces
from agentgym.actions import Parser, PlainParser
from agentgym.errors import UsageError
from agentgym.policies.base import Completion, Policy, Request, TurnView

Script = Sequence[str] | Mapping[str, Sequence[str]] | Callable[[TurnView], str]


class RandomPolicy(Policy):
    """Draws uniformly from the admissible actions, by the request's own seed.

    Where the environment lists none it draws from the action space itself, which is text: a string of up
    to 64 printable characters, given as it is. So every environment has a random baseline; without a list
    it measures what noise earns.

    Args:
        parser: The format to answer in.
    """

    name = "random"

    def __init__(self, parser: Parser | None = None) -> None:
        self._parser = parser or PlainParser()

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One drawn action a request."""
        return [Completion(self._answer(request)) for request in requests]

    def _answer(self, request: Request) -> str:
        if actions := request.turn.admissible_actions:
            return self._parser.format(draw(Random(request.seed), actions))
        return spaces.Text(seed=request.seed).sample()


class ScriptedPolicy(Policy):
    """Plays a script: a list of actions, a list for each task id, or a function of the turn.

    Past the end of a list its last action is repeated: give the environment a limit of turns.

    Args:
        script: What to play.
        parser: The format to answer in; by default what the script says is the whole completion.

    Raises:
        UsageError: A list is empty, or a string was given for a list.
    """

    name = "scripted"

    def __init__(self, script: Script, parser: Parser | None = None) -> None:
        for actions in () if callable(script) else _lists(script):
            if isinstance(actions, str) or not actions:
                raise UsageError(
                    f"the script {actions!r} is no list of actions",
                    hint='write one or more: ["look", "go east"]',
                )
        self._script, self._parser = script, parser or PlainParser()

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The script's action of each turn.

        Raises:
            UsageError: The script has no list for a task.
        """
        return [Completion(self._parser.format(self._action(request.turn))) for request in requests]

    def _action(self, turn: TurnView) -> str:
        script = self._script
        if callable(script):
            return script(turn)
        if isinstance(script, Mapping):
            if turn.task_id not in script:
                raise UsageError(
                    f"the script has no actions for the task {turn.task_id!r}", hint="add a list under its id"
                )
            script = script[turn.task_id]
        return script[min(turn.turn, len(script) - 1)]


def draw(random: Random, actions: Sequence[str]) -> str:
    """One of ``actions``, uniformly. ``Random.random`` is the one stream that Python promises to keep."""
    return actions[int(random.random() * len(actions))]


def _lists(script: Sequence[str] | Mapping[str, Sequence[str]]) -> Sequence[Sequence[str]]:
    return list(script.values()) if isinstance(script, Mapping) else [script]
