"""The sandbox contract: where untrusted code runs, and what may be said of how it ended.

Invariants: every operation has a deadline and one answer; what the code inside does is data (a return code,
cut output, a sandbox that it ended), and an :class:`~agentgym.errors.InfrastructureError` rests on evidence
outside that code's reach; nothing that comes out of a sandbox is trusted: frames, archives and names are
bounded and checked before they touch the host.

A sandbox belongs to the event loop on which it was started. Paths inside are absolute, or relative to the
working directory.
"""

from __future__ import annotations

import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from agentgym.errors import AgentGymError, UsageError

MIB = 1 << 20

SECONDS = 60.0
"""Deadline of one command where none is given."""

KEPT = MIB
"""Bytes kept of each stream of one command where nothing else is said."""

Network = Literal["none", "host"]
Stream = Literal["stdout", "stderr"]
OnOutput = Callable[[Stream, bytes], None]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder or file of the host that is seen inside, never written.

    Attributes:
        source: On the host.
        target: Inside; absolute.
    """

    source: Path
    target: str


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What a sandbox is made of and what it may use. The limits hold for all its processes together.

    Attributes:
        image: Image of a container backend; ``None``: that backend's base image.
        rootfs: Folder that is the root, read-only (bubblewrap); ``None``: the host's ``/usr`` and libraries.
        source: Folder of the host whose files are the working directory's at the start; they are copied or
            laid under it, and never changed.
        workdir: The working directory, inside; absolute.
        cpus: Processors' worth of time, where the backend can hold it (see the backend's ``enforces``).
        memory: Bytes of memory, files on its temporary file systems included.
        pids: Processes and threads at a time.
        disk: Bytes that can be written.
        inodes: Files and folders that can be made.
        network: ``none``: not even the host's loopback. ``host``: the host's network, for trusted work only.
        env: Environment variables, besides ``PATH``, ``HOME``, ``LANG`` and ``TMPDIR``.
        mounts: What else of the host is seen, read-only.

    Raises:
        UsageError: A limit is not positive, or a path or name cannot be one.
    """

    image: str | None = None
    rootfs: Path | None = None
    source: Path | None = None
    workdir: str = "/work"
    cpus: float = 1.0
    memory: int = 512 * MIB
    pids: int = 128
    disk: int = 256 * MIB
    inodes: int = 32_768
    network: Network = "none"
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("cpus", 0.01), ("memory", 32 * MIB), ("pids", 4), ("disk", MIB), ("inodes", 64)):
            if not getattr(self, name) >= least:
                raise UsageError(
                    f"{name} of a sandbox is {getattr(self, name)!r}", hint=f"give {least} or more"
                )
        if self.network not in ("none", "host"):
            raise UsageError(f"network is {self.network!r}", hint="give 'none' or 'host'")
        targets = [self.workdir, *(mount.target for mount in self.mounts)]
        for target in targets:
            if not target.startswith("/") or posixpath.normpath(target) != target or "\0" in target:
                raise UsageError(f"{target!r} is no absolute path", hint="write it like /work")
            if target == "/" or re.match(r"/(proc|sys|dev)(/|$)", target):
                raise UsageError(f"{target!r} cannot be mounted over", hint="choose a folder such as /work")
        for name, value in self.env.items():
            if not _VARIABLE.fullmatch(name) or "\0" in value:
                raise UsageError(f"{name!r} cannot be an environment variable")


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command ended. A command that fails, is killed or cannot be started is a result, no exception.

    Attributes:
        stdout: What it wrote, decoded as UTF-8 with replacement; the first bytes where it wrote too many.
        stderr: The same of its second stream.
        return_code: Its exit status; ``-N`` where signal N ended it; 127 where it could not be started.
        timed_out: The deadline ended it.
        ended: Why the whole sandbox ended with it (its own doing); empty while it goes on.
        cut_stdout: Bytes of ``stdout`` that were thrown away.
        cut_stderr: The same of ``stderr``.
        seconds: Wall time that it took.
    """

    stdout: str
    stderr: str
    return_code: int
    timed_out: bool = False
    ended: str = ""
    cut_stdout: int = 0
    cut_stderr: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.return_code == 0 and not self.timed_out and not self.ended


class SandboxEnded(AgentGymError):
    """A caller used a sandbox that the code inside has ended. This is no failure of infrastructure.

    Args:
        why: How it ended.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the sandbox has ended: {why}", hint="score what it left, or start another one")


class PathRefused(AgentGymError):
    """A caller asked for a path inside that is not there or cannot be used so; the code inside may be why."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of a sandbox at one moment: its working directory, and nothing that runs.

    Attributes:
        id: Names it within its backend.
        backend: The backend's name.
        spec: What a sandbox with these files is made of.
    """

    id: str
    backend: str
    spec: SandboxSpec


class Process(ABC):
    """A command that runs on and is spoken to, such as a shell.

    Attributes:
        returned: Its return code, once it ended.
    """

    returned: int | None = None

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Send to its standard input.

        Raises:
            SandboxEnded: There is no sandbox any more. A process that ended takes what is sent and loses it.
        """

    @abstractmethod
    async def read(self, seconds: float) -> tuple[Stream, bytes] | None:
        """The next piece of its output; ``None`` once it has ended and all was read.

        Raises:
            TimeoutError: Nothing came within ``seconds``.
            SandboxEnded: There is no sandbox any more.
        """

    @abstractmethod
    async def signal(self, number: int) -> None:
        """Send a signal to its process group."""

    @abstractmethod
    async def close(self) -> None:
        """Kill its process group and forget it."""


class Sandbox(ABC):
    """One sandbox, started.

    Attributes:
        id: Its name on this machine.
        spec: What it is made of.
        backend: Name of its backend.
    """

    id: str
    spec: SandboxSpec
    backend: str

    @property
    @abstractmethod
    def ended(self) -> str:
        """Why it ended, by the doing of the code inside; empty while it runs."""

    @abstractmethod
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
        """Run a command to its end.

        Several may run at a time; none waits for another. When the command's own process has ended, what it
        left in the background runs on, and its later output is lost.

        Args:
            command: Its arguments; a string is run by ``/bin/sh -c``.
            cwd: Where; default: the working directory.
            env: Variables beside the spec's.
            stdin: What it reads.
            seconds: Deadline: then its process group is killed.
            limit: Bytes kept of each stream; the result says how many were cut.
            on_output: Called with each piece of output that is kept, as it comes.

        Raises:
            SandboxFailed: The machinery around the sandbox broke.
            SandboxEnded: The sandbox had ended before.
        """

    @abstractmethod
    async def open(
        self, command: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a command that is spoken to; raises as :meth:`exec`."""

    @abstractmethod
    async def read(self, path: str, *, limit: int = 16 * MIB) -> bytes:
        """The content of a regular file, links followed inside.

        Raises:
            PathRefused: It is not there, no regular file, or larger than ``limit``.
            SandboxEnded, SandboxFailed: As :meth:`exec`.
        """

    @abstractmethod
    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file, and the folders that it needs; raises as :meth:`read`."""

    @abstractmethod
    async def upload(self, source: Path, target: str) -> None:
        """Copy a file of the host, or the content of a folder, to ``target``.

        Links are copied as links where they lead inside ``source``, and refused otherwise.

        Raises:
            UsageError: ``source`` is not there or holds what cannot be copied.
            PathRefused, SandboxEnded, SandboxFailed: As :meth:`read`.
        """

    @abstractmethod
    async def download(
        self, source: str, target: Path, *, max_bytes: int = 64 * MIB, max_files: int = 10_000
    ) -> None:
        """Copy a file, or a folder as the new folder ``target``, to the host.

        Regular files, folders, and links that lead nowhere outside ``source`` are copied; anything else
        (devices, pipes, links that lead out, set-uid bits) is left out.

        Raises:
            PathRefused: It is not there, or more than ``max_bytes`` or ``max_files``; then nothing is left
                in ``target``.
            SandboxEnded, SandboxFailed: As :meth:`exec`.
        """

    @abstractmethod
    async def snapshot(self) -> Snapshot:
        """Keep the files of the working directory as they are.

        Raises:
            PathRefused: They cannot be copied, such as folders in folders without end.
            SandboxEnded, SandboxFailed: As :meth:`exec`.
        """

    @abstractmethod
    async def restore(self, snapshot: Snapshot) -> None:
        """End every process inside and bring the files of ``snapshot`` back; raises as :meth:`exec`.

        Raises:
            UsageError: It is another backend's, or is not kept any more.
        """

    @abstractmethod
    async def fork(self) -> Sandbox:
        """Another sandbox with the same files; processes are not forked. Raises as :meth:`snapshot`."""

    @abstractmethod
    async def close(self) -> None:
        """End everything inside and remove what was made; a second call does nothing."""

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Backend(ABC):
    """Starts sandboxes of one kind.

    Attributes:
        name: What a person calls it.
        tier: ``isolated``: meant for hostile code. ``weak``: less than that, and only on demand.
        enforces: Which limits of a :class:`SandboxSpec` it holds on this machine, once it is ready.
    """

    name: str
    tier: Literal["isolated", "weak", "none"]
    enforces: frozenset[str] = frozenset()

    @abstractmethod
    async def start(
        self, spec: SandboxSpec | None = None, *, owner: str = "", snapshot: Snapshot | None = None
    ) -> Sandbox:
        """Start a sandbox.

        Args:
            spec: What it is made of; default: the plain one, or the snapshot's.
            owner: A label for ``agentgym sandbox ps``.
            snapshot: Files to start with.

        Raises:
            SandboxFailed: It cannot be started now.
            UsageError: The spec asks for what this backend has not.
            MissingDependency: A package or program is not installed.
        """

    async def run(
        self, command: Sequence[str], spec: SandboxSpec | None = None, *, seconds: float = SECONDS
    ) -> ExecResult:
        """One command in a sandbox of its own, which is gone afterwards; raises as :meth:`start`."""
        async with await self.start(spec) as sandbox:
            return await sandbox.exec(command, seconds=seconds)

    @abstractmethod
    async def forget(self, snapshot: Snapshot) -> None:
        """Drop a snapshot; one that is unknown is none."""

    @abstractmethod
    async def aclose(self) -> None:
        """End every sandbox that was started, and what started them; a second call does nothing."""

    @abstractmethod
    def abandon(self) -> None:
        """:meth:`aclose` without an event loop, for one that is gone; from any thread."""

    async def __aenter__(self) -> Backend:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def spec_to_json(spec: SandboxSpec) -> dict[str, Any]:
    """A spec as JSON has it, for the wire and the record of what runs."""
    made: dict[str, Any] = {f.name: getattr(spec, f.name) for f in fields(spec)}
    made["env"] = dict(spec.env)
    made["mounts"] = [[str(mount.source), mount.target] for mount in spec.mounts]
    for name in ("rootfs", "source"):
        made[name] = None if made[name] is None else str(made[name])
    return made


def spec_from_json(given: Mapping[str, Any]) -> SandboxSpec:
    """The spec of :func:`spec_to_json`.

    Raises:
        UsageError: It is none.
    """
    known = {f.name for f in fields(SandboxSpec)}
    made = dict(given)
    if unknown := made.keys() - known:
        raise UsageError(
            f"a sandbox has no {sorted(unknown)[0]!r}", hint=f"known: {', '.join(sorted(known))}"
        )
    try:
        made["mounts"] = tuple(Mount(Path(source), target) for source, target in made.get("mounts", ()))
        for name in ("rootfs", "source"):
            made[name] = None if made.get(name) is None else Path(made[name])
        return SandboxSpec(**made)
    except (TypeError, ValueError) as error:
        raise UsageError(f"that is no sandbox: {error}") from error
