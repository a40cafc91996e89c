"""What sandboxes run on this machine, and whose they are: a file each, so that nothing is forgotten.

Invariants: a record is written before what it names can be lost, and removed after what it names is gone; an
owner is a process by its number *and* its start, so that a number that was given anew owns nothing; cleaning
up can be done again by anybody at any time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from agentgym import paths
from agentgym.errors import AgentGymError

CLEANERS = {
    "process": "agentgym.sandboxes.records:clean_process",
    "bubblewrap": "agentgym.sandboxes.bubblewrap:clean",
    "docker": "agentgym.sandboxes.docker:clean",
    "files": "agentgym.sandboxes.scratch:clean",
}
"""Import path, by backend, of what removes what a record names: a function of the record."""


SWEEPERS = ("agentgym.sandboxes.cgroups:sweep",)
"""Import paths of what removes what dead owners left and no record names."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sandbox.

    Attributes:
        id: Its name.
        backend: Which kind.
        owner: The label that its starter gave it.
        pid: The process that started it.
        started: That process's start, in clock ticks since boot.
        since: When the sandbox was started, in seconds since 1970.
        parts: What has to be removed, as its backend knows it.
        host: The machine and the process namespace that ``pid`` is a number of.
    """

    id: str
    backend: str
    owner: str
    pid: int
    started: int
    since: float
    parts: Mapping[str, Any] = field(default_factory=dict)
    host: str = field(default_factory=lambda: host())

    @classmethod
    def new(cls, id: str, backend: str, owner: str, parts: Mapping[str, Any]) -> Record:
        """A record of this process's."""
        return cls(id, backend, owner, os.getpid(), start_of(os.getpid()) or 0, time.time(), dict(parts))

    @property
    def orphaned(self) -> bool:
        """Whether the process that started it is gone, as far as can be told here."""
        return self.host == host() and start_of(self.pid) != self.started


def host() -> str:
    """The machine and the process namespace of this process: a cache may be shared between several."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def folder() -> Path:
    """Where the records are."""
    return paths.cache_dir("sandboxes")


def add(record: Record) -> None:
    """Write a record, and see that it is cleaned up after this process's death, whatever that is."""
    watch(os.getpid())
    with paths.atomic_write(folder() / f"{record.id}.json") as place:
        place.write_text(json.dumps(asdict(record)), encoding="utf-8")


def remove(record: Record) -> None:
    """Remove a record; one that is gone is no matter."""
    (folder() / f"{record.id}.json").unlink(missing_ok=True)


def listed() -> list[Record]:
    """Every record, the oldest first."""
    found = []
    for place in folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Record(**json.loads(place.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda record: (record.since, record.id))


def collect(wanted: Callable[[Record], bool] = lambda record: record.orphaned) -> list[Record]:
    """Remove what is left of sandboxes, by default of those whose owner is gone.

    Returns:
        The records that were cleaned up. One that cannot be now (its daemon does not answer) stays, and
        holds up no other.
    """
    done = []
    for record in listed():
        if wanted(record):
            if record.backend in CLEANERS:
                module, _, name = CLEANERS[record.backend].partition(":")
                try:
                    getattr(importlib.import_module(module), name)(record)
                except AgentGymError:
                    continue
            remove(record)
            done.append(record)
    for sweeper in SWEEPERS:
        module, _, name = sweeper.partition(":")
        getattr(importlib.import_module(module), name)()
    return done


def give_up(ids: Set[str]) -> None:
    """Remove sandboxes of this process that nobody can speak to any more."""
    collect(lambda record: record.id in ids)


def clean_process(record: Record) -> None:
    """Kill the processes and remove the folder of a sandbox of the backend ``process``."""
    kill_those_of(str(record.parts["folder"]))
    shutil.rmtree(str(record.parts["folder"]), ignore_errors=True)


def kill_those_of(folder: str) -> None:
    """Kill every process whose temporary folder is in ``folder``, whoever its parent is by now.

    That is how commands of the backend ``process`` are known; one that hides it is not found.
    """
    mark = f"\0TMPDIR={folder}/".encode()
    until = time.monotonic() + 5.0
    while time.monotonic() < until:  # one may start another meanwhile, and takes a moment to die
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in b"\0" + place.read_bytes():
                    found.append(int(place.parent.name))
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.002)


def start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; ``None`` if there is none, or only its remains."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = told.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


@cache
def watch(pid: int) -> int:
    """Start this process's reaper, once; ``pid`` tells a forked child apart."""
    from agentgym.sandboxes import reaper

    return reaper.start()
