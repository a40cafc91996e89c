"""The base of every text wrapper: three pure hooks, used alike by the sync and the async form.

Invariants: what an inner environment returned is never mutated; a hook gets copies to change or returns
new ones. An episode that is over takes no step. A wrapper changes the text of an observation and nothing
else: a ``str``, or the ``text`` entry of a ``Dict``; other observations pass as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from agentgym import spaces
from agentgym.env import Transition
from agentgym.errors import UsageError
from agentgym.messages import Content, as_content

_ANY_LENGTH = 2**31 - 1


class TextWrapper(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Wraps an environment that takes text.

    A subclass calls ``super().__init__(env, **arguments)`` and overrides the hooks it needs. Its state
    is deep-copied by :func:`agentgym.fork`.

    Args:
        env: What to wrap.
        **arguments: The subclass's own arguments, recorded in ``spec``.
    """

    changes_text = True
    """Whether observations get longer or shorter: then the space says that any length may come."""

    def __init__(self, env: gymnasium.Env[Any, Any], **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, **arguments)
        gymnasium.Wrapper.__init__(self, env)
        if self.changes_text:
            self.observation_space = _any_length(env.observation_space)
        self._running = False

    # Hooks ----------------------------------------------------------------------------------

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Change what ``reset`` returns. ``info`` is a copy that may be changed."""
        return observation, info

    def before(self, action: str) -> str | Transition:
        """The action for the inner environment, or the answer in its stead: then it is not called."""
        return action

    def after(self, action: str, result: Transition) -> Transition:
        """Change what ``step`` returns. ``action`` is the one given to this wrapper; ``info`` is a copy."""
        return result

    # Gymnasium's interface, and its async form ----------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see :meth:`agentgym.Env.reset`."""
        self._running = False
        return self._started(self.env.reset(seed=seed, options=options))

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """:meth:`reset` on the running event loop."""
        self._running = False
        return self._started(await _call(self.env, "reset", seed=seed, options=options))

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action; see :meth:`agentgym.Env.step`.

        Raises:
            UsageError: Before ``reset``, or after the episode's end.
        """
        ready = self._ready(action)
        answered = isinstance(ready, Transition)
        return self._stepped(action, ready if answered else self.env.step(ready), answered)

    async def astep(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """:meth:`step` on the running event loop."""
        ready = self._ready(action)
        answered = isinstance(ready, Transition)
        return self._stepped(action, ready if answered else await _call(self.env, "step", ready), answered)

    def close(self) -> None:
        """Close the wrapped environment."""
        self._running = False
        self.env.close()

    async def aclose(self) -> None:
        """:meth:`close` on the running event loop."""
        self._running = False
        await _call(self.env, "close")

    def content(self, observation: Any) -> Content:
        """The parts of ``observation``, as the wrapped environment reads it."""
        try:
            read = self.env.get_wrapper_attr("content")
        except AttributeError:  # an environment of another library
            return as_content(read_text(observation) or str(observation))
        made: Content = read(observation)
        return made

    # ----------------------------------------------------------------------------------------

    def _started(self, result: tuple[Any, Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
        observation, info = self.on_reset(result[0], dict(result[1]))
        self._running = True
        return observation, info

    def _ready(self, action: str) -> str | Transition:
        if not self._running:
            raise UsageError("step() needs a running episode", hint="call reset() first")
        return self.before(action)

    def _stepped(
        self, action: str, result: Any, answered: bool
    ) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not answered:
            observation, reward, terminated, truncated, info = result
            result = self.after(action, Transition(observation, reward, terminated, truncated, dict(info)))
        self._running = not (result.terminated or result.truncated)
        return result.observation, result.reward, result.terminated, result.truncated, dict(result.info)


def read_text(observation: Any) -> str | None:
    """The text of an observation; ``None`` where it has none."""
    if isinstance(observation, str):
        return observation
    text = observation.get("text") if isinstance(observation, Mapping) else None
    return text if isinstance(text, str) else None


def with_text(observation: Any, text: str) -> Any:
    """``observation`` with another text: a new one, or the same where it has no text."""
    if isinstance(observation, str):
        return text
    if isinstance(observation, Mapping) and isinstance(observation.get("text"), str):
        return {**observation, "text": text}
    return observation


def _any_length(space: gymnasium.Space[Any]) -> gymnasium.Space[Any]:
    if isinstance(space, gymnasium.spaces.Text):
        return spaces.Text(_ANY_LENGTH)
    if isinstance(space, gymnasium.spaces.Dict) and "text" in space.spaces:
        return gymnasium.spaces.Dict({**space.spaces, "text": _any_length(space["text"])})
    return space


async def _call(env: gymnasium.Env[Any, Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """The async form where ``env`` has one; a wrapper of another library is run on a thread instead."""
    if (form := getattr(env, f"a{name}", None)) is not None:
        return await form(*args, **kwargs)
    return await asyncio.to_thread(getattr(env, name), *args, **kwargs)
