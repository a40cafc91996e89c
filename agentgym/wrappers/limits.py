"""Limits that end an episode. Invariant: a limit truncates; it changes no reward and no verdict."""

from __future__ import annotations

from typing import Any

import gymnasium

from agentgym.env import Transition
from agentgym.errors import UsageError
from agentgym.wrappers.base import TextWrapper


class TimeLimit(TextWrapper):
    """Truncates an episode after ``max_turns`` turns, malformed ones included.

    The last turn's ``info`` has ``truncated_by = "turns"``. An episode that the environment itself ends on
    that turn ended by itself.

    Args:
        env: What to wrap.
        max_turns: From 1.

    Raises:
        UsageError: ``max_turns`` is below 1.
    """

    changes_text = False

    def __init__(self, env: gymnasium.Env[Any, Any], max_turns: int) -> None:
        if max_turns < 1:
            raise UsageError(f"an episode of {max_turns} turns", hint="give 1 or more")
        super().__init__(env, max_turns=max_turns)
        self.max_turns = max_turns
        self._turns = 0

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Count from the start."""
        self._turns = 0
        return observation, info

    def after(self, action: str, result: Transition) -> Transition:
        """Count, and truncate."""
        self._turns += 1
        if self._turns < self.max_turns or result.terminated or result.truncated:
            return result
        return result._replace(truncated=True, info={**result.info, "truncated_by": "turns"})
