"""What runs beside the policy in the shell tasks about processes: started here, in the policy's sandbox.

Invariants: this module is sent there as text, by itself, and holds nothing that judges or solves; what a
process knows comes to it through its standard input and lies in no file. What is started ends by itself when
the task's folder is gone.

The working directory is the task's folder. It needs nothing but Python's standard library, from 3.10 on.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def keepers(text: Mapping[str, str], gone: Sequence[str]) -> None:
    """Processes that hold a file of this name and content open; some of the files are deleted then."""
    for name, content in text.items():
        Path(f"ledgers/{name}.txt").write_text(content)
        start("keeper.sh", name)
        wait_for(Path(f"ledgers/{name}.open")).unlink()
    for name in gone:
        Path(f"ledgers/{name}.txt").unlink()


def workers(workers: Sequence[tuple[str, str, str]]) -> None:
    """Processes with a name, a variable ZONE and a word."""
    for name, zone, word in workers:
        start("worker.sh", name, told=word, env={"ZONE": zone})
        wait_for(Path(f"reports/{name}.up")).unlink()


def supervisor(word: str, busy: str) -> None:
    """A process that keeps another one running, which makes the file ``busy``."""
    start("keep.sh", told=word)
    wait_for(Path(busy))


def locks(held: Sequence[str], dead: Sequence[str], taken: Sequence[str]) -> None:
    """Services with locks, and locks of none: of dead processes, and of others' ids."""
    pids = [start("service.sh", name) for name in held]
    found = dict(zip(held, pids, strict=True))
    for name in dead:
        gone = subprocess.Popen(["true"])
        gone.wait()
        found[name] = gone.pid
    found.update(zip(taken, pids, strict=False))
    for name, pid in found.items():
        Path(f"locks/{name}.lock").write_text(f"{pid}\n")


def pipes(key: str) -> None:
    """A service behind named pipes."""
    os.mkfifo("pipes/in")
    os.mkfifo("pipes/out")
    start("service.sh", told=key)
    wait_for(Path("pipes/up")).unlink()


def start(script: str, *arguments: str, told: str = "", env: Mapping[str, str] | None = None) -> int:
    """Start a script that reads one line at its start; returns its process id."""
    made = subprocess.Popen(
        ["bash", script, *arguments],
        env={"PATH": os.environ["PATH"], **(env or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert made.stdin is not None
    made.stdin.write(told.encode() + b"\n")
    made.stdin.close()
    return made.pid


def wait_for(place: Path, seconds: float = 10.0) -> Path:
    """Wait until a file is there; returns it.

    Raises:
        TimeoutError: It does not come.
    """
    until = time.monotonic() + seconds
    while not place.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{place} does not come")
        time.sleep(0.01)
    return place
