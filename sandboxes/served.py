"""A sandbox that is spoken to through the worker inside it.

Invariant: how a sandbox ended is decided once, by its backend, from evidence outside the sandbox: either the
code inside did it, and then commands have results and files are refused, or the machinery around it broke,
and then :class:`~agentgym.errors.SandboxFailed` is raised. Deadlines are kept inside, and again here, for a
worker that does not keep them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import shutil
import stat
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentgym.errors import SandboxFailed, UsageError
from agentgym.sandboxes.base import (
    KEPT,
    MIB,
    SECONDS,
    ExecResult,
    OnOutput,
    PathRefused,
    Process,
    Sandbox,
    SandboxEnded,
    SandboxSpec,
    Stream,
)
from agentgym.sandboxes.channel import Call, Channel, ChannelClosed

SLACK = 15.0
"""Seconds beyond a deadline after which a worker that says nothing is given up."""

FILE_SECONDS = 60.0
"""Deadline of one file operation."""

TRANSFER_SECONDS = 600.0
"""Deadline of one download: each of its files may come slowly, but not all of them."""

DEEPEST = 100
"""How deep folders may lie in each other in a download."""

LONGEST_ENTRY = 2 * 4096 + 64
"""Bytes of one entry of a listing: a name, a link's target, and numbers."""

CHUNK = 2 * MIB
CREDIT = 256 * 1024
IN_FLIGHT = 32
STREAMS: dict[bytes, Stream] = {b"o": "stdout", b"e": "stderr"}


class End(NamedTuple):
    """How a sandbox ended.

    Attributes:
        why: In words.
        outside: Whether the machinery around it broke; otherwise the code inside did it.
    """

    why: str
    outside: bool = False


class ServedSandbox(Sandbox):
    """The part of the contract that the worker inside serves; a backend adds how it starts and ends.

    Args:
        id: Its name on this machine.
        spec: What it is made of.
    """

    def __init__(self, id: str, spec: SandboxSpec) -> None:
        self.id, self.spec = id, spec
        self._channel: Channel | None = None
        self._end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._judging: asyncio.Task[None] | None = None
        self._closed = False
        self._closing: asyncio.Task[None] | None = None

    # What a backend adds --------------------------------------------------------------------

    @abstractmethod
    async def _verdict(self, why: str) -> End:
        """How the sandbox ended, now that its worker is gone; see that nothing of it is left running.

        Args:
            why: What was wrong with the worker; empty where it only hung up.
        """

    @abstractmethod
    async def _close(self) -> None:
        """End everything inside and remove what was made; called once."""

    def _attach(self, incoming: int, outgoing: int, unwrap: Callable[[bytes], bytes] = bytes) -> None:
        """Speak to the worker over these file descriptors; ``unwrap``: see :class:`Channel`."""
        self._end = asyncio.get_running_loop().create_future()
        self._channel = Channel(incoming, outgoing, self._hung_up, unwrap)

    def _detach(self) -> None:
        """Stop speaking; whoever waits is told that the sandbox was closed."""
        if self._channel is not None:
            self._channel.close()
        if not self._end.done():
            self._end.set_result(End("it was closed"))

    async def _greeted(self, seconds: float) -> str:
        """Wait for the worker; returns its Python's version.

        Raises:
            SandboxFailed: It does not come.
        """
        assert self._channel is not None
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self._channel.version)
        except TimeoutError:
            raise SandboxFailed(f"the sandbox {self.id} did not start within {seconds:g} s") from None
        except asyncio.CancelledError:
            if not self._channel.closed:
                raise
            end = await self._end
            raise SandboxFailed(f"the sandbox {self.id} did not start: {end.why}") from None

    def _hung_up(self, why: str) -> None:
        if not self._end.done():
            self._judging = asyncio.get_running_loop().create_task(self._judge(why))

    async def _judge(self, why: str) -> None:
        try:
            end = await self._verdict(why)
        except Exception as error:
            end = End(f"nobody knows how: {error}", outside=True)
        if not self._end.done():
            self._end.set_result(end)

    # The contract ---------------------------------------------------------------------------

    @property
    def ended(self) -> str:
        """Why it ended; empty while it runs."""
        return self._end.result().why if self._end.done() else ""

    async def exec(
        self,
        command: Sequence[str] | str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        seconds: float = SECONDS,
        limit: int = KEPT,
        on_output: OnOutput | None = None,
    ) -> ExecResult:
        """See :meth:`Sandbox.exec`."""
        if not seconds > 0:
            raise UsageError(f"the deadline of a command is {seconds}", hint="give seconds above 0")
        self._check()
        kept = {b"o": bytearray(), b"e": bytearray()}
        left = {b"o": limit, b"e": limit}
        done: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()

        def take(kind: bytes, content: bytes) -> None:
            if kind in kept:
                content = content[: left[kind]]
                left[kind] -= len(content)
                kept[kind] += content
                if on_output is not None and content and not done.done():
                    try:
                        on_output(STREAMS[kind], content)
                    except Exception as error:
                        # The caller's own: it is raised there, and the channel goes on.
                        done.set_exception(error)
            elif not done.done():
                if kind == b"f":
                    kept[b"e"] += content[:KEPT]
                done.set_result(_numbers(content) if kind == b"x" else (127 + 256, 0, 0, 0, 0))

        started = asyncio.get_running_loop().time()
        asked = self._started(command, cwd, env)
        call = self._call(take, "exec", *asked, stdin, seconds, limit, content=2 * limit)
        try:
            answer = await self._answer(done, seconds + SLACK)
        except BaseException:
            with contextlib.suppress(ChannelClosed):
                self._speaking.tell(call, "signal", 9)
            raise
        finally:
            self._speaking.forget(call)
        told = [kept[kind].decode("utf-8", "replace") for kind in (b"o", b"e")]
        if isinstance(answer, End):
            took = asyncio.get_running_loop().time() - started
            return ExecResult(told[0], told[1], -9, ended=answer.why, seconds=took)
        code, flags, cut_out, cut_err, took_us = answer
        return ExecResult(told[0], told[1], code - 256, bool(flags & 1), "", cut_out, cut_err, took_us / 1e6)

    async def open(
        self, command: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """See :meth:`Sandbox.open`."""
        self._check()
        return _Process(self, *self._started(command, cwd, env))

    async def read(self, path: str, *, limit: int = 16 * MIB) -> bytes:
        """See :meth:`Sandbox.read`."""
        return await self._gather(path, limit, "read", self._inside(path), limit)

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """See :meth:`Sandbox.write`."""
        data = data.encode() if isinstance(data, str) else data
        inside = self._inside(path)
        for start in range(0, max(1, len(data)), CHUNK):
            piece = data[start : start + CHUNK]
            await self._gather(path, 0, "write", inside, piece, mode, start == 0)

    async def upload(self, source: Path, target: str) -> None:
        """See :meth:`Sandbox.upload`."""
        entries = await asyncio.to_thread(lambda: list(walked(source)))
        for entry in entries:
            if entry.kind == "folder":
                await self._gather(target, 0, "folder", self._inside(target, entry.name), entry.mode)
        pending: set[asyncio.Task[None]] = set()
        try:
            for entry in entries:
                if entry.kind != "folder":
                    pending.add(asyncio.create_task(self._copy_in(entry, target)))
                if len(pending) >= IN_FLIGHT:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            for task in list(pending):
                await task
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def download(
        self, source: str, target: Path, *, max_bytes: int = 64 * MIB, max_files: int = 10_000
    ) -> None:
        """See :meth:`Sandbox.download`."""
        if os.path.lexists(target):  # noqa: ASYNC240
            raise UsageError(f"{target} is there already", hint="give a new name")
        inside = self._inside(source)
        most = min(64 * MIB, (max_files + 2) * LONGEST_ENTRY)
        listing = await self._gather(source, most, "list", inside, max_files)
        entries = await asyncio.to_thread(_entries, listing, source, max_files + 1)
        if len(entries) > max_files:
            raise PathRefused(f"{source} holds more than {max_files} files and folders")
        if (size := sum(entry.size for entry in entries)) > max_bytes:
            raise PathRefused(f"{source} holds {size} bytes, and {max_bytes} are allowed")
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            root = made / "copy"
            try:
                async with asyncio.timeout(TRANSFER_SECONDS):
                    await self._copy_out(inside, entries, root, max_bytes)
            except TimeoutError:
                raise PathRefused(f"{source} did not come within {TRANSFER_SECONDS:g} s") from None
            except (FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise PathRefused(f"{source}: its listing contradicts itself: {error}") from error
            root.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    async def close(self) -> None:
        """See :meth:`Sandbox.close`; once begun it goes on, whoever stops waiting for it."""
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    # Its parts ------------------------------------------------------------------------------

    @property
    def _speaking(self) -> Channel:
        assert self._channel is not None
        return self._channel

    def _check(self) -> None:
        if self._closed:
            raise UsageError(f"the sandbox {self.id} is closed", hint="start another one")
        if self._end.done():
            raise _raised(self._end.result())

    def _call(self, take: Any, name: str, *arguments: Any, content: int) -> Call:
        try:
            return self._speaking.call(take, name, *arguments, content=content)
        except ChannelClosed:
            # It is being found out how it ended; whoever waits for the answer waits for that.
            return Call(0, take)

    async def _answer(self, done: asyncio.Future[Any], seconds: float) -> Any:
        """What ``done`` gets, or how the sandbox ended.

        Raises:
            SandboxFailed: The machinery around it broke.
        """
        await asyncio.wait({done, self._end}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        if not self._end.done():
            if not self._speaking.closed:
                self._speaking.close()
                self._hung_up("it stopped answering")
            async with asyncio.timeout(SLACK):
                await asyncio.shield(self._end)
        end = self._end.result()
        if end.outside:
            raise _raised(end)
        return end

    async def _gather(self, path: str, limit: int, name: str, *arguments: Any) -> bytes:
        """The content of an answer that is content.

        Raises:
            PathRefused: The worker says no, or sends more than ``limit`` bytes.
        """
        self._check()
        gathered = bytearray()
        done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        left = limit

        def take(kind: bytes, content: bytes) -> None:
            nonlocal left
            if kind == b"o":
                left -= len(content)
                if left < 0:
                    gathered.clear()
                    self._speaking.forget(call)
                    if not done.done():
                        done.set_result(f"it is larger than {limit} bytes".encode())
                else:
                    gathered.extend(content)
            elif not done.done():
                done.set_result(content if kind == b"f" else None)

        call = self._call(take, name, *arguments, content=limit)
        try:
            problem = await self._answer(done, FILE_SECONDS)
        finally:
            self._speaking.forget(call)
        if isinstance(problem, End):
            raise _raised(problem)
        if problem is not None:
            raise PathRefused(f"{path}: {problem[:300].decode('utf-8', 'replace')}")
        return bytes(gathered)

    def _started(
        self, command: Sequence[str] | str, cwd: str | None, env: Mapping[str, str] | None
    ) -> tuple[list[str], str, dict[str, str]]:
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        if not argv or any("\0" in part for part in argv):
            raise UsageError(f"{argv!r} is no command")
        folder = self._inside(cwd) if cwd is not None else self._inside(".")
        return argv, folder, {**self._variables(), **self.spec.env, **(env or {})}

    def _variables(self) -> dict[str, str]:
        """The variables of every command."""
        return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}

    def _inside(self, *parts: str) -> str:
        """A path inside, absolute."""
        joined = posixpath.normpath(posixpath.join(self.spec.workdir, *parts))
        if "\0" in joined:
            raise PathRefused(f"{joined!r} is no path")
        return joined

    async def _copy_in(self, entry: _Entry, target: str) -> None:
        inside = self._inside(target, entry.name)
        if entry.kind == "link":
            await self._gather(target, 0, "link", entry.link, inside)
            return
        data = await asyncio.to_thread(entry.place.read_bytes)
        await self.write(inside, data, mode=entry.mode)

    async def _copy_out(self, inside: str, entries: list[_Entry], root: Path, max_bytes: int) -> None:
        single = len(entries) == 1 and entries[0].name == ""
        if not single:
            root.mkdir()  # noqa: ASYNC240
        left = max_bytes
        names = {entry.name for entry in entries}
        for entry in entries:
            place = root / entry.name if entry.name else root
            if entry.kind == "folder":
                place.mkdir(parents=True, exist_ok=True)
            elif entry.kind == "file":
                path = posixpath.join(inside, entry.name) if entry.name else inside
                data = await self.read(path, limit=min(left, max(entry.size, 0)))
                left -= len(data)
                place.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                with os.fdopen(fd, "wb") as sink:
                    sink.write(data)
                place.chmod(entry.mode & 0o755 | 0o600)
        # Last: nothing is written through them.
        for entry in entries:
            if entry.kind == "link" and not single:
                led = posixpath.normpath(posixpath.join(posixpath.dirname(entry.name), entry.link))
                # A step up from behind another link leads elsewhere than its words say.
                plain = ".." not in entry.link.lstrip("./").split("/")
                if not entry.link.startswith("/") and plain and (led in names or led == "."):
                    (root / entry.name).parent.mkdir(parents=True, exist_ok=True)
                    (root / entry.name).symlink_to(entry.link)
        if single and not os.path.lexists(root):  # noqa: ASYNC240
            raise PathRefused(f"{inside} is no regular file")


class _Process(Process):
    def __init__(self, sandbox: ServedSandbox, argv: list[str], cwd: str, env: dict[str, str]) -> None:
        # A sandbox that was restored speaks over another one, where this number is another call's.
        self._sandbox, self._channel = sandbox, sandbox._speaking
        self._output: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        self._held = 0
        self._call = sandbox._call(self._take, "exec", argv, cwd, env, None, 0, CREDIT, content=2 * CREDIT)

    def _take(self, kind: bytes, content: bytes) -> None:
        if kind not in STREAMS:
            self._output.put_nowait((kind, content))
        elif content and self._held + len(content) <= 2 * CREDIT:  # a worker that keeps to it sends no more
            self._held += len(content)
            self._output.put_nowait((kind, content))

    async def write(self, data: bytes) -> None:
        self._tell("stdin", data)

    async def read(self, seconds: float) -> tuple[Stream, bytes] | None:
        if self._output.empty() and self._channel is not self._sandbox._channel:
            self.returned = -9  # the sandbox was restored
        if self.returned is not None and self._output.empty():
            return None
        waiting: asyncio.Future[tuple[bytes, bytes]] = asyncio.ensure_future(self._output.get())
        try:
            both: set[asyncio.Future[Any]] = {waiting, self._sandbox._end}
            found = await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if not waiting.done() or waiting.cancelled():
            if self._sandbox._end in found[0]:
                raise _raised(self._sandbox._end.result())
            raise TimeoutError
        kind, content = waiting.result()
        if kind in STREAMS:
            self._held -= len(content)
            if self._sandbox._end.done() is False:
                self._call.allow(len(content))
                self._tell("more", kind, len(content))
            return STREAMS[kind], content
        self.returned = _numbers(content)[0] - 256 if kind == b"x" else 127
        return ("stderr", content) if kind == b"f" and content else None

    async def signal(self, number: int) -> None:
        self._tell("signal", number)

    async def close(self) -> None:
        with contextlib.suppress(SandboxEnded, SandboxFailed, UsageError):
            self._tell("signal", 9)
        self._channel.forget(self._call)

    def _tell(self, name: str, *arguments: Any) -> None:
        self._sandbox._check()
        with contextlib.suppress(ChannelClosed):
            self._channel.tell(self._call, name, *arguments)


class _Entry(NamedTuple):
    kind: str
    name: str
    mode: int
    size: int
    link: str
    place: Path


def walked(source: Path) -> Iterator[_Entry]:
    """What lies under ``source``, folders before what is in them."""
    if not source.exists():
        raise UsageError(f"{source} is not there")
    if source.is_file():
        yield _Entry("file", "", stat.S_IMODE(source.stat().st_mode), source.stat().st_size, "", source)
        return
    root = source.resolve()
    yield _Entry("folder", ".", 0o755, 0, "", source)
    for folder, folders, files in os.walk(source):
        for name in sorted(folders + files):
            place = Path(folder, name)
            inside = str(place.relative_to(source))
            found = place.lstat()
            mode = stat.S_IMODE(found.st_mode) & 0o777
            if place.is_symlink():
                link = os.readlink(place)
                # Path.resolve raises for links in a circle, which untrusted code may have left.
                led = Path(os.path.realpath(place.parent / link))
                if os.path.isabs(link) or not (led == root or root in led.parents):
                    raise UsageError(f"the link {place} leads out of {source}", hint="copy what it names")
                yield _Entry("link", inside, mode, 0, link, place)
            elif stat.S_ISDIR(found.st_mode):
                yield _Entry("folder", inside, mode | 0o700, 0, "", place)
            elif stat.S_ISREG(found.st_mode):
                yield _Entry("file", inside, mode, found.st_size, "", place)
            else:
                raise UsageError(f"{place} is no file, folder or link")


def _entries(listing: bytes, source: str, most: int) -> list[_Entry]:
    """What a worker says is there, checked name by name; no more than ``most``.

    Raises:
        PathRefused: It cannot be.
    """
    refused = PathRefused(f"{source}: its listing cannot be read")
    entries: list[_Entry] = []
    parts = _parts(listing)
    for part in parts:
        try:
            kind, mode, size, name = part.split(b" ", 3)
            link = next(parts) if kind == b"l" and name else b""
            entry = _Entry(
                {b"d": "folder", b"f": "file", b"l": "link"}.get(kind, "other"),
                os.fsdecode(name),
                int(mode, 8) & 0o777,
                int(size),
                os.fsdecode(link),
                Path(),
            )
        except (ValueError, StopIteration):
            raise refused from None
        steps = name.split(b"/")
        if entry.size < 0 or (name and any(step in (b"", b".", b"..") or len(step) > 255 for step in steps)):
            raise refused
        if len(steps) > DEEPEST or len(name) > 3000 or len(link) > 4095:
            raise PathRefused(f"{source}: its folders lie more than {DEEPEST} deep")
        entries.append(entry)
        if len(entries) >= most:
            break
    links = {entry.name for entry in entries if entry.kind == "link"}
    if links and any(above in links for entry in entries for above in _above(entry.name)):
        raise refused
    return entries


def _parts(listing: bytes) -> Iterator[bytes]:
    at = 0
    while (until := listing.find(b"\0", at)) >= 0:
        yield listing[at:until]
        at = until + 1


def _above(name: str) -> Iterator[str]:
    """The folders that a relative name lies in."""
    at = name.find("/")
    while at >= 0:
        yield name[:at]
        at = name.find("/", at + 1)


def _numbers(content: bytes) -> tuple[int, ...]:
    read = tuple(int.from_bytes(content[at : at + 8], "big") for at in range(0, len(content), 8))
    return read if len(read) == 5 and read[0] <= 512 else (255 + 256, 0, 0, 0, 0)


def _raised(end: End) -> Exception:
    return SandboxFailed(f"the sandbox broke: {end.why}") if end.outside else SandboxEnded(end.why)
