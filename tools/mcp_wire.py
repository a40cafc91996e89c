"""MCP's messages over lines of JSON, and its results as text.

Invariants: a line that is no message is dropped, and one that is too long ends the connection; a process that
was started is ended with its whole process group, and what it writes to standard error reaches nobody's but
an error message.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcp import types

LONGEST = 16 << 20
"""Longest line, in bytes."""
LAST_WORDS = 2_000
"""Characters kept of what a process wrote to standard error."""
END_SECONDS = 2.0
POLL_SECONDS = 0.02

Streams = tuple[Any, Any]
"""What the SDK's sessions read messages from, and write them to."""


@contextlib.asynccontextmanager
async def over_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncIterator[Streams]:
    """The SDK's streams over a pair of byte streams; the first ends with ``reader``.

    Args:
        reader: Made with a limit of :data:`LONGEST`.
        writer: What is written is drained message by message.
    """
    import anyio
    from mcp import types
    from mcp.shared.message import SessionMessage
    from pydantic import ValidationError

    arriving, arrived = anyio.create_memory_object_stream[Any](0)
    leaving, left = anyio.create_memory_object_stream[Any](0)

    async def read() -> None:
        async with arriving:
            # ValueError: a line is too long. The others: whoever wrote or read has gone.
            with contextlib.suppress(ValueError, OSError, anyio.BrokenResourceError):
                while line := await reader.readline():
                    try:
                        message = types.JSONRPCMessage.model_validate_json(line)
                    except ValidationError:
                        continue
                    await arriving.send(SessionMessage(message))

    async def write() -> None:
        async with left:
            with contextlib.suppress(OSError):
                async for sent in left:
                    text = sent.message.model_dump_json(by_alias=True, exclude_none=True)
                    writer.write(text.encode("utf-8", "replace") + b"\n")
                    await writer.drain()

    tasks = [asyncio.create_task(read()), asyncio.create_task(write())]
    try:
        yield arrived, leaving
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in (arrived, leaving, arriving, left):
            stream.close()


class Child:
    """A server's process, in a process group of its own.

    Attributes:
        process: It.
    """

    def __init__(self, process: asyncio.subprocess.Process, transport: asyncio.SubprocessTransport) -> None:
        self.process, self._transport = process, transport
        self._words: deque[str] = deque(maxlen=50)
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> Child:
        """Start it.

        Raises:
            OSError: It cannot be started.
        """
        # What create_subprocess_exec does, with the transport kept: only that can be closed while some other
        # process holds the pipes.
        loop, pipe = asyncio.get_running_loop(), asyncio.subprocess.PIPE
        transport, streams = await loop.subprocess_exec(
            lambda: asyncio.subprocess.SubprocessStreamProtocol(LONGEST, loop),
            *command, stdin=pipe, stdout=pipe, stderr=pipe, env=dict(env), cwd=cwd, start_new_session=True,
        )  # fmt: skip
        return cls(asyncio.subprocess.Process(transport, streams, loop), transport)

    @property
    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return "".join(self._words).strip()[-LAST_WORDS:]

    async def wait(self) -> str:
        """Wait for its end; says how it was."""
        code = await self._exit()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):  # what it said last may still be on its way
                await asyncio.shield(self._listening)
        how = f"it was killed by signal {-code}" if code < 0 else f"it ended with status {code}"
        return f"{how}; its last words: {self.last_words}" if self.last_words else how

    async def end(self) -> None:
        """Close its input, give it a moment, and end what is left of its process group."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        for number in (None, signal.SIGTERM):
            if number is not None:
                self._signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await self._exit()
                    break
        self._signal(signal.SIGKILL)
        await self._exit()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        self._transport.close()
        await asyncio.sleep(0)  # the pipes close at the loop's next turn

    async def _exit(self) -> int:
        # Process.wait() of Python 3.11 also waits for whoever inherited the pipes.
        while (code := self.process.returncode) is None:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        return code

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(4096):
            self._words.append(piece.decode("utf-8", "replace"))


def as_text(result: types.CallToolResult) -> str:
    """A tool's result as a policy reads it: texts and JSON as they are, and of anything else what it is."""
    parts = [_part(part) for part in result.content]
    if not parts and result.structuredContent is not None:
        parts = [json.dumps(result.structuredContent, ensure_ascii=False)]
    return "\n".join(parts)


def _part(part: Any) -> str:
    kind = part.type
    if kind == "text":
        return str(part.text)
    if kind in ("image", "audio"):
        return f"[{kind}: {part.mimeType}, {_size(part.data)} bytes, not shown]"
    if kind == "resource":
        resource = part.resource
        text = getattr(resource, "text", None)
        if text is not None:
            return f"[{resource.uri}]\n{text}"
        return f"[{resource.uri}: {resource.mimeType or 'binary'}, {_size(resource.blob)} bytes, not shown]"
    return f"[{part.name}: {part.uri}]"  # a link to a resource


def _size(base64: str) -> int:
    return len(base64) * 3 // 4 - base64[-2:].count("=")
