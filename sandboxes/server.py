"""A sandbox host: sandboxes of this machine for clients on others, over one WebSocket a client.

Invariants: nobody gets in without the token; what a client asks for is made of the host's own images and
files that the client sends, never of the host's folders or its network; and a client's sandboxes live as long
as its connection, which ends when it is silent for longer than its lease.

Every request is a task of its own, but what is sent to one process keeps its order.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

import agentgym
from agentgym.errors import SandboxFailed, UsageError
from agentgym.sandboxes import wire
from agentgym.sandboxes.base import (
    Backend,
    ExecResult,
    Process,
    Sandbox,
    SandboxSpec,
    Snapshot,
    spec_from_json,
)
from agentgym.sandboxes.scratch import Scratch
from agentgym.sandboxes.wire import Answer, Head
from agentgym.serving.access import Access
from agentgym.serving.run import ended_by_signals, http_server, listen, url_of

if TYPE_CHECKING:
    import uvicorn

REQUESTS = 1024
"""Requests of one client at a time."""

GIB = 1 << 30


@dataclass(frozen=True)
class HostConfig:
    """A sandbox host.

    Attributes:
        token: What clients must know.
        host: Address to listen at.
        port: Port; 0 takes a free one.
        sandboxes: How many there may be at a time, of all clients together.
        lease: Seconds of a client's silence after which its sandboxes are closed.
        max_bytes: Most that a client may send, or have sent, in one request.
        max_files: Most files and folders of one request.

    Raises:
        UsageError: The token is too short, or the lease not positive.
    """

    token: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 8010
    sandboxes: int = 64
    lease: float = 60.0
    max_bytes: int = GIB
    max_files: int = 100_000

    def __post_init__(self) -> None:
        if len(self.token.strip()) < 16:
            raise UsageError("the token is too short", hint="give 16 characters or more, drawn at random")
        if not self.lease > 0:
            raise UsageError(f"the lease is {self.lease}", hint="give seconds above 0")


def serve(
    config: HostConfig, make: Callable[[], Backend], started: Callable[[str], None] = lambda url: None
) -> None:
    """Serve until a signal ends it.

    Args:
        config: The host.
        make: Makes the backend of its sandboxes, which is closed at the end.
        started: Called with the host's URL once clients can connect.

    Raises:
        MissingDependency: The extra ``serve`` is not installed.
        UsageError: The address cannot be used.
    """
    with contextlib.closing(listen(config.host, config.port)) as listening:

        async def run() -> None:
            async with make() as backend:
                server = build(config, backend, lambda: started(url_of(listening)))
                with ended_by_signals(server):
                    await server.serve(sockets=[listening])

        asyncio.run(run())


def build(config: HostConfig, backend: Backend, started: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """The server of ``config``, for a caller that runs it on its own event loop; the backend stays open."""
    return http_server(
        create_app(config, backend),
        max_bytes=wire.LONGEST,
        ping_interval=20.0,
        ping_timeout=60.0,
        started=started,
    )


def create_app(config: HostConfig, backend: Backend) -> FastAPI:
    """The application of a host."""
    clients: set[Client] = set()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.gather(*(client.close() for client in list(clients)))

    app = FastAPI(title="A sandbox host", version=agentgym.__version__, lifespan=lifespan, docs_url=None)
    app.add_middleware(Access, token=config.token, max_bytes=wire.LONGEST)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.websocket(wire.PATH)
    async def connected(socket: WebSocket) -> None:
        client = Client(config, backend, socket, lambda: sum(len(c.boxes) for c in clients))
        clients.add(client)
        try:
            await client.serve()
        finally:
            await asyncio.shield(client.close())
            clients.discard(client)

    return app


class Client:
    """One connection, and what was started over it.

    Args:
        config: The host's.
        backend: Where its sandboxes are started.
        socket: The connection.
        count: How many sandboxes all clients have.
    """

    def __init__(
        self, config: HostConfig, backend: Backend, socket: WebSocket, count: Callable[[], int]
    ) -> None:
        self._config, self._backend, self._socket, self._count = config, backend, socket, count
        self.boxes: dict[str, Sandbox | None] = {}
        self._processes: dict[int, Process] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._uploads: dict[int, tuple[Scratch, wire.Landing]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sending = asyncio.Lock()
        self._heard = asyncio.get_running_loop().time()
        self._closed = False

    async def serve(self) -> None:
        """Answer until the client goes, is silent for too long or breaks the rules."""
        await self._socket.accept()
        watch = asyncio.create_task(self._watch())
        gathering = wire.Gathering(self._config.max_bytes)
        try:
            await self._send({"hello": self._backend.name, "lease": self._config.lease})
            while True:
                data = await self._socket.receive_bytes()
                self._heard = asyncio.get_running_loop().time()
                if (taken := gathering.take(data)) is not None:
                    await self._take(*taken)
        except (WebSocketDisconnect, wire.WireError, KeyError, RuntimeError):
            # Gone, or it spoke of what it may not: its sandboxes are closed either way.
            pass
        finally:
            watch.cancel()
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self._socket.close(1008)

    async def close(self) -> None:
        """End everything that was started over this connection; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        boxes = [box for box in self.boxes.values() if box is not None]
        await asyncio.gather(*(box.close() for box in boxes), return_exceptions=True)
        self.boxes.clear()
        for snapshot in self._snapshots.values():
            with contextlib.suppress(SandboxFailed):
                await self._backend.forget(snapshot)
        for folder, _ in self._uploads.values():
            await asyncio.to_thread(folder.close)

    async def _watch(self) -> None:
        while True:
            silent = asyncio.get_running_loop().time() - self._heard
            if silent >= self._config.lease:
                await self.close()
                with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                    await self._socket.close(1008, "its lease ended")
                return
            await asyncio.sleep(self._config.lease - silent)

    async def _send(self, head: Head, blob: bytes = b"") -> None:
        # The parts of one answer may mix with other answers; each message is whole.
        for message in wire.messages(head, blob):
            async with self._sending:
                await self._socket.send_bytes(message)

    # Requests -------------------------------------------------------------------------------

    async def _take(self, head: Head, blob: bytes) -> None:
        number, do = int(head["n"]), str(head.get("do"))
        if do == "alive":
            ended = {id: box.ended for id, box in self.boxes.items() if box is not None and box.ended}
            await self._send({"n": 0, "ended": ended})
        elif do == "cancel":
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
        elif do == "entry":
            await self._land(number, head, blob)
        elif do in ("stdin", "signal"):
            await self._answer(number, do, head, blob)
        elif len(self._tasks) >= REQUESTS:
            error = UsageError(f"more than {REQUESTS} requests at a time", hint="wait for answers")
            await self._send({"n": number, "error": wire.told(error)})
        else:
            task = asyncio.create_task(self._answer(number, do, head, blob))
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, number: int, do: str, head: Head, blob: bytes) -> None:
        box: Sandbox | None = None
        try:
            if "box" in head:
                box = self.boxes.get(str(head["box"]))
                if box is None:
                    raise UsageError("this host has no such sandbox", hint="start one")
            act = _ACTS.get(do)
            if act is None:
                raise UsageError(f"a sandbox host cannot {do!r}", hint="use the same version on both sides")
            told, content = await act(self, number, box, head, blob)
        except Exception as error:
            told, content = {"error": wire.told(error)}, b""
        if box is not None:
            told["ended"] = box.ended
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._send({"n": number, **told}, content)

    async def _land(self, number: int, head: Head, blob: bytes) -> None:
        """Take a piece of an upload; what is wrong with it is told at the upload's end."""
        if number not in self._uploads:
            folder = Scratch("upload")
            most = self._config.max_bytes, self._config.max_files
            self._uploads[number] = folder, wire.Landing(folder.path / "it", *most)
        landing = self._uploads[number][1]
        try:
            await asyncio.to_thread(landing.take, head.get("entry"), blob)
        except Exception as error:
            landing.problem = landing.problem or error

    def _process(self, head: Head) -> Process:
        if (found := self._processes.get(int(head["p"]))) is None:
            raise UsageError("this host has no such process", hint="open one")
        return found

    async def _admitted(self, start: Callable[[], Any]) -> Answer:
        """Start a sandbox and keep it; its place counts before it is there."""
        if self._count() >= self._config.sandboxes:
            raise SandboxFailed(
                f"the sandbox host has its {self._config.sandboxes} sandboxes already",
                hint="close some, or start it with a larger --max-sandboxes",
            )
        place = secrets.token_hex(8)
        self.boxes[place] = None
        try:
            made = await start()
            if self._closed:
                await made.close()
                raise SandboxFailed("the client went")
            self.boxes[made.id] = made
        finally:
            del self.boxes[place]
        return {"id": made.id, "tier": self._backend.tier, "enforces": sorted(self._backend.enforces)}, b""

    async def _do_start(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        spec, kept = _checked(spec_from_json(head["spec"])), self._kept(head.get("snapshot"))
        owner = f"remote {head.get('owner', '')}".strip()
        return await self._admitted(lambda: self._backend.start(spec, owner=owner, snapshot=kept))

    async def _do_fork(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        return await self._admitted(box.fork)

    async def _do_exec(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        pieces: asyncio.Queue[Answer | None] = asyncio.Queue()

        async def stream() -> None:
            while (piece := await pieces.get()) is not None:
                await self._send(*piece)

        def take(name: str, piece: bytes) -> None:
            pieces.put_nowait(({"n": number, "out": name}, piece))

        sending = asyncio.create_task(stream())
        try:
            done: ExecResult = await box.exec(
                head["command"],
                cwd=head.get("cwd"),
                env=head.get("env"),
                stdin=blob,
                seconds=float(head["seconds"]),
                limit=min(int(head["limit"]), self._config.max_bytes),
                on_output=take if head.get("stream") else None,
            )
            pieces.put_nowait(None)
            await sending
        finally:
            sending.cancel()
        out = done.stdout.encode()
        told = {name: getattr(done, name) for name in wire.RESULT}
        return {"result": told, "out_bytes": len(out)}, out + done.stderr.encode()

    async def _do_open(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        self._processes[number] = await box.open(head["command"], cwd=head.get("cwd"), env=head.get("env"))
        return {}, b""

    async def _do_next(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        process = self._process(head)
        piece = await process.read(float(head["seconds"]))
        if piece is None:
            return {"returned": process.returned}, b""
        return {"out": piece[0]}, piece[1]

    async def _do_stdin(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        await self._process(head).write(blob)
        return {}, b""

    async def _do_signal(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        await self._process(head).signal(int(head["signal"]))
        return {}, b""

    async def _do_end(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        if (process := self._processes.pop(int(head["p"]), None)) is not None:
            await process.close()
        return {}, b""

    async def _do_read(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        limit = min(int(head["limit"]), self._config.max_bytes)
        return {}, await box.read(str(head["path"]), limit=limit)

    async def _do_write(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        await box.write(str(head["path"]), blob, mode=int(head["mode"]) & 0o777)
        return {}, b""

    async def _do_upload(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        if number not in self._uploads:
            raise UsageError("nothing was uploaded")
        folder, landing = self._uploads.pop(number)
        try:
            if landing.problem is not None:
                raise landing.problem
            await asyncio.to_thread(landing.finish)
            await box.upload(folder.path / "it", str(head["target"]))
        finally:
            await asyncio.to_thread(folder.close)
        return {}, b""

    async def _do_download(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        folder = Scratch("download")
        try:
            await box.download(
                str(head["source"]),
                folder.path / "it",
                max_bytes=min(int(head["max_bytes"]), self._config.max_bytes),
                max_files=min(int(head["max_files"]), self._config.max_files),
            )
            entries = wire.laden(folder.path / "it")
            while (entry := await asyncio.to_thread(next, entries, None)) is not None:
                await self._send({"n": number, "entry": entry[0]}, entry[1])
        finally:
            await asyncio.to_thread(folder.close)
        return {}, b""

    async def _do_snapshot(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        made = await box.snapshot()
        self._snapshots[made.id] = made
        return {"id": made.id}, b""

    async def _do_restore(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        await box.restore(self._kept(head["snapshot"]))
        return {}, b""

    async def _do_forget(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        if (made := self._snapshots.pop(str(head["snapshot"]), None)) is not None:
            await self._backend.forget(made)
        return {}, b""

    async def _do_close(self, number: int, box: Any, head: Head, blob: bytes) -> Answer:
        self.boxes.pop(box.id, None)
        await box.close()
        return {}, b""

    def _kept(self, id: Any) -> Snapshot | None:
        if id is None:
            return None
        if id not in self._snapshots:
            raise UsageError(f"there is no snapshot {id!r} here")
        return self._snapshots[id]


_ACTS = {name.removeprefix("_do_"): act for name, act in vars(Client).items() if name.startswith("_do_")}


def _checked(spec: SandboxSpec) -> SandboxSpec:
    """A spec that a client may ask for.

    Raises:
        UsageError: It names folders of this host, or its network.
    """
    if spec.rootfs is not None or spec.source is not None or spec.mounts or spec.network != "none":
        raise UsageError(
            "a remote sandbox takes no rootfs, no mounts and no network",
            hint="give an image, and upload what it needs",
        )
    return spec
