"""Wrappers that change what a policy reads, and how its answer is read.

Invariant: each does one thing and keeps the contract; a turn that a wrapper answers itself counts as a turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from agentgym.actions import ParseError, make_parser
from agentgym.errors import UsageError
from agentgym.wrappers.base import Step, TextWrapper, text_of, with_text


class ActionFormat(TextWrapper, RecordConstructorArgs):
    """Reads the action out of a completion.

    A completion that does not parse never reaches the inner environment: the observation says what was
    wrong and repeats the last one, ``valid_action`` is false, and the reward is ``-penalty``. ``info`` gets ``action`` and, where
    there was one, ``thought``.

    Args:
        env: The environment.
        parser: Name of an action parser.
        penalty: Taken off the reward of a turn whose completion does not parse, or whose action the
            environment did not understand; once a turn.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], parser: str = "plain", penalty: float = 0.0) -> None:
        RecordConstructorArgs.__init__(self, parser=parser, penalty=penalty)
        super().__init__(env)
        self._parser, self._penalty = make_parser(parser), penalty
        self._info: dict[str, Any] = {}
        self._observation: Any = ""

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Remember what a malformed answer leaves unchanged."""
        self._observation, self._info = observation, info
        return observation, info

    def before(self, action: str) -> str | Step:
        """Parse; a refusal ends the turn here."""
        try:
            self._parsed = self._parser.parse(action)
        except ParseError as error:
            info = {
                "score": 0.0,
                "success": False,
                **{k: v for k, v in self._info.items() if k not in ("thought", "task_id", "instruction")},
                "action": action,
                "valid_action": False,
            }
            # The situation is told again: a policy that reads one prompt a turn would lose it otherwise.
            told = f"{error}\n\n{text_of(self._observation)}"
            return with_text(self._observation, told), -self._penalty, False, False, info
        return self._parsed.action

    def after(self, action: str, step: Step) -> Step:
        """Tell what was parsed."""
        observation, reward, terminated, truncated, info = step
        info["action"] = self._parsed.action
        if self._parsed.thought is not None:
            info["thought"] = self._parsed.thought
        if not info.get("valid_action", True):
            reward -= self._penalty
        self._observation, self._info = observation, info
        return observation, reward, terminated, truncated, info


class TruncateObservation(TextWrapper, RecordConstructorArgs):
    """Cuts the middle out of a long observation and says how much is missing.

    Args:
        env: The environment.
        max_chars: Characters of the text that stay, half of them from its head and half from its tail.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], max_chars: int) -> None:
        if max_chars < 2:
            raise UsageError(f"max_chars is at least 2, not {max_chars}")
        RecordConstructorArgs.__init__(self, max_chars=max_chars)
        super().__init__(env)
        self._max = max_chars

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Cut the first observation."""
        return self._cut(observation), info

    def after(self, action: str, step: Step) -> Step:
        """Cut every other one."""
        return (self._cut(step[0]), *step[1:])

    def _cut(self, observation: Any) -> Any:
        text = text_of(observation)
        if len(text) <= self._max:
            return observation
        head, tail = self._max - self._max // 2, self._max // 2
        left_out = len(text) - self._max
        return with_text(observation, f"{text[:head]}\n[… {left_out} characters left out …]\n{text[-tail:]}")


class ListActions(TextWrapper, RecordConstructorArgs):
    """Appends the admissible actions, where the environment lists them.

    Args:
        env: The environment.
        exclude: Actions that are not shown, for example ``help``.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], exclude: Sequence[str] = ()) -> None:
        RecordConstructorArgs.__init__(self, exclude=exclude)
        super().__init__(env)
        self._exclude = frozenset(exclude)

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """List the first actions."""
        return self._listed(observation, info), info

    def after(self, action: str, step: Step) -> Step:
        """List the next actions, unless the episode is over."""
        observation, reward, terminated, truncated, info = step
        if not (terminated or truncated):
            observation = self._listed(observation, info)
        return observation, reward, terminated, truncated, info

    def _listed(self, observation: Any, info: dict[str, Any]) -> Any:
        actions = [a for a in info.get("admissible_actions") or () if a not in self._exclude]
        if not actions:
            return observation
        return with_text(observation, f"{text_of(observation)}\n\nActions: {', '.join(actions)}")


class ObservationHistory(TextWrapper, RecordConstructorArgs):
    """Puts the last turns in front of the observation, for policies that read one prompt a turn.

    Args:
        env: The environment.
        window: Number of (observation, action) pairs that are kept.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], window: int) -> None:
        if window < 1:
            raise UsageError(f"window is at least 1, not {window}")
        RecordConstructorArgs.__init__(self, window=window)
        super().__init__(env)
        self._past: deque[tuple[str, str]] = deque(maxlen=window)
        self._current, self._turn = "", 0

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forget the last episode."""
        self._past.clear()
        self._current, self._turn = text_of(observation), 0
        return observation, info

    def after(self, action: str, step: Step) -> Step:
        """Remember the turn, and render what is kept."""
        observation, reward, terminated, truncated, info = step
        self._past.append((self._current, str(info.get("action", action))))
        self._turn += 1
        self._current = text_of(observation)
        first = self._turn - len(self._past) + 1
        lines = [f"Turns so far: {self._turn}. The last {len(self._past)}:"]
        for number, (seen, taken) in enumerate(self._past, first):
            lines.append(f"[{number}] Observation: {seen}\n[{number}] Action: {taken}")
        lines.append(f"Now: {self._current}")
        return with_text(observation, "\n".join(lines)), reward, terminated, truncated, info


class TimeLimit(TextWrapper, RecordConstructorArgs):
    """Ends an episode after a number of turns, malformed ones counted: ``truncated``, by ``turns``.

    Args:
        env: The environment.
        max_turns: At least 1.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], max_turns: int) -> None:
        if max_turns < 1:
            raise UsageError(f"max_turns is at least 1, not {max_turns}")
        RecordConstructorArgs.__init__(self, max_turns=max_turns)
        super().__init__(env)
        self._max, self._turn = max_turns, 0

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Start counting."""
        self._turn = 0
        return observation, info

    def before(self, action: str) -> str | Step:
        """Refuse a step behind the end."""
        if self._turn >= self._max:
            raise UsageError("step() needs a running episode", hint="call reset() first")
        return action

    def after(self, action: str, step: Step) -> Step:
        """Count; at the limit, say so."""
        observation, reward, terminated, truncated, info = step
        self._turn += 1
        if self._turn >= self._max and not terminated:
            truncated = True
            info["truncated_by"] = "turns"
        return observation, reward, terminated, truncated, info
