"""A container daemon, Docker's or Podman's, behind the docker SDK for Python.

Invariants: the SDK blocks, so each of its calls runs on a thread of this module's own and has a deadline: a
daemon that hangs never holds up the event loop; and a daemon that would take a limit and ignore it is
refused before anything is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agentgym.errors import MissingDependency, SandboxFailed, UsageError

T = TypeVar("T")

CALL_SECONDS = 60.0
"""Deadline of one call of the daemon."""

THREADS = 16
LIMITS = {"MemoryLimit": "memory", "PidsLimit": "pids", "CpuCfsQuota": "cpus"}
"""What a daemon says of itself that it can hold, and the limit of a sandbox that it stands for."""


class Missing(SandboxFailed):
    """The daemon has no such container or image."""


class Refused(SandboxFailed):
    """The daemon says no: the request cannot be, or something of it is in use."""


class Engine(NamedTuple):
    """What a daemon is.

    Attributes:
        podman: Whether it is Podman.
        version: Its version.
    """

    podman: bool
    version: str


class Daemon:
    """One daemon.

    Args:
        base_url: ``unix:///path`` or ``tcp://host:port``; default: ``$DOCKER_HOST``, then Docker's socket.

    Raises:
        MissingDependency: The docker SDK is not installed.
        UsageError: The address is of another kind.
    """

    def __init__(self, base_url: str | None = None) -> None:
        try:
            import docker
        except ImportError as error:
            raise MissingDependency("docker", "docker") from error
        self.url = base_url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if not self.url.startswith(("unix://", "tcp://")) or os.environ.get("DOCKER_TLS_VERIFY"):
            raise UsageError(
                f"the docker sandbox backend cannot speak to {self.url!r}",
                hint="give unix:///path or tcp://host:port without TLS; for another machine, run `agentgym "
                "sandbox serve` there and use the remote backend",
            )
        made: Any = docker.APIClient
        self._make = partial(made, self.url, version="auto", timeout=CALL_SECONDS, max_pool_size=THREADS)
        self._client: Any = None
        self._threads = ThreadPoolExecutor(THREADS, "agentgym-docker")

    async def call(self, asked: Callable[[Any], T], seconds: float = CALL_SECONDS) -> T:
        """Run ``asked`` with the SDK's client on a thread.

        Raises:
            Missing, Refused: The daemon says so.
            SandboxFailed: It cannot be reached, or does not answer within ``seconds``.
        """
        running = asyncio.get_running_loop().run_in_executor(self._threads, self.do, asked)
        # What raises after nobody waits any more is nobody's error.
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait({running}, timeout=seconds)
        if not done:
            raise SandboxFailed(
                f"the container daemon at {self.url} did not answer within {seconds:g} s",
                hint="see whether `docker info` answers",
            )
        return running.result()

    def do(self, asked: Callable[[Any], T]) -> T:
        """The same on this thread; raises as :meth:`call`."""
        import docker.errors

        try:
            if self._client is None:
                if (path := self.url.removeprefix("unix://")) != self.url:
                    # The SDK would leave its socket open where nobody listens.
                    with socket.socket(socket.AF_UNIX) as tried:
                        tried.connect(path)
                self._client = self._make()
            return asked(self._client)
        except docker.errors.APIError as error:
            told = f"the container daemon says: {error.explanation or error}"
            if error.status_code == 404:
                raise Missing(told) from error
            raise Refused(told) from error
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxFailed(
                f"the container daemon at {self.url} cannot be reached: {error}",
                hint="start it, or set DOCKER_HOST (docker: dockerd; podman: podman system service)",
            ) from error

    def probe(self) -> Engine:
        """See what the daemon is, and that it holds limits.

        Raises:
            UsageError: It ignores some.
            SandboxFailed: It cannot be reached.
        """
        info = self.do(lambda client: client.info())
        version = self.do(lambda client: client.version())
        parts = [part.get("Name", "") for part in version.get("Components") or ()]
        podman = any("podman" in name.lower() for name in parts)
        if problem := ignored(info):
            raise UsageError(
                f"the container daemon at {self.url} would ignore limits: {problem}",
                hint="run it as root, or on a system with cgroup v2; or use the bubblewrap backend",
            )
        return Engine(podman, str(version.get("Version", "")))

    def attach(self, container: str) -> int:
        """Speak to a container's first process.

        Returns:
            A file descriptor, which is the caller's: what is written comes to its standard input; what is
            read is its two outputs as :class:`Unwrap` takes them.
        """

        def attached(client: Any) -> int:
            wanted = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            made = client.attach_socket(container, params=wanted)
            # The socket object would be closed with the response that it came in.
            stream = int(made._sock.detach())
            made.close()
            return stream

        return self.do(attached)

    def close(self) -> None:
        """Forget it; threads that still wait end at their deadlines."""
        self._threads.shutdown(wait=False)
        if self._client is not None:
            self._client.close()


class Unwrap:
    """A container's standard output out of the stream of its two outputs.

    Attributes:
        said: The end of what came on its standard error.
    """

    def __init__(self) -> None:
        self.said = b""
        self._head = b""
        self._left = 0
        self._wanted = False

    def __call__(self, piece: bytes) -> bytes:
        """The next bytes of the output in the next bytes of the stream."""
        found, at = [], 0
        while at < len(piece):
            if self._left == 0:
                taken = piece[at : at + 8 - len(self._head)]
                self._head, at = self._head + taken, at + len(taken)
                if len(self._head) == 8:
                    self._left = int.from_bytes(self._head[4:], "big")
                    self._wanted, self._head = self._head[0] == 1, b""
                continue
            taken = piece[at : at + self._left]
            at, self._left = at + len(taken), self._left - len(taken)
            if self._wanted:
                found.append(taken)
            else:
                self.said = (self.said + taken)[-2000:]
        return b"".join(found)


def ignored(info: dict[str, Any]) -> str:
    """What of a sandbox's limits a daemon that says ``info`` of itself does not hold; empty: it holds all."""
    if info.get("OSType", "linux") != "linux":
        return f"it runs {info['OSType']} containers"
    driver, version = info.get("CgroupDriver", ""), str(info.get("CgroupVersion", "1"))
    if driver == "none":
        return "it has no control groups (cgroup driver: none)"
    if version == "1" and any("rootless" in option for option in info.get("SecurityOptions") or ()):
        return "it runs without root on cgroup v1"
    if unheld := [limit for name, limit in LIMITS.items() if not info.get(name)]:
        return f"its kernel does not limit {', '.join(unheld)}"
    return ""


def place() -> str:
    """Where process numbers mean the same as here: this boot, this namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def discard(daemon: Daemon, container: str, until: float = 0.0) -> None:
    """Kill and remove a container; one that is gone is no matter.

    Args:
        daemon: Where it is.
        container: Its name or id.
        until: Time (seconds since 1970) up to which one that is not there may still appear: whoever asked
            for it died before it was made.

    Raises:
        SandboxFailed: The daemon cannot be reached.
    """
    given_up = max(until, time.time()) + 10
    while True:
        try:
            daemon.do(lambda client: client.remove_container(container, v=True, force=True))
            return
        except Missing:
            if time.time() >= until:
                return
        except Refused:
            # Somebody else is removing it.
            if time.time() >= given_up:
                raise
        time.sleep(0.1)
