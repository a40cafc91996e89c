"""The host's end of what a sandbox's worker (:mod:`agentgym.sandboxes.guest`) says.

Invariant: what comes is bounded and never believed: a frame that is too long or of an unknown kind, and more
of them than were asked for, end the channel, and no content is parsed but fixed-width numbers. Reading never
stops, so a worker never waits for its host, one call never waits for another, and the event loop never waits
for more than one small piece to be taken apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import marshal
import os
from collections import deque
from collections.abc import Callable
from typing import Any

LONGEST = 4 << 20
"""Longest frame that a worker may send, in bytes."""

HEAD = 9
PIECE = 1 << 20
READ = 1 << 16
"""Bytes that are read at a time: they may be thousands of frames, and others wait meanwhile."""

OVERHEAD = 10
"""Bytes on the wire for each byte of content, at worst: one byte a frame."""

SPARE = 1 << 16
"""Bytes that every answer may have beyond its content: how it ended, and words of an error."""


class ChannelClosed(Exception):
    """The worker is gone, or broke the rules."""


class Call:
    """A request that waits for its answer.

    Args:
        number: Its number on the channel.
        on_frame: Called with the kind and the content of each frame of its answer.
        content: Bytes of content that the answer may have.
    """

    def __init__(self, number: int, on_frame: Callable[[bytes, bytes], None], content: int = 0) -> None:
        self.number = number
        self.on_frame = on_frame
        self.left = OVERHEAD * content + SPARE

    def allow(self, content: int) -> None:
        """Let the answer have more bytes of content."""
        self.left += OVERHEAD * content


class Channel:
    """Frames to and from one worker, on the running event loop.

    Args:
        incoming: File descriptor that it is read from; the channel owns it.
        outgoing: File descriptor that it is written to; may be the same one.
        on_end: Called once, when it ends, with what went wrong (empty: the worker hung up).
        unwrap: Takes what was read, and gives what the worker said of it; default: all.
    """

    def __init__(
        self,
        incoming: int,
        outgoing: int,
        on_end: Callable[[str], None],
        unwrap: Callable[[bytes], bytes] = bytes,
    ) -> None:
        self._in, self._out, self._on_end, self._unwrap = incoming, outgoing, on_end, unwrap
        os.set_blocking(incoming, False)
        os.set_blocking(outgoing, False)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._buffer = bytearray()
        self._waiting: deque[memoryview] = deque()
        self._closed = False
        # What may still come for calls that were given up.
        self._stray = SPARE
        self.version: asyncio.Future[str] = self._loop.create_future()
        self._loop.add_reader(incoming, self._read)

    def call(
        self, on_frame: Callable[[bytes, bytes], None], name: str, *arguments: Any, content: int = 0
    ) -> Call:
        """Ask for something whose answer has at most ``content`` bytes, beside how it ended.

        Raises:
            ChannelClosed: Nobody listens.
        """
        call = Call(next(self._numbers), on_frame, content)
        self._calls[call.number] = call
        self.tell(call, name, *arguments)
        return call

    def tell(self, call: Call, name: str, *arguments: Any) -> None:
        """Say something about a call that was made; raises as :meth:`call`."""
        # Version 2 of the format is read by every Python that may be inside.
        body = marshal.dumps((name, call.number, *arguments), 2)
        self._write(len(body).to_bytes(4, "big") + body)

    def send(self, data: bytes) -> None:
        """Send what is no request but has to come before the first; raises as :meth:`call`."""
        self._write(data)

    def forget(self, call: Call) -> None:
        """Drop whatever else is said of a call."""
        if self._calls.pop(call.number, None) is not None:
            self._stray += max(0, call.left)

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        self._end(None)

    @property
    def closed(self) -> bool:
        """Whether nobody listens any more."""
        return self._closed

    def _write(self, data: bytes) -> None:
        if self._closed:
            raise ChannelClosed
        if not self._waiting:
            try:
                data = data[os.write(self._out, data) :]
            except BlockingIOError:
                pass
            except OSError:
                # What it said before it went is read first.
                self._loop.call_soon(self._read)
                return
        if data:
            if not self._waiting:
                self._loop.add_writer(self._out, self._flush)
            self._waiting.append(memoryview(data))

    def _flush(self) -> None:
        while self._waiting:
            try:
                done = os.write(self._out, self._waiting[0][:PIECE])
            except BlockingIOError:
                return
            except OSError:
                self._waiting.clear()
                break
            self._waiting[0] = self._waiting[0][done:]
            if not self._waiting[0]:
                self._waiting.popleft()
        self._loop.remove_writer(self._out)

    def _read(self) -> None:
        if self._closed:
            return
        try:
            piece = os.read(self._in, READ)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._end("")
            return
        self._buffer += self._unwrap(piece)
        start = 0
        while not self._closed and len(self._buffer) - start >= HEAD:
            kind = bytes(self._buffer[start : start + 1])
            number = int.from_bytes(self._buffer[start + 1 : start + 5], "big")
            length = int.from_bytes(self._buffer[start + 5 : start + HEAD], "big")
            if length > LONGEST or kind not in b"hoexkf":
                self._end("it did not keep to the protocol")
                return
            if len(self._buffer) - start - HEAD < length:
                break
            self._take(kind, number, bytes(self._buffer[start + HEAD : start + HEAD + length]))
            start += HEAD + length
        del self._buffer[:start]

    def _take(self, kind: bytes, number: int, content: bytes) -> None:
        call = self._calls.get(number)
        if call is None:
            self._stray -= HEAD + len(content)
        else:
            call.left -= HEAD + len(content)
        if (self._stray if call is None else call.left) < 0:
            self._end("it said more than it was asked for")
        elif kind == b"h":
            if not self.version.done():
                self.version.set_result(content[:16].decode("ascii", "replace"))
        elif call is not None:
            if kind in (b"x", b"k", b"f"):
                del self._calls[number]
            try:
                call.on_frame(kind, content)
            except Exception as error:  # the caller's own; the others go on
                self._loop.call_exception_handler({"message": "on a sandbox's output", "exception": error})

    def _end(self, why: str | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._in)
        self._loop.remove_writer(self._out)
        for fd in {self._in, self._out}:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._waiting.clear()
        if not self.version.done():
            self.version.cancel()
        if why is not None:
            self._on_end(why)
