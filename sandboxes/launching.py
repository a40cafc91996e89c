"""The owner's end of the launcher (:mod:`agentgym.sandboxes.launcher`).

Invariant: one request at a time, answered or refused within a deadline; and whoever waits for the end of a
sandbox is told once, by the launcher, or by the launcher's own end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentgym.errors import SandboxFailed
from agentgym.sandboxes import launcher
from agentgym.sandboxes.base import PathRefused
from agentgym.sandboxes.reaper import interpreter

SECONDS = 60.0
LONGEST = 1 << 16
"""Bytes of a request that go in a packet; a longer one goes as a file."""

USERS = (60_000, 64_900)
"""Users that nobody is (Debian keeps them free): what root's sandboxes become."""


class Launching:
    """Starts a launcher, and speaks to it; its methods may be called from any thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        uid = 0 if os.geteuid() else USERS[0] + os.getpid() % (USERS[1] - USERS[0])
        try:
            self._process = subprocess.Popen(
                [interpreter(), "-I", "-S", "-B", launcher.__file__, str(uid), str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise SandboxFailed(f"cannot start the launcher of sandboxes: {error}") from error
        finally:
            theirs.close()
        self._socket = ours
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._ends: dict[str, Callable[[dict[str, Any] | None], object]] = {}
        self._lock = threading.Lock()
        self.gone = False
        self._reader = threading.Thread(target=self._listen, name="agentgym-launcher", daemon=True)
        self._reader.start()
        self.uid = int(self._take("start")["uid"])

    def ask(self, what: str, /, *fds: int, **arguments: Any) -> dict[str, Any]:
        """Have something done.

        Raises:
            SandboxFailed: It cannot be.
            PathRefused: What the code inside left does not allow it.
        """
        with self._lock:
            if self.gone:
                raise SandboxFailed("the launcher of sandboxes is gone")
            try:
                body = json.dumps({"do": what, **arguments}).encode()
                if len(body) < LONGEST:
                    socket.send_fds(self._socket, [body], list(fds))
                else:
                    large = memory_file(body)
                    try:
                        socket.send_fds(self._socket, [b"@"], [large, *fds])
                    finally:
                        os.close(large)
            except OSError as error:
                raise SandboxFailed(f"the launcher of sandboxes cannot be reached: {error}") from error
            return self._take(what)

    def on_end(self, id: str, told: Callable[[dict[str, Any] | None], object]) -> None:
        """Have ``told`` called on another thread once a sandbox ended; with ``None`` if the launcher did."""
        self._ends[id] = told

    def close(self) -> None:
        """End it, and with it every sandbox that it started."""
        self.gone = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        self._socket.close()

    def _take(self, name: str) -> dict[str, Any]:
        try:
            told = self._answers.get(timeout=SECONDS)
        except queue.Empty:
            self._process.kill()
            raise SandboxFailed(f"the launcher of sandboxes did not answer {name!r}") from None
        if told is None:
            raise SandboxFailed("the launcher of sandboxes is gone")
        if "refused" in told:
            raise PathRefused(f"the files of a sandbox cannot be copied: {told['refused']}")
        if "error" in told:
            raise SandboxFailed(f"{name}: {told['error']}")
        return told

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            told = json.loads(data)
            if told.get("answer"):
                self._answers.put(told)
            elif (call := self._ends.pop(told["ended"], None)) is not None:
                call(told)
        self.gone = True
        self._answers.put(None)
        for call in list(self._ends.values()):
            call(None)
        self._ends.clear()

    def put(self, data: bytes, name: str) -> None:
        """Have a file kept in the launcher's folder; raises as :meth:`ask`."""
        fd = memory_file(data)
        try:
            self.ask("put", fd, name=name)
        finally:
            os.close(fd)

    def unpack(self, source: Path, target: str) -> None:
        """Copy a folder of the host that the launcher may not be able to read; raises as :meth:`ask`."""
        fd = memory_file(b"")
        try:
            with os.fdopen(os.dup(fd), "wb") as sink, tarfile.open(fileobj=sink, mode="w") as archive:
                archive.add(source.resolve(), "", filter=_plain)
            os.lseek(fd, 0, os.SEEK_SET)
            self.ask("unpack", fd, target=target)
        finally:
            os.close(fd)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.mode &= 0o777
    return member if member.isreg() or member.isdir() or member.issym() or member.islnk() else None


def memory_file(data: bytes) -> int:
    """A file descriptor from which ``data`` is read; the caller closes it."""
    fd = os.memfd_create("agentgym")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
