"""An environment with the tools of MCP servers beside its own.

Invariants: which servers there are is an argument of the person who builds the environment: nothing that an
environment or a task says names one; calls of the servers' tools are answered here and cost a turn without a
reward, and every other action reaches the environment as it was written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium

from agentgym import registry
from agentgym.actions import write_calls
from agentgym.env import Transition
from agentgym.errors import ForkUnsupported
from agentgym.messages import ToolCall
from agentgym.tools.base import Toolbox, ToolResult
from agentgym.tools.mcp import McpServer, McpTools, read_servers
from agentgym.tools.turn import read_turn
from agentgym.wrappers.base import TextWrapper, read_text, with_text

CALLS = 16
"""Most calls in one turn."""


class McpEnvironment(TextWrapper):
    """Adds the tools of MCP servers to ``info["tools"]``, and answers their calls.

    A turn may call tools of both kinds: the servers' are called first, the rest is the environment's action,
    and the observation tells both.

    Args:
        env: What to wrap.
        servers: The servers, by name.
        fresh: Whether every episode gets servers that were started anew; otherwise what an episode left in
            them is there for the next.

    Raises:
        MissingDependency: The extra ``mcp`` is not installed.
        ConfigError: A server's description is none.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        servers: Mapping[str, McpServer | Mapping[str, Any]],
        *,
        fresh: bool = True,
    ) -> None:
        # Their names alone are recorded: descriptions hold keys and tokens.
        super().__init__(env, servers=sorted(servers), fresh=fresh)
        self._mcp, self._fresh = McpTools(servers), fresh
        self._box = Toolbox(())
        self._last: Any = None
        self._score = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode, and the servers.

        Raises:
            ToolFailed: A server cannot be had.
        """
        self._start()
        return super().reset(seed=seed, options=options)

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """:meth:`reset` on the running event loop."""
        await asyncio.to_thread(self._start)
        return await super().areset(seed=seed, options=options)

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action; raises ``ToolFailed`` where a server broke."""
        ours, rest = self._split(action)
        if ours is None or not self._running:
            return super().step(action)
        if len(ours) > CALLS:
            return self._told([_too_many(len(ours))], None)
        results = [self._mcp.run(self._box.acall(call)) for call in ours]
        return self._told(results, super().step(rest) if rest else None)

    async def astep(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """:meth:`step` on the running event loop."""
        ours, rest = self._split(action)
        if ours is None or not self._running:
            return await super().astep(action)
        if len(ours) > CALLS:
            return self._told([_too_many(len(ours))], None)
        results = [await self._box.acall(call) for call in ours]
        return self._told(results, await super().astep(rest) if rest else None)

    def close(self) -> None:
        """Close the environment and end the servers."""
        try:
            super().close()
        finally:
            self._mcp.close()

    async def aclose(self) -> None:
        """:meth:`close` on the running event loop."""
        try:
            await super().aclose()
        finally:
            await asyncio.to_thread(self._mcp.close)

    def fork_wrapper(self, inner: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
        """Refuse: what a server holds cannot be copied.

        Raises:
            ForkUnsupported: Always.
        """
        inner.close()
        raise ForkUnsupported("an environment with MCP servers cannot be forked", hint="start a new episode")

    def on_reset(self, observation: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Tell of the servers' tools."""
        own = list(info.get("tools", ()))
        names = [str(schema.get("function", schema).get("name", "")) for schema in own]
        self._box = Toolbox(self._mcp.tools(names))
        self._last, self._score = observation, 0.0
        return observation, {**info, "tools": [*own, *self._box.schemas]}

    def after(self, action: str, result: Transition) -> Transition:
        """Keep what the environment said last; tools that it tells of again get the servers' beside them."""
        self._last = result.observation
        info = dict(result.info)
        self._score = float(info.get("score", self._score + result.reward))
        if "tools" in info:
            info["tools"] = [*info["tools"], *self._box.schemas]
        return result._replace(info=info)

    def _start(self) -> None:
        if self._fresh:
            self._mcp.restart()
        else:
            self._mcp.open()

    def _split(self, action: str) -> tuple[Sequence[ToolCall] | None, str]:
        """The calls of the servers' tools, ``None`` where there are none; and the rest of the action."""
        turn = read_turn(action) if isinstance(action, str) else None
        if not isinstance(turn, tuple) or not any(call.name in self._box for call in turn):
            return None, action
        rest = [call for call in turn if call.name not in self._box]
        return [call for call in turn if call.name in self._box], write_calls(rest) if rest else ""

    def _told(
        self, results: Sequence[ToolResult], inner: tuple[Any, float, bool, bool, dict[str, Any]] | None
    ) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        texts, valid = [result.content for result in results], all(result.ok for result in results)
        if inner is None:
            info = {"valid_action": valid, "score": self._score, "success": False, "role": "tool"}
            return with_text(self._last, "\n\n".join(texts)), 0.0, False, False, info
        observation, reward, terminated, truncated, info = inner
        texts.append(read_text(observation) or "")
        info = {**info, "valid_action": bool(info.get("valid_action", True)) and valid}
        return with_text(observation, "\n\n".join(texts)), reward, terminated, truncated, info


def _too_many(count: int) -> ToolResult:
    return ToolResult(
        f"A turn holds at most {CALLS} calls of these tools; none of {count} was run.", ok=False
    )


def with_servers(
    *,
    env: str,
    servers: str | Path,
    fresh: bool = True,
    options: Mapping[str, Any] | None = None,
    render_mode: str | None = None,
) -> McpEnvironment:
    """The environment ``env`` with the servers of a configuration file.

    This is an id too: ``agentgym.tools.mcp_environment:with_servers``.

    Args:
        env: A registered id, or an import path.
        servers: A TOML file with tables ``[mcp.servers.NAME]``, see :func:`agentgym.tools.mcp.read_servers`.
        fresh: See :class:`McpEnvironment`.
        options: Arguments of the environment.
        render_mode: The environment's.

    Raises:
        ConfigError: The file names no servers, or cannot be read.
        AgentGymError: As :func:`agentgym.make`.
    """
    described = read_servers(servers)
    given = {**(options or {}), **({} if render_mode is None else {"render_mode": render_mode})}
    made = registry.make(env, **given)
    try:
        return McpEnvironment(made, described, fresh=fresh)
    except BaseException:
        made.close()
        raise
