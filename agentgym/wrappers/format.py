"""Completions in, actions through: the wrapper that holds the action parser.

Invariant: a completion that cannot be read never reaches the wrapped environment, and costs a turn: it is
answered with what was wrong and how to answer, ``valid_action`` is false, and the penalty, if any, is taken
from that turn alone.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium

from agentgym.actions import Malformed, Parser, make_parser
from agentgym.env import Transition
from agentgym.errors import UsageError
from agentgym.wrappers.base import TextWrapper, with_text

# What stays true of a state that did not change. The rest of a step's info tells of that step.
_LASTING = ("task_id", "score", "success", "admissible_actions")


class ActionFormat(TextWrapper):
    """Takes completions and gives the wrapped environment the actions in them.

    On every step ``info`` holds ``action`` (what reached the environment; empty for a malformed completion)
    and ``thought``. A malformed completion's ``info`` also holds ``format_error``; ``score``, ``success``
    and ``admissible_actions`` are those of the step before. The penalty lowers the turn's reward, not the
    environment's ``score``; an action that the environment itself calls invalid costs nothing here.

    Args:
        env: What to wrap.
        parser: A parser, or the name of one.
        penalty: Subtracted from the reward of a malformed turn.

    Raises:
        UnknownName: No such parser.
        UsageError: The penalty is negative or not finite.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], parser: Parser | str = "plain", penalty: float = 0.0
    ) -> None:
        if not (math.isfinite(penalty) and penalty >= 0):
            raise UsageError(
                f"the penalty of a malformed action is {penalty!r}",
                hint="give a number from 0 up; it is subtracted",
            )
        super().__init__(env, parser=parser, penalty=penalty)
        self.parser = make_parser(parser) if isinstance(parser, str) else parser
        self.penalty = penalty
        self._thought: str | None = None
        self._action = ""
        self._last: Any = None
        self._lasting: dict[str, Any] = {}

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Remember what a malformed first turn is answered from."""
        self._remember(observation, info)
        return observation, info

    def before(self, action: str) -> str | Transition:
        """The action in a completion, or the answer to a malformed one."""
        if not isinstance(action, str):
            raise UsageError(
                f"a completion is a str, not {type(action).__name__}", hint="pass the completion's text"
            )
        parsed = self.parser.parse(action)
        if isinstance(parsed, Malformed):
            return self._refuse(parsed)
        self._action, self._thought = parsed.action, parsed.thought
        return parsed.action

    def after(self, action: str, result: Transition) -> Transition:
        """Add the action and the thought to ``info``."""
        self._remember(result.observation, result.info)
        info = {**result.info, "action": self._action, "thought": self._thought}
        return result._replace(info=info)

    def _remember(self, observation: Any, info: Any) -> None:
        self._last = observation
        self._lasting = {key: info[key] for key in _LASTING if key in info}

    def _refuse(self, malformed: Malformed) -> Transition:
        text = f"Your answer could not be read. {malformed.message}\n{self.parser.instructions()}"
        info = {
            "score": 0.0,
            "success": False,
            **self._lasting,
            "valid_action": False,
            "action": "",
            "thought": None,
            "format_error": malformed.message,
        }
        return Transition(with_text(self._last, text), -self.penalty if self.penalty else 0.0, info=info)
