"""One container as a sandbox.

Invariants: its limits are those of its spec, and what is not named here it does not get; who ended it is read
from the daemon, where the code inside cannot write; and its files leave and enter as an archive that only
sandboxes open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from agentgym.errors import SandboxFailed, UsageError
from agentgym.sandboxes import filetree, guest, records
from agentgym.sandboxes.base import MIB, PathRefused, Sandbox, SandboxEnded, SandboxSpec, Snapshot
from agentgym.sandboxes.channel import ChannelClosed
from agentgym.sandboxes.daemon import Missing, Refused, Unwrap, discard, place
from agentgym.sandboxes.images import build
from agentgym.sandboxes.served import End, ServedSandbox

if TYPE_CHECKING:
    from agentgym.sandboxes.docker import DockerBackend

START_SECONDS = 60.0
COPY_SECONDS = 300.0
OPEN_FILES = 4096
APPEAR_SECONDS = 10.0
"""How long after its owner's death a container may still appear."""

LABEL = "agentgym"
_PYTHON = ("python3", "-I", "-S", "-B", "-c")
_GUEST = Path(guest.__file__).read_bytes()
# The worker itself comes first on its input: a command line is for everybody inside to read.
_BOOT = f"import os\ns=b''\nwhile len(s)<{len(_GUEST)}:s+=os.read(0,{len(_GUEST)}-len(s))\nexec(s)"
_SOURCE = Path(filetree.__file__).read_text(encoding="utf-8")


class Kept(NamedTuple):
    """What a snapshot is: an archive on the host, or an image of the daemon."""

    file: Path | None
    image: str | None
    record: records.Record


class DockerSandbox(ServedSandbox):
    """One container."""

    backend = "docker"

    def __init__(self, home: DockerBackend, id: str, spec: SandboxSpec, owner: str) -> None:
        super().__init__(id, spec)
        self._home, self._owner = home, owner
        self._container = f"agentgym-{id}"
        self._image_env: dict[str, str] = {}
        self._created = ""
        self._unsure = False
        self._since = 0.0
        self._unwrap = Unwrap()
        self._record: records.Record | None = None
        home._sandboxes.add(self)

    async def begin(self, files: Path | Kept | None) -> None:
        """Start the container, and give it its files."""
        home, daemon = self._home, self._home.daemon
        image, self._image_env = await home.found_image(self.spec)
        if isinstance(files, Kept):
            image, files = files.image or image, files.file
        if self._record is None:
            parts = {"url": daemon.url, "container": self._container}
            self._record = records.Record.new(self.id, self.backend, self._owner, parts)
            await asyncio.to_thread(records.add, self._record)
        self._since, self._unsure = time.time(), True
        try:
            await daemon.call(lambda client: self._create(client, image))
        except Refused as error:
            self._unsure = False
            if home.runtime is not None and "runtime" in error.message:
                raise UsageError(
                    f"the container daemon has no runtime {home.runtime!r}",
                    hint="add it to the daemon's configuration (runtimes), or leave runtime out",
                ) from error
            raise
        self._unsure = False
        self._unwrap = Unwrap()
        stream = await daemon.call(lambda _: daemon.attach(self._container))
        self._attach(stream, stream, self._unwrap)
        try:
            await daemon.call(lambda client: client.start(self._container), START_SECONDS)
        except (Missing, Refused) as error:
            if "executable file" in error.message:
                raise UsageError(
                    f"the image {image} has no python3",
                    hint="a sandbox's image needs one on its path: add it, or take another image",
                ) from error
            raise
        with contextlib.suppress(ChannelClosed):
            self._speaking.send(_GUEST)
        await self._greeted(START_SECONDS)
        if files is not None:
            await self._unpack(files)

    # The container --------------------------------------------------------------------------

    def _create(self, client: Any, image: str) -> None:
        home, spec = self._home, self.spec
        owner = records.Record.new(self.id, self.backend, self._owner, {})
        told = client.create_container(
            image,
            name=self._container,
            hostname="sandbox",
            user=f"{home.uid}:{home.gid}",
            stdin_open=True,
            entrypoint=[*_PYTHON, _BOOT],
            labels={
                f"{LABEL}.id": self.id,
                f"{LABEL}.owner": f"{owner.pid}:{owner.started}",
                f"{LABEL}.place": place(),
                f"{LABEL}.label": self._owner,
            },
            host_config=client.create_host_config(**self._limits(client)),
        )
        self._created = str(told["Id"])
        if warned := [w for w in told.get("Warnings") or () if "without swap" not in w]:
            raise Refused(f"the container daemon would not hold a limit: {'; '.join(warned)}")
        if home.writable:
            try:
                client.get_archive(self._container, spec.workdir)
            except Exception as error:
                if getattr(getattr(error, "response", None), "status_code", 0) != 404:
                    raise
                client.put_archive(self._container, "/", _folder(spec.workdir, int(home.uid), int(home.gid)))

    def _limits(self, client: Any) -> dict[str, Any]:
        home, spec = self._home, self.spec
        # Podman reads the profile itself; Docker's clients send it.
        profile = (
            str(build.PROFILE) if home.engine.podman else json.dumps(json.loads(build.PROFILE.read_text()))
        )
        ulimits = [("nofile", OPEN_FILES), ("core", 0), ("fsize", spec.disk)]
        if home.engine.podman:
            # Its default is more than a machine may allow, and then nothing starts.
            ulimits.append(("nproc", 8192))
        shares = [("/dev/shm", 1 / 40, ["mode=1777"]), ("/tmp", 1 / 5, ["mode=1777"])]
        # Podman has it written in any case.
        shares += [("/var/tmp", 1 / 40, ["mode=1777"])]
        if not home.writable:
            # Podman's mounts belong to nobody but root.
            owned = ["mode=0755", f"uid={home.uid}", f"gid={home.gid}"]
            shares.append((spec.workdir, 3 / 4, ["mode=0777"] if home.engine.podman else owned))
        common = "rw,exec,nosuid,nodev"

        def inodes(part: float) -> list[str]:
            return [f"nr_inodes={int(spec.inodes * part)}"] if "inodes" in home.enforces else []

        return {
            "network_mode": spec.network,
            "mem_limit": spec.memory,
            "memswap_limit": spec.memory,
            "pids_limit": spec.pids,
            "nano_cpus": int(spec.cpus * 1e9),
            "read_only": not home.writable,
            "tmpfs": {
                target: ",".join([common, f"size={int(spec.disk * part)}", *mode, *inodes(part)])
                for target, part, mode in shares
            },
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges", f"seccomp={profile}"],
            "ulimits": [{"Name": name, "Soft": most, "Hard": most} for name, most in ulimits],
            "mounts": [
                {"Type": "bind", "Source": str(m.source.resolve()), "Target": m.target, "ReadOnly": True}
                for m in spec.mounts
            ],
            # Whatever the worker says would lie on the host's disk twice.
            "log_config": {"Type": "none"},
            "oom_score_adj": 500,
            "runtime": home.runtime,
        }

    async def _verdict(self, why: str) -> End:
        daemon = self._home.daemon
        try:
            return await daemon.call(lambda client: self._judged(client, why))
        except Missing:
            return End("somebody outside removed its container", outside=True)
        except SandboxFailed as error:
            return End(error.message, outside=True)

    def _judged(self, client: Any, why: str) -> End:
        import docker.errors

        if not why:
            # Its streams close a moment before it has ended. What `requests` raises is an OSError.
            with contextlib.suppress(OSError, docker.errors.APIError):
                client.wait(self._container, timeout=2.0)
        state = client.inspect_container(self._container)["State"]
        begin, end = self._since - 1, time.time()
        whole = self._home.engine.podman  # it reads whole seconds alone
        told = client.events(
            since=int(begin) if whole else f"{begin:.3f}",
            until=int(end) + 1 if whole else f"{end:.3f}",
            filters={"container": [self._created], "event": ["kill", "stop", "oom"]},
            decode=True,
        )
        actions = {event.get("Action") or event.get("status") for event in told}
        if actions & {"kill", "stop"}:
            return End("somebody outside killed its container", outside=True)
        if state.get("Paused"):
            return End("somebody outside paused its container", outside=True)
        if state.get("Running"):
            # It may be ending by itself, for its input was closed.
            with contextlib.suppress(docker.errors.APIError):
                client.kill(self._container)
            return End(why or "its worker hung up")
        if state.get("OOMKilled") or "oom" in actions:
            return End("it ran out of memory")
        said = self._unwrap.said.decode("utf-8", "replace").strip().splitlines()
        last = f": {said[-1]}" if said else ""
        return End(why or f"its worker ended with status {state.get('ExitCode')}{last}")

    async def _discard(self) -> None:
        until = time.time() + APPEAR_SECONDS if self._unsure else 0.0
        await self._home.daemon.call(lambda _: discard(self._home.daemon, self._container, until))

    # Files ----------------------------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """See :meth:`Sandbox.snapshot`."""
        made = Snapshot(f"snapshot-{secrets.token_hex(6)}", self.backend, self.spec)
        self._home._snapshots[made.id] = await self._keep(made.id)
        return made

    async def restore(self, snapshot: Snapshot) -> None:
        """See :meth:`Sandbox.restore`."""
        kept = self._home.kept(snapshot)
        if self._closed:
            self._check()
        self._detach()
        await self._discard()
        await self.begin(kept)

    async def fork(self) -> Sandbox:
        """See :meth:`Sandbox.fork`."""
        kept = await self._keep(f"fork-{secrets.token_hex(6)}")
        try:
            return await self._home.begin(self.spec, self._owner, kept)
        finally:
            await self._home.drop(kept)

    async def _close(self) -> None:
        try:
            self._detach()
            if self._record is not None:
                # Where the daemon is out of reach the record stays: it knows what is left.
                with contextlib.suppress(SandboxFailed):
                    await self._discard()
                    records.remove(self._record)
            await self._home.sweep()
        finally:
            self._home._sandboxes.discard(self)

    async def _keep(self, id: str) -> Kept:
        self._check()
        home = self._home
        if home.writable:
            name = f"agentgym/snapshot:{id}"
            parts = {"url": home.daemon.url, "image": name}
            record = records.Record.new(id, self.backend, self._owner, parts)
            records.add(record)
            repository, _, tag = name.partition(":")
            await home.daemon.call(
                lambda client: client.commit(self._container, repository=repository, tag=tag)
            )
            return Kept(None, name, record)
        handle, file = tempfile.mkstemp(prefix=f"agentgym-{id}-", suffix=".tar")
        os.close(handle)
        record = records.Record.new(id, self.backend, self._owner, {"file": file})
        records.add(record)
        try:
            await self._pack(Path(file))
        except BaseException:
            os.unlink(file)
            records.remove(record)
            raise
        return Kept(Path(file), None, record)

    async def _pack(self, file: Path) -> None:
        """Have the files of the working directory written to ``file``."""
        most = self.spec.disk + self.spec.inodes * 4096 + MIB
        process = await self.open([*_PYTHON, _SOURCE, "pack", self.spec.workdir], cwd="/")
        said = b""
        try:
            with file.open("wb") as sink:
                async with asyncio.timeout(COPY_SECONDS):
                    while (piece := await process.read(COPY_SECONDS)) is not None:
                        if piece[0] == "stderr":
                            said = (said + piece[1])[-500:]
                        elif (most := most - len(piece[1])) < 0:
                            raise PathRefused("the working directory's archive is larger than it can be")
                        else:
                            sink.write(piece[1])
        except TimeoutError:
            raise PathRefused(f"the working directory was not read within {COPY_SECONDS:g} s") from None
        finally:
            await process.close()
        if process.returned != 0:
            raise PathRefused(
                f"the working directory could not be read: {said.decode('utf-8', 'replace').strip()[-300:]}"
            )

    async def _unpack(self, file: Path) -> None:
        """Give the working directory the files of an archive that :meth:`_pack` or :func:`_pack` wrote."""
        try:
            async with asyncio.timeout(COPY_SECONDS):
                problem = await self._poured(file)
        except (SandboxEnded, TimeoutError) as error:
            problem = str(error) or f"they were not written within {COPY_SECONDS:g} s"
        if problem:
            raise UsageError(
                f"the sandbox cannot take its files: {problem}", hint="allow it more disk, inodes or memory"
            )

    async def _poured(self, file: Path) -> str:
        process = await self.open([*_PYTHON, _SOURCE, "unpack", self.spec.workdir], cwd="/")
        ahead, said = 0, b""
        try:
            with file.open("rb") as content:
                while True:
                    if ahead < 2 and (piece := content.read(filetree.PIECE)):
                        await process.write(piece)
                        ahead += 1
                        continue
                    if (told := await process.read(COPY_SECONDS)) is None:
                        return said.decode("utf-8", "replace").strip()[-300:] or "the copy was ended"
                    if told[0] == "stderr":
                        said = (said + told[1])[-500:]
                    elif b"!" in told[1]:
                        return ""
                    else:
                        ahead -= told[1].count(b".")
        finally:
            await process.close()

    def _variables(self) -> dict[str, str]:
        return {**super()._variables(), **self._image_env, "HOME": "/tmp", "TMPDIR": "/tmp"}


def _folder(path: str, uid: int, gid: int) -> bytes:
    """An archive with one folder in it."""
    entry = tarfile.TarInfo(str(PurePosixPath(path).relative_to("/")))
    entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o755, uid, gid
    return entry.tobuf() + b"\0" * 2 * tarfile.BLOCKSIZE
