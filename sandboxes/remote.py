"""Sandboxes of another machine, over one WebSocket to a sandbox host (``agentgym sandbox serve``).

Invariants: an error there is the same kind of error here; a connection that is cut, or a host that says
nothing, is a failure of infrastructure and never a result; and the host closes what this process started when
this process goes or falls silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agentgym.errors import MissingDependency, SandboxFailed, UsageError
from agentgym.sandboxes import wire
from agentgym.sandboxes.base import (
    KEPT,
    MIB,
    SECONDS,
    Backend,
    ExecResult,
    OnOutput,
    PathRefused,
    Process,
    Sandbox,
    SandboxEnded,
    SandboxSpec,
    Snapshot,
    Stream,
    spec_to_json,
)
from agentgym.sandboxes.served import TRANSFER_SECONDS, walked

CONNECT_SECONDS = 20.0
START_SECONDS = 180.0
SLACK = 30.0
"""Seconds beyond a deadline after which a host that says nothing is given up."""

LARGEST = 1 << 30
_STREAMS: tuple[Stream, ...] = ("stdout", "stderr")


class RemoteBackend(Backend):
    """Sandboxes of a sandbox host.

    Args:
        url: ``http://host:port`` (or ``https://``, behind a proxy that speaks TLS).
        token: What the host wants to hear; default: ``$AGENTGYM_SANDBOX_TOKEN``.

    Raises:
        MissingDependency: websockets is not installed.
        UsageError: The address cannot be one, or there is no token.
    """

    name = "remote"
    tier = "none"

    def __init__(self, url: str, token: str | None = None) -> None:
        try:
            import websockets  # noqa: F401
        except ImportError as error:
            raise MissingDependency("websockets", "serve") from error
        self.url = url.rstrip("/")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UsageError(f"{url!r} is no sandbox host", hint="write it like http://machine:8010")
        self._token = token or os.environ.get("AGENTGYM_SANDBOX_TOKEN", "")
        if not self._token:
            raise UsageError(
                f"the sandbox host {url} wants its token", hint="give token, or set AGENTGYM_SANDBOX_TOKEN"
            )
        self._line: Line | None = None
        self._connecting = asyncio.Lock()
        self._sandboxes: set[RemoteSandbox] = set()
        self._closed = False

    async def start(
        self, spec: SandboxSpec | None = None, *, owner: str = "", snapshot: Snapshot | None = None
    ) -> Sandbox:
        """See :meth:`Backend.start`; the links of ``source`` may not lead out of it."""
        spec = spec or (snapshot.spec if snapshot else SandboxSpec())
        line = await self._connected()
        wanted = spec_to_json(replace(spec, source=None))
        kept = None if snapshot is None else snapshot.id
        told, _ = await line.ask("start", START_SECONDS, spec=wanted, owner=owner, snapshot=kept)
        made = self.made(line, told, spec)
        if spec.source is not None and snapshot is None:
            try:
                await made.upload(spec.source, spec.workdir)
            except BaseException:
                await made.close()
                raise
        return made

    async def forget(self, snapshot: Snapshot) -> None:
        """See :meth:`Backend.forget`."""
        if self._line is not None and not self._line.problem:
            await self._line.ask("forget", snapshot=snapshot.id)

    async def aclose(self) -> None:
        """See :meth:`Backend.aclose`."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(sandbox.close() for sandbox in list(self._sandboxes)))
        if self._line is not None:
            await self._line.close()

    def abandon(self) -> None:
        """See :meth:`Backend.abandon`: the host ends them with the connection, which ends with its loop."""

    def made(self, line: Line, told: wire.Head, spec: SandboxSpec) -> RemoteSandbox:
        """The sandbox that the host has started."""
        self.tier = told["tier"] if told.get("tier") in ("isolated", "weak") else "none"
        self.enforces = frozenset(map(str, told.get("enforces", ())))
        return RemoteSandbox(self, line, str(told["id"]), spec)

    async def _connected(self) -> Line:
        if self._closed:
            raise UsageError("this backend is closed", hint="make a new one")
        async with self._connecting:
            if self._line is None or self._line.problem:
                self._line = await Line.open(self.url, self._token)
            return self._line


class Line:
    """A connection: requests, and the answers to them.

    Attributes:
        problem: Why it is cut; empty while it holds.
        boxes: Where the sandboxes' ends are told to, by id.
    """

    def __init__(self, socket: Any, url: str, lease: float) -> None:
        self._socket, self._url = socket, url
        self.problem = ""
        self.boxes: dict[str, Callable[[str], None]] = {}
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[wire.Answer]] = {}
        self._events: dict[int, Callable[[wire.Head, bytes], None]] = {}
        self._sending = asyncio.Lock()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._live(lease))]

    @classmethod
    async def open(cls, url: str, token: str) -> Line:
        """Connect.

        Raises:
            SandboxFailed: The host cannot be reached, or is none.
            UsageError: It does not take the token.
        """
        import websockets
        from websockets.asyncio.client import connect

        address = f"ws{url.removeprefix('http')}{wire.PATH}"
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                socket = await connect(
                    address,
                    additional_headers={"Authorization": f"Bearer {token}"},
                    max_size=wire.LONGEST,
                    compression=None,
                    proxy=None,
                )
                hello = wire.Gathering(0).take(_bytes(await socket.recv()))
        except websockets.InvalidStatus as error:
            if error.response.status_code in (401, 403):
                raise UsageError(f"the sandbox host {url} does not take this token") from error
            raise SandboxFailed(f"there is no sandbox host at {url}: {error}") from error
        except (OSError, TimeoutError, websockets.WebSocketException, wire.WireError) as error:
            raise SandboxFailed(
                f"the sandbox host {url} cannot be reached: {error or type(error).__name__}",
                hint="start it with `agentgym sandbox serve`",
            ) from error
        lease = hello[0].get("lease") if hello else None
        if not isinstance(lease, int | float) or not lease > 0:
            await socket.close()
            raise SandboxFailed(f"there is no sandbox host at {url}: it does not greet like one")
        return cls(socket, url, float(lease))

    async def ask(
        self,
        do: str,
        seconds: float = SECONDS,
        /,
        *,
        blob: bytes = b"",
        number: int | None = None,
        on_event: Callable[[wire.Head, bytes], None] | None = None,
        **given: Any,
    ) -> wire.Answer:
        """Have something done.

        Args:
            do: What.
            seconds: Its deadline on the host; here it is longer by :data:`SLACK`.
            blob: Its bytes.
            number: Of a request that has begun (see :meth:`number`).
            on_event: Called with what comes ahead of the answer.
            given: Its arguments.

        Raises:
            SandboxFailed: The connection is cut, or the host failed or says nothing.
            Exception: What the host raised.
        """
        number = self.number() if number is None else number
        future: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        if on_event is not None:
            self._events[number] = on_event
        try:
            async with asyncio.timeout(seconds + SLACK):
                await self.send({"n": number, "do": do, **given}, blob)
                head, content = await future
        except TimeoutError:
            raise SandboxFailed(
                f"the sandbox host {self._url} did not answer within {seconds + SLACK:g} s"
            ) from None
        except asyncio.CancelledError:
            with contextlib.suppress(SandboxFailed):
                # Shielded: whoever cancels does not wait, and the host has to hear it.
                await asyncio.shield(self.send({"n": number, "do": "cancel"}))
            raise
        finally:
            self._waiting.pop(number, None)
            self._events.pop(number, None)
        if "box" in given and head.get("ended") and (tell := self.boxes.get(given["box"])):
            tell(str(head["ended"]))
        if "error" in head:
            raise wire.raised(head["error"])
        return head, content

    def number(self) -> int:
        """A request's number."""
        return next(self._numbers)

    async def send(self, head: wire.Head, blob: bytes = b"") -> None:
        """Send a request, or a piece of one.

        Raises:
            SandboxFailed: The connection is cut.
        """
        import websockets

        for message in wire.messages(head, blob):
            if self.problem:
                raise SandboxFailed(self.problem)
            try:
                async with self._sending:
                    await self._socket.send(message)
            except websockets.WebSocketException as error:
                await self._cut(error)
                raise SandboxFailed(self.problem) from error

    async def close(self) -> None:
        """Hang up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._cut("it was closed")
        await self._socket.close()

    async def _listen(self) -> None:
        import websockets

        gathering = wire.Gathering(LARGEST)
        try:
            while True:
                if (taken := gathering.take(_bytes(await self._socket.recv()))) is not None:
                    self._take(*taken)
        except (websockets.WebSocketException, wire.WireError) as error:
            await self._cut(error)
            await self._socket.close()

    def _take(self, head: wire.Head, blob: bytes) -> None:
        number = head.get("n")
        if number == 0:
            ended = head.get("ended")
            for id, why in ended.items() if isinstance(ended, dict) else ():
                if (tell := self.boxes.get(id)) is not None:
                    tell(str(why))
        elif number in self._events and ("out" in head or "entry" in head):
            try:
                self._events[number](head, blob)
            except Exception as error:
                # The caller's own: it is raised there, and the connection goes on.
                if not self._waiting[number].done():
                    self._waiting[number].set_exception(error)
        elif (future := self._waiting.get(int(number or 0))) is not None and not future.done():
            future.set_result((head, blob))

    async def _live(self, lease: float) -> None:
        while not self.problem:
            await asyncio.sleep(lease / 4)
            with contextlib.suppress(SandboxFailed):
                await self.send({"n": 0, "do": "alive"})

    async def _cut(self, why: object) -> None:
        self.problem = self.problem or f"the connection to the sandbox host {self._url} is cut: {why}"
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SandboxFailed(self.problem))


class RemoteSandbox(Sandbox):
    """One sandbox on a host."""

    backend = "remote"

    def __init__(self, home: RemoteBackend, line: Line, id: str, spec: SandboxSpec) -> None:
        self.id, self.spec = id, spec
        self._home, self._line = home, line
        self._ended = ""
        self._closed = False
        line.boxes[id] = self._note
        home._sandboxes.add(self)

    def _note(self, why: str) -> None:
        self._ended = self._ended or why

    @property
    def ended(self) -> str:
        """Why it ended, as far as the host has told; empty while it runs."""
        return self._ended

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

        def event(head: wire.Head, blob: bytes) -> None:
            if on_output is not None and head.get("out") in _STREAMS:
                on_output(head["out"], blob)

        head, blob = await self._ask(
            "exec",
            seconds,
            blob=stdin,
            on_event=event,
            stream=on_output is not None,
            seconds=seconds,
            limit=limit,
            **_command(command, cwd, env),
        )
        try:
            made = {name: head["result"][name] for name in wire.RESULT}
            cut = int(head["out_bytes"])
            return ExecResult(blob[:cut].decode(), blob[cut:].decode(), **made)
        except (KeyError, TypeError, ValueError) as error:
            raise SandboxFailed("the sandbox host's answer cannot be read") from error

    async def open(
        self, command: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """See :meth:`Sandbox.open`."""
        number = self._line.number()
        await self._ask("open", number=number, **_command(list(command), cwd, env))
        return _Process(self, number)

    async def read(self, path: str, *, limit: int = 16 * MIB) -> bytes:
        """See :meth:`Sandbox.read`."""
        return (await self._ask("read", TRANSFER_SECONDS, path=path, limit=limit))[1]

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """See :meth:`Sandbox.write`."""
        content = data.encode() if isinstance(data, str) else data
        await self._ask("write", TRANSFER_SECONDS, blob=content, path=path, mode=mode)

    async def upload(self, source: Path, target: str) -> None:
        """See :meth:`Sandbox.upload`."""
        self._check()
        number, entries = self._line.number(), wire.laden(source)
        first = await asyncio.to_thread(next, entries)
        # Nothing is sent of what cannot be sent whole.
        await asyncio.to_thread(lambda: [None for _ in walked(source)])
        entry: Any = first
        while entry is not None:
            await self._line.send({"n": number, "do": "entry", "entry": entry[0]}, entry[1])
            entry = await asyncio.to_thread(next, entries, None)
        await self._ask("upload", TRANSFER_SECONDS, number=number, target=target)

    async def download(
        self, source: str, target: Path, *, max_bytes: int = 64 * MIB, max_files: int = 10_000
    ) -> None:
        """See :meth:`Sandbox.download`."""
        if os.path.lexists(target):  # noqa: ASYNC240
            raise UsageError(f"{target} is there already", hint="give a new name")
        self._check()
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        landing = wire.Landing(made / "copy", max_bytes, max_files)

        def event(head: wire.Head, blob: bytes) -> None:
            try:
                landing.take(head.get("entry"), blob)
            except PathRefused as error:
                landing.problem = landing.problem or error

        try:
            wanted = {"source": source, "max_bytes": max_bytes, "max_files": max_files}
            await self._ask("download", TRANSFER_SECONDS, on_event=event, **wanted)
            if landing.problem is not None:
                raise landing.problem
            await asyncio.to_thread(landing.finish)
            (made / "copy").rename(target)
        finally:
            await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)

    async def snapshot(self) -> Snapshot:
        """See :meth:`Sandbox.snapshot`."""
        told, _ = await self._ask("snapshot", TRANSFER_SECONDS)
        return Snapshot(str(told.get("id")), self.backend, self.spec)

    async def restore(self, snapshot: Snapshot) -> None:
        """See :meth:`Sandbox.restore`."""
        await self._ask("restore", START_SECONDS, snapshot=snapshot.id)
        self._ended = ""

    async def fork(self) -> Sandbox:
        """See :meth:`Sandbox.fork`."""
        told, _ = await self._ask("fork", START_SECONDS)
        return self._home.made(self._line, told, self.spec)

    async def close(self) -> None:
        """See :meth:`Sandbox.close`."""
        if self._closed:
            return
        self._closed = True
        self._home._sandboxes.discard(self)
        self._line.boxes.pop(self.id, None)
        # Where the line is cut the host closes it by itself.
        with contextlib.suppress(SandboxFailed, UsageError):
            await self._line.ask("close", box=self.id)

    def _check(self) -> None:
        if self._closed:
            raise UsageError(f"the sandbox {self.id} is closed", hint="start another one")

    async def _ask(self, do: str, seconds_: float = SECONDS, /, **given: Any) -> wire.Answer:
        self._check()
        return await self._line.ask(do, seconds_, box=self.id, **given)


class _Process(Process):
    def __init__(self, sandbox: RemoteSandbox, number: int) -> None:
        self._sandbox, self._number = sandbox, number

    async def write(self, data: bytes) -> None:
        await self._sandbox._ask("stdin", blob=data, p=self._number)

    async def read(self, seconds: float) -> tuple[Stream, bytes] | None:
        if self.returned is not None:
            return None
        told, piece = await self._sandbox._ask("next", seconds, p=self._number, seconds=seconds)
        if told.get("out") in _STREAMS:
            return told["out"], piece
        self.returned = int(told.get("returned", 255))
        return None

    async def signal(self, number: int) -> None:
        await self._sandbox._ask("signal", p=self._number, signal=number)

    async def close(self) -> None:
        with contextlib.suppress(SandboxEnded, SandboxFailed, UsageError):
            await self._sandbox._ask("end", p=self._number)


def _command(command: Sequence[str] | str, cwd: str | None, env: Mapping[str, str] | None) -> dict[str, Any]:
    return {
        "command": command if isinstance(command, str) else list(command),
        "cwd": cwd,
        "env": None if env is None else dict(env),
    }


def _bytes(data: str | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.encode()
