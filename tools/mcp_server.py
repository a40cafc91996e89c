"""An environment served to MCP clients: its tools are the client's tools, and a call is an action.

Invariants: a session plays one episode at a time, in an environment of its own; what a client is told is what
a policy is told, and the reward, the score and the end beside it, as structured content; an environment that
fails ends the episode with an error and no reward; standard output carries nothing but the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import agentgym
from agentgym.errors import UsageError
from agentgym.serving import protocol
from agentgym.serving.access import Access
from agentgym.serving.run import ended_by_signals, on_signals, plain_server, url_of
from agentgym.serving.sessions import Session, Sessions
from agentgym.tools.mcp import require_packages
from agentgym.tools.mcp_wire import LONGEST, over_lines

if TYPE_CHECKING:
    from mcp import types
    from mcp.server.lowlevel import Server

PATH = "/mcp"
MAX_BYTES = 16 << 20

_INSTRUCTIONS = (
    "This server plays episodes of the environment {id}. Call reset first: it tells the task. Then call the "
    "environment's tools, or act with a text. The structured content of every answer tells the reward and "
    "whether the episode is over; reset then starts another."
)
_TOLD = (
    "task_id", "split", "score", "success", "valid_action", "terminated", "truncated", "admissible_actions",
)  # fmt: skip


class Player:
    """One client's episodes.

    Args:
        sessions: Where its environment comes from, once it is needed.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._session: Session | None = None
        self._turn = asyncio.Lock()
        self._unseen: dict[str, Any] | None = None
        self._playing = False
        self._names: dict[str, str] = {}

    async def tools(self) -> list[types.Tool]:
        """The tools of the current episode, with ours; an episode is begun where there is none.

        Raises:
            UsageError: What went wrong, in words that may leave.
        """
        async with self._turn:
            try:
                return await self._tools()
            except Exception as error:
                told = await self._error(error)
                raise UsageError(str(told["message"]), hint=str(told.get("hint", ""))) from None

    async def call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """What a call gives; whatever goes wrong is told in it."""
        async with self._turn:
            try:
                if not self._names:
                    await self._tools()
                if name == self._names["reset"]:
                    return self._result(await self._reset(arguments))
                if not self._playing:
                    raise UsageError(
                        "no episode is running", hint=f"call {self._names['reset']}: it tells the task"
                    )
                return self._result(await self._step(name, arguments))
            except Exception as error:
                return await self._failed(error)

    async def close(self) -> None:
        """Give the environment back."""
        session, self._session = self._session, None
        if session is not None:
            await self._sessions.end(session)

    async def _tools(self) -> list[types.Tool]:
        from mcp import types

        session = self._opened()
        if not self._playing and self._unseen is None:
            self._unseen = await session.reset(protocol.ResetRequest())
        listed = (await session.step(protocol.ListToolsAction(type="list_tools")))["observation"]["tools"]
        taken = {tool["name"] for tool in listed}
        self._names = {own: own if own not in taken else f"agentgym_{own}" for own in ("reset", "act")}
        return [
            *(
                types.Tool(
                    name=tool["name"], description=tool["description"], inputSchema=tool["input_schema"]
                )
                for tool in listed
            ),
            types.Tool(name=self._names["reset"], description=_RESET, inputSchema=_RESET_SCHEMA),
            types.Tool(name=self._names["act"], description=_ACT, inputSchema=_ACT_SCHEMA),
        ]

    async def _reset(self, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if name not in _RESET_SCHEMA["properties"]:
                raise UsageError(
                    f"reset takes no {name!r}", hint=f"it takes {', '.join(_RESET_SCHEMA['properties'])}"
                )
        unseen, self._unseen = self._unseen, None
        if unseen is None or arguments:
            self._playing = False
            unseen = await self._opened().reset(protocol.ResetRequest.model_validate(arguments))
        self._playing = True
        return unseen

    async def _step(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        action: protocol.Action
        if name == self._names["act"]:
            if arguments.keys() != {"action"}:
                raise UsageError("act takes one argument, action")
            action = protocol.TextAction(text=arguments["action"])
        else:
            action = protocol.CallToolAction(type="call_tool", tool_name=name, arguments=arguments)
        data = await self._opened().step(action)
        self._playing = not data["done"]
        return data

    def _opened(self) -> Session:
        if self._session is None:
            self._session = self._sessions.open()
            self._session.reaped = True
        return self._session

    def _result(self, data: dict[str, Any]) -> types.CallToolResult:
        from mcp import types

        observation = data["observation"]
        parts = observation.get("content") or [{"type": "text", "text": observation["text"]}]
        content: list[Any] = [
            types.TextContent(type="text", text=_plain(part["text"]))
            if part["type"] == "text"
            else types.ImageContent(type="image", data=part["data"], mimeType=part["media_type"])
            for part in parts
        ]
        if data["done"]:
            over = f"[The episode is over; {self._names['reset']} starts another.]"
            content.append(types.TextContent(type="text", text=over))
        metadata = observation["metadata"]
        told = {name: metadata[name] for name in _TOLD if metadata.get(name) is not None}
        if data["reward"] is not None:
            told["reward"] = data["reward"]
        return types.CallToolResult(
            content=content,
            structuredContent={**told, "done": data["done"]},
            isError=not metadata.get("valid_action", True),
        )

    async def _failed(self, error: Exception) -> types.CallToolResult:
        from mcp import types

        told = await self._error(error)
        text = told["message"] + (f" ({told['hint']})" if told.get("hint") else "")
        ended = "boundary" in told
        if ended:
            self._playing, self._unseen = False, None
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=_plain(text))],
            structuredContent={"error": told, "done": ended},
            isError=True,
        )

    async def _error(self, error: Exception) -> dict[str, Any]:
        if self._session is None:
            return protocol.error_data(error)
        told = await self._session.error(error)
        if isinstance(error, protocol.ProtocolError) and error.code == "SESSION_ERROR":
            # It was idle too long; the next call gets another one.
            self._session, self._playing, self._unseen = None, False, None
        return told


def build(sessions: Sessions) -> Server[Player, Any]:
    """An MCP server whose every session plays.

    Args:
        sessions: What it serves; the caller closes it.

    Raises:
        MissingDependency: The extra ``mcp`` is not installed.
    """
    require_packages()
    import anyio
    from mcp import types
    from mcp.server.lowlevel import Server

    @contextlib.asynccontextmanager
    async def life(_: Any) -> AsyncIterator[Player]:
        player = Player(sessions)
        try:
            yield player
        finally:
            with anyio.CancelScope(shield=True):
                await player.close()

    words = _INSTRUCTIONS.format(id=sessions.config.id)
    server: Server[Player, Any] = Server(
        f"agentgym {sessions.config.id}", version=agentgym.__version__, instructions=words, lifespan=life
    )

    async def list_tools(_: types.ListToolsRequest) -> types.ServerResult:
        tools = await server.request_context.lifespan_context.tools()
        return types.ServerResult(types.ListToolsResult(tools=tools))

    async def call_tool(request: types.CallToolRequest) -> types.ServerResult:
        # Not the SDK's decorator: it would check arguments itself, and a wrong call would be no turn.
        player = server.request_context.lifespan_context
        return types.ServerResult(await player.call(request.params.name, request.params.arguments or {}))

    server.request_handlers[types.ListToolsRequest] = list_tools
    server.request_handlers[types.CallToolRequest] = call_tool
    return server


@contextlib.contextmanager
def own_streams() -> Iterator[tuple[int, int]]:
    """Take standard input and output for the protocol; what else is printed goes to standard error."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        yield incoming, outgoing
    finally:
        os.dup2(incoming, 0)
        os.dup2(outgoing, 1)
        for fd in (incoming, outgoing, nothing):
            os.close(fd)


async def serve_stdio(sessions: Sessions, incoming: int, outgoing: int) -> None:
    """Serve one client over two file descriptors, until it hangs up or a signal comes.

    Args:
        sessions: What is served; closed at the end.
        incoming: What it is read from.
        outgoing: What it is written to.

    Raises:
        UsageError: They are files, not pipes.
    """
    server, loop = build(sessions), asyncio.get_running_loop()
    try:
        reader = asyncio.StreamReader(limit=LONGEST)
        try:
            await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(incoming), "rb", 0)
            )
            transport, flow = await loop.connect_write_pipe(
                asyncio.streams.FlowControlMixin, os.fdopen(os.dup(outgoing), "wb", 0)
            )
        except ValueError as error:
            raise UsageError(
                "standard input and output are no pipes", hint="let an MCP client start this, or give --http"
            ) from error
        writer = asyncio.StreamWriter(transport, flow, None, loop)
        async with over_lines(reader, writer) as (read, write):
            serving = asyncio.create_task(server.run(read, write, server.create_initialization_options()))
            with on_signals(serving.cancel), contextlib.suppress(asyncio.CancelledError):
                await serving
        writer.close()
    finally:
        await sessions.aclose()


async def serve_http(
    sessions: Sessions,
    listening: socket.socket,
    token: str | None,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve over streamable HTTP until a signal comes.

    Args:
        sessions: What is served; closed at the end.
        listening: The socket.
        token: What clients must know; ``None``: they must be on this machine.
        started: Called with the URL once clients can connect.
    """
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from starlette.applications import Starlette
    from starlette.routing import Route

    manager = StreamableHTTPSessionManager(build(sessions))

    class Endpoint:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await manager.handle_request(scope, receive, send)

    @contextlib.asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        async with manager.run():
            reaping = asyncio.create_task(sessions.reap())
            try:
                yield
            finally:
                reaping.cancel()
                await sessions.aclose()

    app = Starlette(routes=[Route(PATH, endpoint=Endpoint())], lifespan=life)
    server = plain_server(
        Access(app, token, MAX_BYTES),
        shutdown_seconds=2,  # what a client listens to never ends by itself
        started=lambda: started(url_of(listening) + PATH),
        ws="none",
    )
    with ended_by_signals(server):
        await server.serve(sockets=[listening])


def _plain(text: str) -> str:
    # Halves of surrogate pairs can be in an observation, and in no message.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_RESET = "Start an episode and read its task. Without arguments the task is drawn."
_RESET_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "task_id": {"type": "string", "description": "The task to start."},
        "split": {"type": "string", "description": "The split to draw a task from."},
        "seed": {"type": "integer", "minimum": 0, "description": "Seeds the environment and draws the task."},
    },
    "additionalProperties": False,
}
_ACT = "Take an action that is a text: a command, a message or an answer, as the task says."
_ACT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"action": {"type": "string", "description": "The action."}},
    "required": ["action"],
    "additionalProperties": False,
}
