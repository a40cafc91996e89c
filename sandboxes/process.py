"""Commands as plain processes of the host, for work that is trusted: it isolates nothing.

Invariant: it starts only for a caller who says ``unsafe=True``. Limits are those that the kernel holds a
single process to (memory, file size, open files); what runs has the user's own rights, files and network.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import resource
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from agentgym.errors import SandboxFailed, UsageError
from agentgym.sandboxes import guest, records
from agentgym.sandboxes.base import Backend, Sandbox, SandboxSpec, Snapshot
from agentgym.sandboxes.scratch import Scratch
from agentgym.sandboxes.served import End, ServedSandbox

START_SECONDS = 30.0
OPEN_FILES = 1024


class ProcessBackend(Backend):
    """Plain processes.

    Args:
        unsafe: Has to be said.

    Raises:
        UsageError: It was not.
    """

    name = "process"
    tier = "none"
    enforces = frozenset({"memory", "disk"})  # of each process and each file by itself

    def __init__(self, *, unsafe: bool = False) -> None:
        if not unsafe:
            raise UsageError(
                "the sandbox backend 'process' isolates nothing",
                hint="use bubblewrap or docker; for code that you trust, say unsafe=True",
            )
        self._sandboxes: set[ProcessSandbox] = set()
        self._snapshots: dict[str, Scratch] = {}

    async def start(
        self, spec: SandboxSpec | None = None, *, owner: str = "", snapshot: Snapshot | None = None
    ) -> Sandbox:
        """See :meth:`Backend.start`."""
        spec = spec or (snapshot.spec if snapshot else SandboxSpec())
        for name in ("image", "rootfs"):
            if getattr(spec, name) is not None:
                raise UsageError(f"the sandbox backend 'process' takes no {name}", hint="use another backend")
        if spec.mounts:
            raise UsageError("the sandbox backend 'process' takes no mounts", hint="use another backend")
        made = ProcessSandbox(self, f"process-{secrets.token_hex(6)}", spec, owner)
        try:
            await made._begin(self.kept(snapshot) if snapshot else spec.source)
        except BaseException:
            await made.close()
            raise
        return made

    async def forget(self, snapshot: Snapshot) -> None:
        """See :meth:`Backend.forget`."""
        if (place := self._snapshots.pop(snapshot.id, None)) is not None:
            await asyncio.to_thread(place.close)

    async def aclose(self) -> None:
        """See :meth:`Backend.aclose`."""
        for sandbox in list(self._sandboxes):
            await sandbox.close()
        for place in self._snapshots.values():
            await asyncio.to_thread(place.close)
        self._snapshots.clear()

    def abandon(self) -> None:
        """See :meth:`Backend.abandon`."""
        for sandbox in self._sandboxes:
            if sandbox._process is not None:
                sandbox._process.kill()
                sandbox._process.wait()
        records.give_up({sandbox.id for sandbox in self._sandboxes})
        for place in self._snapshots.values():
            place.close()

    def kept(self, snapshot: Snapshot) -> Path:
        """Folder of a snapshot's files.

        Raises:
            UsageError: It is not kept here.
        """
        if snapshot.id not in self._snapshots:
            raise UsageError(f"there is no snapshot {snapshot.id!r} here")
        return self._snapshots[snapshot.id].path


class ProcessSandbox(ServedSandbox):
    """A folder of its own, and processes in it."""

    backend = "process"

    def __init__(self, home: ProcessBackend, id: str, spec: SandboxSpec, owner: str) -> None:
        super().__init__(id, spec)
        self._home, self._owner = home, owner
        self._folder = Path(tempfile.gettempdir(), f"agentgym-{id}")
        self._process: subprocess.Popen[bytes] | None = None
        self._record: records.Record | None = None
        home._sandboxes.add(self)

    async def _begin(self, files: Path | None) -> None:
        if self._record is None:
            parts = {"folder": str(self._folder)}
            self._record = records.Record.new(self.id, "process", self._owner, parts)
            records.add(self._record)
            self._folder.mkdir(mode=0o700)
        (self._folder / "tmp").mkdir(exist_ok=True)
        work = self._folder / "work"
        if files is not None:
            await asyncio.to_thread(_copy, files, work)
        else:
            work.mkdir()
        command = [sys.executable, "-I", "-S", "-B", guest.__file__]
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond, and asyncio's takes longer
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=work,
                env={"TMPDIR": f"{self._folder}/tmp"},
                process_group=0,
            )
        except OSError as error:
            raise SandboxFailed(f"cannot start a process: {error}") from error
        self._process = process
        for limit, most in (
            (resource.RLIMIT_AS, self.spec.memory),
            (resource.RLIMIT_FSIZE, self.spec.disk),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
        ):
            resource.prlimit(process.pid, limit, (most, most))
        assert process.stdin is not None and process.stdout is not None
        self._attach(os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno()))
        process.stdin.close()
        process.stdout.close()
        await self._greeted(START_SECONDS)

    async def _verdict(self, why: str) -> End:
        await asyncio.to_thread(self._stop)
        return End(why or "its worker was ended")

    async def snapshot(self) -> Snapshot:
        """See :meth:`Sandbox.snapshot`."""
        self._check()
        id = f"snapshot-{secrets.token_hex(6)}"
        place = self._home._snapshots[id] = Scratch(self._owner)
        await asyncio.to_thread(_copy, self._folder / "work", place.path)
        return Snapshot(id, self.backend, self.spec)

    async def restore(self, snapshot: Snapshot) -> None:
        """See :meth:`Sandbox.restore`."""
        files = self._home.kept(snapshot)
        self._detach()
        await asyncio.to_thread(self._stop)
        await asyncio.to_thread(shutil.rmtree, self._folder / "work", ignore_errors=True)
        await self._begin(files)

    async def fork(self) -> Sandbox:
        """See :meth:`Sandbox.fork`."""
        self._check()
        made = ProcessSandbox(self._home, f"process-{secrets.token_hex(6)}", self.spec, self._owner)
        try:
            await made._begin(self._folder / "work")
        except BaseException:
            await made.close()
            raise
        return made

    async def _close(self) -> None:
        try:
            self._detach()
            await asyncio.to_thread(self._stop)
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            if self._record is not None:
                records.remove(self._record)
        finally:
            self._home._sandboxes.discard(self)

    def _stop(self) -> None:
        if self._process is not None:
            # The worker kills its commands' groups when its input ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2.0)
            self._process.kill()
            self._process.wait()
            records.kill_those_of(str(self._folder))

    def _inside(self, *parts: str) -> str:
        joined = super()._inside(*parts)
        inside, _, rest = joined.partition(self.spec.workdir)
        if not inside and (not rest or rest.startswith("/")):
            return posixpath.join(str(self._folder / "work"), rest.lstrip("/")).rstrip("/")
        return joined

    def _variables(self) -> dict[str, str]:
        folder = str(self._folder / "tmp")
        return {**super()._variables(), "HOME": folder, "TMPDIR": folder}


def _copy(source: Path, target: Path) -> None:
    """Files, folders and links; nothing else can be copied."""

    def special(folder: str, names: list[str]) -> list[str]:
        modes = {name: os.lstat(os.path.join(folder, name)).st_mode for name in names}
        return [n for n, m in modes.items() if not (stat.S_ISREG(m) or stat.S_ISDIR(m) or stat.S_ISLNK(m))]

    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=special)
