"""The tools of MCP servers, as tools of ours.

Invariants: which servers there are, and how they are started, is said by the user's configuration and by
nothing else; every wait for a server has a deadline; a server that died, or does not even answer a ping, is
:class:`~agentgym.errors.ToolFailed`; what a living server says, an error too, is data.

A server over stdio runs with the rights of whoever started this process. Its environment holds ``PATH``,
``HOME`` and the like, and what its configuration names; no other variable of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

import agentgym
from agentgym.config import Config, load, read_toml
from agentgym.errors import ConfigError, MissingDependency, ToolFailed, UsageError
from agentgym.tools import mcp_wire
from agentgym.tools.base import Tool, Toolbox, ToolError, tool_from_schema

PING_SECONDS = 5.0
"""What a server that is over a deadline has to show that it lives."""
MAX_PAGES = 100
SESSION_GONE = 32600
"""What the SDK says, as an error of its own, where a server over HTTP does not know the session any more."""

T = TypeVar("T")
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


class McpServer(Config):
    """How one server is reached: by a command (stdio) or a URL (streamable HTTP).

    Raises:
        ConfigError: Neither or both, or what belongs to the other one.
    """

    command: tuple[str, ...] | None = None
    """What starts it, and its arguments. It runs with the user's rights."""
    url: str | None = None
    """Where it listens, such as ``http://127.0.0.1:8000/mcp``."""
    env: Mapping[str, str] = Field(default_factory=dict)
    """Variables of its environment, with ``command``."""
    cwd: str | None = None
    """Where it runs, with ``command``; ``None``: where this process does."""
    headers: Mapping[str, str] = Field(default_factory=dict)
    """Sent with every request, with ``url``."""
    timeout: float = 60.0
    """Deadline of a call, in seconds."""
    start_timeout: float = 30.0
    """Deadline of its start, in seconds."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.command is None) == (self.url is None) or self.command == ():
            raise ConfigError("an MCP server has a command or a url, and not both")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"the url of an MCP server is {self.url!r}", hint="write http://… or https://…")
        stray = ("env", "cwd") if self.url is not None else ("headers",)
        if any(getattr(self, name) for name in stray):
            raise ConfigError(f"{' and '.join(stray)} are for the other kind of MCP server")
        if not (self.timeout > 0 and self.start_timeout > 0):
            raise ConfigError("a deadline of an MCP server is not above 0")
        return self


def read_servers(file: str | Path) -> dict[str, McpServer]:
    """The servers of a TOML file: its tables ``[mcp.servers.NAME]``; other tables than ``mcp`` are not read.

    Raises:
        ConfigError: It cannot be read, names no server, or has a key or value that it cannot have.
    """
    path = Path(file).expanduser()
    table = read_toml(path).get("mcp", {})
    servers = table.get("servers", {}) if isinstance(table, dict) and table.keys() <= {"servers"} else None
    if not servers or not isinstance(servers, dict):
        raise ConfigError(
            f"{path} names no MCP server, or has other tables in mcp", hint="add a table [mcp.servers.NAME]"
        )
    return _described(servers)


def _described(servers: Mapping[str, McpServer | Mapping[str, Any]]) -> dict[str, McpServer]:
    made = {}
    for name, given in servers.items():
        try:
            made[name] = given if isinstance(given, McpServer) else load(McpServer, [given])
        except ConfigError as error:
            raise ConfigError(f"the MCP server {name!r}: {error.message}", hint=error.hint) from None
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"the MCP server {name!r} is no table", hint="give it a command or a url"
            ) from None
    return made


def require_packages() -> None:
    """Check that the extra is there.

    Raises:
        MissingDependency: It is not.
    """
    for package in ("mcp", "jsonschema"):
        if find_spec(package) is None:
            raise MissingDependency(package, "mcp")


class McpTools:
    """Connections to servers, and their tools. Use it as a context manager, or call :meth:`close`.

    The connections live on an event loop of their own, so the tools can be called from any other, and after
    it has ended.

    Args:
        servers: By name; the names are ours, and stand before a tool's where two have one.

    Raises:
        MissingDependency: The extra ``mcp`` is not installed.
        ConfigError: A server's description is none.
    """

    def __init__(self, servers: Mapping[str, McpServer | Mapping[str, Any]]) -> None:
        require_packages()
        self._servers = _described(servers)
        self._connections: list[_Connection] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> Self:
        """Start and greet every server; a second call does nothing.

        Raises:
            UsageError: A command cannot be started.
            ToolFailed: A server died, or did not answer in time.
        """
        if self._loop is None:
            # The SDK would write what it cannot send to standard error.
            logging.getLogger("mcp").addHandler(logging.NullHandler())
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="agentgym-mcp", daemon=True)
            self._thread.start()
        if not self._connections:
            try:
                self.run(self._connect())
            except BaseException:
                self.close()
                raise
        return self

    def restart(self) -> None:
        """End every connection and make new ones: servers begin anew. Raises as :meth:`open`."""
        if self._connections:
            self.run(self._disconnect())
        self.open()

    def close(self) -> None:
        """End every server."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        with contextlib.suppress(Exception):
            self.run(self._disconnect())
        self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        if not loop.is_running():
            loop.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.open)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def tools(self, reserved: Iterable[str] = ()) -> list[Tool]:
        """Every server's tools; their functions are coroutine functions.

        A name that two servers have, or that is reserved, becomes ``SERVER_NAME``.

        Args:
            reserved: Names that other tools have.

        Raises:
            UsageError: Names collide all the same, or a server describes a tool by no JSON Schema.
        """
        taken = list(reserved)
        told = [(connection, listed) for connection in self._connections for listed in connection.tools]
        names = taken + [_clean(listed.name) for _, listed in told]
        made = []
        for connection, listed in told:
            name = _clean(listed.name)
            if names.count(name) > 1:
                name = _clean(f"{connection.name}_{listed.name}")
            words = listed.description or listed.title or f"The tool {listed.name} of {connection.name}."
            made.append(
                tool_from_schema(name, words, listed.inputSchema, self._function(connection, listed.name))
            )
        for name in taken:
            if any(one.name == name for one in made):
                raise UsageError(f"two tools are called {name!r}", hint="give the MCP server another name")
        Toolbox(made)
        return made

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, such as a call of these tools, from where no event loop runs.

        Raises:
            UsageError: The connections are closed.
        """
        return asyncio.run_coroutine_threadsafe(work, self._running(work)).result()

    def _running(self, work: Coroutine[Any, Any, Any]) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            work.close()
            raise UsageError("the connections to MCP servers are closed", hint="call open() first")
        return self._loop

    def _function(self, connection: _Connection, name: str) -> Callable[..., Awaitable[str]]:
        async def call(**arguments: Any) -> str:
            work = connection.call(name, arguments)
            try:
                future = asyncio.run_coroutine_threadsafe(work, self._running(work))
            except (UsageError, RuntimeError) as error:
                # No doing of the policy's, so no answer to it.
                work.close()
                raise ToolFailed("the connections to MCP servers are closed") from error
            return await asyncio.wrap_future(future)

        return call

    async def _connect(self) -> None:
        self._connections = [_Connection(name, server) for name, server in self._servers.items()]
        opened = await asyncio.gather(*(one.open() for one in self._connections), return_exceptions=True)
        for problem in opened:
            if isinstance(problem, BaseException):
                await self._disconnect()
                raise problem

    async def _disconnect(self) -> None:
        connections, self._connections = self._connections, []
        await asyncio.gather(*(one.close() for one in connections), return_exceptions=True)


class _Connection:
    """One server. A task of its own holds what the SDK opens, because that task has to close it too."""

    def __init__(self, name: str, server: McpServer) -> None:
        self.name, self.server = name, server
        self.tools: list[Any] = []
        self._session: Any = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._child: mcp_wire.Child | None = None

    async def open(self) -> None:
        greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(greeted))
        try:
            async with asyncio.timeout(self.server.start_timeout):
                either: set[asyncio.Future[Any]] = {greeted, self._dead}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            seconds = self.server.start_timeout
            words = self._child.last_words if self._child is not None else ""
            said = f"; its last words: {words}" if words else ""
            raise self._failed(f"did not answer within {seconds:g} s{said}") from None
        if not greeted.done():
            raise self._failed(f"could not be greeted: {self._dead.result()}")
        greeted.result()

    async def close(self) -> None:
        self._stop.set()
        if self._task is not None:
            if self._session is None:
                self._task.cancel()  # it is still at its greeting
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(3 * mcp_wire.END_SECONDS):
                    await asyncio.shield(self._task)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        from mcp import McpError, types

        if self._dead.done():
            raise self._failed(f"is gone: {self._dead.result()}")
        request = types.CallToolRequest(params=types.CallToolRequestParams(name=name, arguments=arguments))
        try:
            result = await self._asked(
                self._session.send_request(types.ClientRequest(request), types.CallToolResult)
            )
        except TimeoutError:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self._session.send_ping()
            except Exception as error:
                self._died("it answers no more")
                raise self._failed(
                    f"did not answer within {self.server.timeout:g} s, nor to a ping"
                ) from error
            raise ToolError(f"{name} did not end within {self.server.timeout:g} s") from None
        except McpError as error:
            raise ToolError(error.error.message or f"{name} failed") from error
        except ValidationError as error:
            raise ToolError(f"{name} gave what is no result") from error
        text = mcp_wire.as_text(result)
        if result.isError:
            raise ToolError(text or f"{name} failed")
        return text

    async def _asked(self, work: Coroutine[Any, Any, T]) -> T:
        """What a request gives, within the deadline of a call and the server's life."""
        from mcp.types import CONNECTION_CLOSED

        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._dead}
            await asyncio.wait(either, timeout=self.server.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():
                error = task.exception()
                told = getattr(error, "error", None)
                if error is None or (told is not None and told.code not in (CONNECTION_CLOSED, SESSION_GONE)):
                    return task.result()
                if not isinstance(error, Exception) or isinstance(error, ValidationError):
                    raise error
                # The way to the server broke; how it ended is known in a moment.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await asyncio.shield(self._dead)
                self._died(str(error))
            if self._dead.done():
                raise self._failed(f"died: {self._dead.result()}")
            raise TimeoutError
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _hold(self, greeted: asyncio.Future[None]) -> None:
        from mcp import ClientSession, types

        about = types.Implementation(name="agentgym", version=agentgym.__version__)
        try:
            async with (
                self._streams() as (read, write),
                ClientSession(read, write, client_info=about) as session,
            ):
                await session.initialize()
                self.tools = [tool async for tool in _listed(session)]
                self._session = session
                if not greeted.done():
                    greeted.set_result(None)
                await self._stop.wait()
        except Exception as error:
            told = _innermost(error)
            if not greeted.done() and isinstance(told, UsageError):
                greeted.set_exception(told)
            if self._child is None or self._child.process.returncode is None:
                self._died(f"{type(told).__name__}: {told}")
            else:
                self._died(await self._child.wait())
        finally:
            self._died("it was closed")

    @contextlib.asynccontextmanager
    async def _streams(self) -> AsyncIterator[mcp_wire.Streams]:
        if self.server.url is not None:
            import httpx
            from mcp.client.streamable_http import streamable_http_client

            patience = httpx.Timeout(self.server.start_timeout, read=max(300.0, 2 * self.server.timeout))
            async with (
                httpx.AsyncClient(headers=self.server.headers, timeout=patience) as client,
                streamable_http_client(self.server.url, http_client=client) as (read, write, _),
            ):
                yield read, write
            return
        from mcp.client.stdio import get_default_environment

        assert self.server.command is not None
        env = {**get_default_environment(), **self.server.env}
        try:
            self._child = await mcp_wire.Child.start(self.server.command, env, self.server.cwd)
        except OSError as error:
            raise UsageError(
                f"the MCP server {self.name!r} cannot be started: {error}",
                hint="mend its command in the configuration",
            ) from error
        watching = asyncio.create_task(self._watch(self._child))
        try:
            process = self._child.process
            assert process.stdout is not None and process.stdin is not None
            async with mcp_wire.over_lines(process.stdout, process.stdin) as streams:
                yield streams
        finally:
            watching.cancel()
            await asyncio.shield(self._child.end())

    async def _watch(self, child: mcp_wire.Child) -> None:
        self._died(await child.wait())
        self._stop.set()

    def _died(self, why: str) -> None:
        if not self._dead.done():
            self._dead.set_result(why)

    def _failed(self, what: str) -> ToolFailed:
        return ToolFailed(f"the MCP server {self.name!r} {what}", hint="see to the server; it is the user's")


async def _listed(session: Any) -> AsyncIterator[Any]:
    from mcp import types

    cursor = None
    for _ in range(MAX_PAGES):
        page = await session.list_tools(params=types.PaginatedRequestParams(cursor=cursor))
        for listed in page.tools:
            yield listed
        cursor = page.nextCursor
        if not cursor:
            return


def _clean(name: str) -> str:
    return _NO_NAME.sub("_", name)[:64] or "tool"


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
