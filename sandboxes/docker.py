"""Sandboxes in containers of Docker or Podman.

Invariants: a container has no network, no capabilities, a read-only root, and limits that the daemon says it
holds; all that happens in it goes over one attached stream to the worker that is its first process, never
through an exec a command; and whether the code inside or somebody outside ended it is read from the daemon.

By default nothing but the working directory, ``/tmp``, ``/var/tmp`` and ``/dev/shm`` can be written: file
systems in memory that share the spec's ``disk`` and ``inodes`` (three quarters, a fifth, and a fortieth each)
and are charged to its ``memory``; a snapshot is an archive of the working directory. With ``writable=True``
the root is written too, for images that bring their work with them: then a snapshot is an image, and the
bytes and files written are not limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import stat
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from agentgym.errors import SandboxFailed, UsageError
from agentgym.sandboxes import records
from agentgym.sandboxes.base import Backend, Sandbox, SandboxSpec, Snapshot
from agentgym.sandboxes.container import APPEAR_SECONDS, LABEL, DockerSandbox, Kept
from agentgym.sandboxes.daemon import Daemon, Engine, Missing, Refused, discard, place
from agentgym.sandboxes.images import build


class DockerBackend(Backend):
    """Containers.

    Args:
        runtime: The daemon's runtime, such as ``runsc``; default: its own.
        base_url: ``unix:///path`` or ``tcp://host:port``, of Docker or Podman; default: ``$DOCKER_HOST``,
            then Docker's socket.
        image: Image of sandboxes whose spec names none; default: the base image (``agentgym sandbox build``).
        writable: The root can be written; see the module.
        user: Who runs inside, as ``uid:gid``.

    Raises:
        MissingDependency: The docker SDK is not installed.
        UsageError: The address or the user cannot be one.
    """

    name = "docker"
    tier = "isolated"

    def __init__(
        self,
        *,
        runtime: str | None = None,
        base_url: str | None = None,
        image: str | None = None,
        writable: bool = False,
        user: str = "65534:65534",
    ) -> None:
        uid, _, gid = user.partition(":")
        if not (uid.isdecimal() and gid.isdecimal()):
            raise UsageError(f"{user!r} is no user", hint="give uid:gid, such as 65534:65534")
        self.runtime, self.image, self.writable, self.uid, self.gid = runtime, image, writable, uid, gid
        self.daemon = Daemon(base_url)
        self.engine = Engine(False, "")
        held = {"cpus", "memory", "pids", "network"}
        self.enforces = frozenset(held if writable else held | {"disk", "inodes"})
        self._probed: asyncio.Task[Engine] | None = None
        self._images: dict[str, tuple[str, dict[str, str]]] = {}
        self._sandboxes: set[DockerSandbox] = set()
        self._snapshots: dict[str, Kept] = {}
        self._doomed: dict[str, records.Record] = {}
        self._closed = False

    async def start(
        self, spec: SandboxSpec | None = None, *, owner: str = "", snapshot: Snapshot | None = None
    ) -> Sandbox:
        """See :meth:`Backend.start`."""
        spec = spec or (snapshot.spec if snapshot else SandboxSpec())
        if spec.rootfs is not None:
            raise UsageError("the docker sandbox backend takes no rootfs", hint="give an image")
        if spec.source is not None and not spec.source.is_dir():
            raise UsageError(f"{spec.source} is no folder", hint="a sandbox shall start with its files")
        await self.ready()
        if snapshot is not None:
            return await self.begin(spec, owner, self.kept(snapshot))
        if spec.source is None:
            return await self.begin(spec, owner, None)
        with tempfile.TemporaryDirectory(prefix="agentgym-source-") as folder:
            packed = Path(folder, "source.tar")
            await asyncio.to_thread(_pack, spec.source, packed)
            return await self.begin(spec, owner, packed)

    async def forget(self, snapshot: Snapshot) -> None:
        """See :meth:`Backend.forget`."""
        if (kept := self._snapshots.pop(snapshot.id, None)) is not None:
            await self.drop(kept)

    async def aclose(self) -> None:
        """See :meth:`Backend.aclose`."""
        if self._closed:
            return
        self._closed = True
        if self._probed is not None:
            self._probed.cancel()
        await asyncio.gather(*(sandbox.close() for sandbox in list(self._sandboxes)))
        for kept in self._snapshots.values():
            await self.drop(kept)
        self._snapshots.clear()
        self.daemon.close()

    def abandon(self) -> None:
        """See :meth:`Backend.abandon`."""
        records.give_up({sandbox.id for sandbox in self._sandboxes})

    # For its sandboxes ----------------------------------------------------------------------

    async def ready(self) -> None:
        """See once what the daemon is; remove what dead processes of this machine left.

        Raises:
            UsageError: It would ignore limits, or this backend is closed.
            SandboxFailed: It cannot be reached.
        """
        if self._closed:
            raise UsageError("this backend is closed", hint="make a new one")
        if self._probed is None or (self._probed.done() and self._probed.exception()):
            self._probed = asyncio.get_running_loop().create_task(self._probe())
        self.engine = await asyncio.shield(self._probed)
        if self.engine.podman:
            # Its file systems in memory take no such limit; the files that are made count as memory.
            self.enforces -= {"inodes"}

    async def _probe(self) -> Engine:
        engine = await self.daemon.call(lambda _: self.daemon.probe())
        await self.daemon.call(lambda _: _reconcile(self.daemon))
        return engine

    async def found_image(self, spec: SandboxSpec) -> tuple[str, dict[str, str]]:
        """The name that the daemon has for a spec's image, and the image's variables.

        Raises:
            UsageError: It has none.
        """
        name = spec.image or self.image or build.tag()
        if name not in self._images:
            # Podman does not look for short names among its own.
            names = [name, f"localhost/{name}"] if self.engine.podman else [name]
            for known in names:
                with contextlib.suppress(Missing):
                    told = await self.daemon.call(partial(_inspected, known))
                    pairs = (told.get("Config") or {}).get("Env") or ()
                    env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                    self._images[name] = known, env
                    break
            else:
                ours = name == build.tag()
                hint = "agentgym sandbox build" if ours else f"docker pull {name}, if you trust it"
                raise UsageError(f"the container daemon has no image {name!r}", hint=hint)
        return self._images[name]

    async def begin(self, spec: SandboxSpec, owner: str, files: Path | Kept | None) -> DockerSandbox:
        """Start a container; ``files``: an archive, or a snapshot."""
        made = DockerSandbox(self, f"docker-{secrets.token_hex(6)}", spec, owner)
        try:
            await made.begin(files)
        except BaseException:
            await made.close()
            raise
        return made

    def kept(self, snapshot: Snapshot) -> Kept:
        """What a snapshot is.

        Raises:
            UsageError: It is not kept here.
        """
        if snapshot.id not in self._snapshots:
            raise UsageError(f"there is no snapshot {snapshot.id!r} here")
        return self._snapshots[snapshot.id]

    async def drop(self, kept: Kept) -> None:
        """Remove what a snapshot is; an image that a container still uses goes with the last of them."""
        if kept.file is not None:
            kept.file.unlink(missing_ok=True)
            records.remove(kept.record)
        if kept.image is not None:
            self._doomed[kept.image] = kept.record
            await self.sweep()

    async def sweep(self) -> None:
        """Remove the images that nobody uses any more."""
        for image, record in list(self._doomed.items()):
            try:
                await self.daemon.call(partial(_removed, image))
            except Missing:
                pass
            except SandboxFailed:
                # In use, or out of reach: its record says that it is there.
                continue
            # Sandboxes that are closed at the same time all look.
            self._doomed.pop(image, None)
            records.remove(record)


def clean(record: records.Record) -> None:
    """Remove what a record names: a container, an image or an archive.

    Raises:
        MissingDependency: The docker SDK is not installed.
        SandboxFailed: The daemon cannot be reached.
    """
    parts = record.parts
    if "file" in parts:
        Path(parts["file"]).unlink(missing_ok=True)
        return
    daemon = Daemon(parts["url"])
    try:
        if "container" in parts:
            discard(daemon, parts["container"], record.since + APPEAR_SECONDS)
        if "image" in parts:
            with contextlib.suppress(Missing):
                daemon.do(lambda client: client.remove_image(parts["image"], force=True))
    finally:
        daemon.close()


def _reconcile(daemon: Daemon) -> None:
    """Remove containers and snapshots whose owners are dead, known by their labels: a record may be lost."""
    ours = {"label": [f"{LABEL}.place={place()}"]}
    for found in daemon.do(lambda client: client.containers(all=True, filters=ours)):
        if _orphaned(found):
            discard(daemon, found["Id"])
    for found in daemon.do(lambda client: client.images(filters=ours)):
        if _orphaned(found):
            with contextlib.suppress(Missing, Refused):
                daemon.do(partial(_removed, found["Id"], force=True))


def _orphaned(found: dict[str, Any]) -> bool:
    pid, _, started = (found.get("Labels") or {}).get(f"{LABEL}.owner", "").partition(":")
    return bool(pid.isdecimal()) and str(records.start_of(int(pid))) != started


def _inspected(image: str, client: Any) -> Any:
    return client.inspect_image(image)


def _removed(image: str, client: Any, force: bool = False) -> None:
    client.remove_image(image, force=force)


def _pack(source: Path, file: Path) -> None:
    """Archive the files, folders and links of a folder of the host."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.mode &= 0o777
        return entry if entry.isreg() or entry.isdir() or entry.issym() or entry.islnk() else None

    try:
        with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
            for name in sorted(os.listdir(source)):
                if not stat.S_ISSOCK(os.lstat(source / name).st_mode):
                    archive.add(source / name, name, filter=plain)
    except OSError as error:
        raise UsageError(f"{source} cannot be copied: {error}", hint="see that it can be read") from error
