"""Wrappers that change what a policy reads. Invariant: the text changes, and nothing else does."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium

from agentgym.env import Transition
from agentgym.errors import UsageError
from agentgym.wrappers.base import TextWrapper, read_text, with_text

SHORTEST = 80
"""Smallest ``max_chars`` of :class:`TruncateObservation`: the note takes about 40 characters of it."""


class TruncateObservation(TextWrapper):
    """Keeps the head and the tail of a long text, and says how many characters were left out between.

    The result, note included, has at most ``max_chars`` characters; both ends get half of what the note
    leaves. Characters are Unicode code points.

    Args:
        env: What to wrap.
        max_chars: From 80.

    Raises:
        UsageError: ``max_chars`` is too small.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], max_chars: int) -> None:
        if max_chars < SHORTEST:
            raise UsageError(
                f"observations cannot be cut to {max_chars} characters", hint=f"give {SHORTEST} or more"
            )
        super().__init__(env, max_chars=max_chars)
        self.max_chars = max_chars

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Cut the first observation."""
        return self._cut(observation), info

    def after(self, action: str, result: Transition) -> Transition:
        """Cut the next one."""
        return result._replace(observation=self._cut(result.observation))

    def _cut(self, observation: Any) -> Any:
        text = read_text(observation)
        if text is None or len(text) <= self.max_chars:
            return observation
        # The true number is smaller than the text's length, so its note is no longer than this one.
        room = self.max_chars - len(_note(len(text)))
        head, tail = (room + 1) // 2, room // 2
        return with_text(observation, text[:head] + _note(len(text) - room) + text[len(text) - tail :])


class ListActions(TextWrapper):
    """Appends the admissible actions to the text, one a line, where ``info`` lists any.

    ``info["admissible_actions"]`` itself stays whole.

    Args:
        env: What to wrap.
        exclude: Actions that are not shown, such as ``help``.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], exclude: Sequence[str] = ()) -> None:
        if isinstance(exclude, str):
            raise UsageError(f"exclude is a list of actions, not {exclude!r}", hint=f"write [{exclude!r}]")
        super().__init__(env, exclude=exclude)
        self.exclude = frozenset(exclude)

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """List the first actions."""
        return self._list(observation, info), info

    def after(self, action: str, result: Transition) -> Transition:
        """List the next ones."""
        return result._replace(observation=self._list(result.observation, result.info))

    def _list(self, observation: Any, info: Mapping[str, Any]) -> Any:
        text = read_text(observation)
        shown = [a for a in info.get("admissible_actions") or () if a not in self.exclude]
        if text is None or not shown:
            return observation
        return with_text(observation, "\n".join([text.rstrip(), "", "Admissible actions:", *shown]))


class ObservationHistory(TextWrapper):
    """Puts the last ``window`` observations and actions in front of the current observation, numbered.

    The first observation stays as it is. Later ones read::

        Turn 4. The last 2 of 3 earlier turns:
        [observation 2] …
        [action 2] …
        [observation 3] …
        [action 3] …
        [observation 4] …

    The action is ``info["action"]`` where an inner wrapper parsed it, else the one given; a turn whose
    completion could not be read shows ``(malformed)``. As the memory of verl-agent's environments
    (``history_length``), which GiGPO's and EPO's published runs keep at 2.

    Args:
        env: What to wrap.
        window: Number of earlier turns shown, from 1.
        observations: Show their observations too; without them one line ``Earlier actions: …`` stands in
            front, which keeps prompts short where the actions alone tell the way.

    Raises:
        UsageError: ``window`` is below 1.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], window: int, observations: bool = True) -> None:
        if window < 1:
            raise UsageError(f"a history of {window} turns", hint="give 1 or more, or leave the wrapper out")
        super().__init__(env, window=window, observations=observations)
        self.window, self.observations = window, observations
        self._turns: deque[tuple[str, str]] = deque(maxlen=window)
        self._count = 0
        self._last: str | None = None

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forget the episode before."""
        self._turns.clear()
        self._count, self._last = 0, read_text(observation)
        return observation, info

    def after(self, action: str, result: Transition) -> Transition:
        """Remember the turn, and show the last ones."""
        taken = str(result.info.get("action", action))
        if not taken and "format_error" in result.info:
            taken = "(malformed)"
        self._turns.append((self._last or "", taken))
        self._count += 1
        self._last = read_text(result.observation)
        if self._last is None:
            return result
        return result._replace(observation=with_text(result.observation, self._render(self._last)))

    def _render(self, current: str) -> str:
        shown, turn = len(self._turns), self._count + 1
        if not self.observations:
            dots = "… " if shown < self._count else ""
            return f"Earlier actions: {dots}{', '.join(action for _, action in self._turns)}\n\n{current}"
        which = f"The last {shown} of {self._count} earlier turns" if shown < self._count else "Earlier turns"
        lines = [f"Turn {turn}. {which}:"]
        for number, (observation, action) in enumerate(self._turns, turn - shown):
            lines += [f"[observation {number}] {observation.strip()}", f"[action {number}] {action}"]
        return "\n".join([*lines, f"[observation {turn}] {current}"])


def _note(count: int) -> str:
    return f"\n[… {count} characters left out …]\n"
