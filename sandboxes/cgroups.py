"""Control groups, where they can be had: the kernel's own count of memory, processes and processor time.

Invariant: either all three are held for a sandbox, or none is claimed. Groups are made by root, joined by the
sandbox's first process itself before it becomes anything, and removed when they are empty. Their names say
whose they are, so that those of a process that was killed before it could write anything down are found.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from functools import cache
from pathlib import Path

from agentgym.sandboxes.base import SandboxSpec
from agentgym.sandboxes.records import start_of

FOLDER = "agentgym"
PERIOD = 100_000
CONTROLLERS = ("memory", "pids", "cpu")
ENABLE = " ".join(f"+{controller}" for controller in CONTROLLERS)
ROOT = Path("/sys/fs/cgroup")


class Groups:
    """The groups of one sandbox.

    Args:
        folders: Their folders, by controller; in version 2 the same one for all.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    @property
    def places(self) -> list[str]:
        """Folders that a process has to join."""
        return sorted({str(folder) for folder in self.folders.values()})

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed one of its processes because the group held too much."""
        folder = self.folders["memory"]
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                for line in (folder / name).read_text().splitlines():
                    key, _, count = line.partition(" ")
                    if key == "oom_kill" and int(count) > 0:
                        return True
        return False

    def remove(self, seconds: float = 2.0) -> bool:
        """Remove them; whether they are gone. Processes that are dying hold them for a moment."""
        return remove(self.places, seconds)


def remove(places: list[str], seconds: float = 2.0) -> bool:
    """Remove groups by their folders, as :meth:`Groups.remove`."""
    until = time.monotonic() + seconds
    left = list(places)
    while True:
        for place in list(left):
            try:
                os.rmdir(place)
            except FileNotFoundError:
                pass
            except OSError:
                continue
            left.remove(place)
        if not left or time.monotonic() > until:
            return not left
        time.sleep(0.005)


def sweep() -> None:
    """End and remove the groups of owners that are gone, and what nobody uses."""
    for base in set((bases() or {}).values()):
        with contextlib.suppress(FileNotFoundError):
            for place in base.iterdir():
                _, pid, started, *_ = [*place.name.split("."), "", ""]
                if pid.isdigit() and str(start_of(int(pid))) != started:
                    with contextlib.suppress(OSError):
                        for left in (place / "cgroup.procs").read_text().split():
                            os.kill(int(left), signal.SIGKILL)
                    remove([str(place)])
        with contextlib.suppress(OSError):
            base.rmdir()


def make(name: str, spec: SandboxSpec, uid: int) -> Groups | None:
    """Groups with a spec's limits, which processes of ``uid`` may join; ``None`` where there can be none.

    Raises:
        OSError: There can be, and yet these cannot.
    """
    found = bases()
    if found is None:
        return None
    name = f"{name}.{os.getpid()}.{start_of(os.getpid())}"
    groups = Groups({controller: base / name for controller, base in found.items()})
    folders = groups.folders
    try:
        for base in set(found.values()):
            _enter(base, name)
            os.chown(base / name / "cgroup.procs", uid, uid)
        quota = int(spec.cpus * PERIOD)
        settings: dict[str, dict[str, int | str]]
        if _version() == 2:
            settings = {
                "memory": {"memory.max": spec.memory, "memory.swap.max": 0},
                "cpu": {"cpu.max": f"{quota} {PERIOD}"},
            }
        else:
            settings = {
                "memory": {"memory.limit_in_bytes": spec.memory, "memory.memsw.limit_in_bytes": spec.memory},
                "cpu": {"cpu.cfs_period_us": PERIOD, "cpu.cfs_quota_us": quota},
            }
        settings["pids"] = {"pids.max": spec.pids}
        for controller, values in settings.items():
            for file, value in values.items():
                place = folders[controller] / file
                if "sw" not in file or place.exists():  # not every kernel counts what is swapped
                    place.write_text(f"{value}\n")
    except OSError:
        groups.remove(0)
        raise
    return groups


def _enter(base: Path, name: str) -> None:
    """Make a group in our folder, which somebody else may just remove because it is empty."""
    for _ in range(10):
        base.mkdir(exist_ok=True)
        try:
            if _version() == 2:
                (base / "cgroup.subtree_control").write_text(ENABLE)
            (base / name).mkdir()
            return
        except FileNotFoundError:
            continue
    raise FileNotFoundError(errno.ENOENT, "it is removed again and again", str(base))


@cache
def _version() -> int:
    return 2 if (ROOT / "cgroup.controllers").exists() else 1


@cache
def bases() -> dict[str, Path] | None:
    """Our folder under each controller, made; ``None`` where this may not be."""
    if os.geteuid() != 0:
        return None
    try:
        if _version() == 2:
            base = ROOT / FOLDER
            if not set(CONTROLLERS) <= set((ROOT / "cgroup.controllers").read_text().split()):
                return None
            (ROOT / "cgroup.subtree_control").write_text(ENABLE)
            base.mkdir(exist_ok=True)
            return dict.fromkeys(CONTROLLERS, base)
        made = {}
        for controller in CONTROLLERS:
            # Under the group of this process, so that a container's own limits go on to hold.
            base = ROOT / controller / _own(controller).lstrip("/") / FOLDER
            if not base.parent.joinpath("cgroup.procs").exists():
                base = ROOT / controller / FOLDER
            base.mkdir(exist_ok=True)
            made[controller] = base
        return made
    except OSError:
        return None


def _own(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"
