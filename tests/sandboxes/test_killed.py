"""Whoever uses sandboxes is killed, at any moment: nothing of them is left."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentgym.errors import SandboxFailed
from agentgym.sandboxes import SandboxSpec, cgroups, make_backend, records
from agentgym.sandboxes.bubblewrap import BubblewrapBackend
from agentgym.sandboxes.launching import USERS

HERE = Path(__file__).parent / "probes"
USER = 64_951
SECONDS = 60.0
SPEC = SandboxSpec(memory=64 << 20, disk=8 << 20)

pytestmark = pytest.mark.bubblewrap


class Doomed:
    """A process that uses sandboxes until it is killed."""

    def __init__(self, kind: str, user: int, folder: Path, seed: int) -> None:
        folder.mkdir()
        self.folder, self.cache = folder, folder / "cache"
        self.cache.mkdir()
        if user:
            for place in (folder, self.cache):
                os.chown(place, user, user)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "doomed.py"), kind, str(user), str(folder), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "AGENTGYM_CACHE": str(self.cache), "TMPDIR": str(folder)},
        )
        pid = self.process.pid
        self.user = user or (USERS[0] + pid % (USERS[1] - USERS[0]) if os.geteuid() == 0 else os.getuid())
        self.shares = not user and os.geteuid() != 0

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def left(self) -> list[str]:
        """Processes, control groups, mounts, records and temporary folders."""
        pid = str(self.process.pid)
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if records.start_of(int(place.name)) is None:  # it is dead, and waits to be buried
                    continue
                words = (place / "cmdline").read_bytes().split(b"\0")
                mine = place.stat().st_uid == self.user and not self.shares
            except OSError:
                continue
            if mine or (pid.encode() in words and (b"launcher.py" in b" ".join(words) or b"-c" in words)):
                found.append(f"process {place.name}: {b' '.join(words)[:200]!r}")
        for base in set((cgroups.bases() or {}).values()):
            if base.exists():
                found += [f"group {place}" for place in base.iterdir() if f".{pid}." in place.name]
        found += [f"record {place}" for place in (self.cache / "sandboxes").glob("*.json")]
        mounts = Path("/proc/self/mountinfo").read_text()
        found += ["a mount"] if "bubblewrap-" in mounts or "snapshot-" in mounts else []
        found += [f"folder {place}" for place in self.folder.iterdir() if place.name.startswith("agentgym-")]
        return found


def gone(doomed: Doomed) -> float:
    """Seconds until nothing was left."""
    started = time.monotonic()
    while left := doomed.left():
        assert time.monotonic() - started < SECONDS, left
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody reaches, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="agentgym-killed-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(params=["root", "user"])
def user(request: pytest.FixtureRequest) -> int:
    """Whose sandboxes they are; 0: those of who runs the tests."""
    root = os.geteuid() == 0
    if request.param == "root":
        if not root:
            pytest.skip("needs root")
        return 0
    if root and not all(above.stat().st_mode & 0o005 == 0o005 for above in (HERE, *HERE.parents)):
        pytest.skip("an ordinary user cannot read the repository here")
    return USER if root else 0


def kill_some(user: int, folder: Path, seeds: range) -> list[float]:
    """Let some live at the same time, and kill each at a moment of its own; how long each took to be gone."""
    # As an ordinary user their processes cannot be told apart: one at a time, by its user.
    step = len(seeds) if not user else 1
    took = []
    for start in range(0, len(seeds), step):
        some = [
            (Doomed("bubblewrap", user, folder / str(seed), seed), random.Random(seed))
            for seed in seeds[start : start + step]
        ]
        for doomed, draw in some:
            assert doomed.line() == str(doomed.process.pid)
            if draw.random() < 0.7:  # otherwise while the first one starts
                assert doomed.line() == "ready"
            time.sleep(draw.uniform(0.0, 0.4))
            doomed.kill()
        took += [gone(doomed) for doomed, _ in some]
        for doomed, _ in some:
            shutil.rmtree(doomed.folder)
    return took


def test_nothing_is_left_of_an_owner_that_is_killed(user: int, place: Path) -> None:
    took = kill_some(user, place, range(5) if not user else range(100, 103))
    assert max(took) < 20


@pytest.mark.slow
def test_nothing_is_left_of_forty_owners_that_are_killed(user: int, place: Path) -> None:
    assert max(kill_some(user, place, range(1000, 1020))) < 20


def children(pid: int) -> dict[str, int]:
    """The launcher and the reaper of a process."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if int((place / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                words = (place / "cmdline").read_bytes()
                found["launcher" if b"launcher.py" in words else "reaper"] = int(place.name)
        except (OSError, ValueError):
            continue
    return found


def test_without_a_reaper_the_next_one_cleans_up(
    user: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = Doomed("bubblewrap", user, place / "doomed", 7)
    doomed.line()
    assert doomed.line() == "ready"
    os.kill(children(doomed.process.pid)["reaper"], signal.SIGKILL)
    doomed.kill()
    time.sleep(1.0)
    left = doomed.left()
    assert left and not any(line.startswith("process") for line in left), left
    monkeypatch.setenv("AGENTGYM_CACHE", str(doomed.cache))
    records.collect()
    assert gone(doomed) < 10
    assert records.collect() == []


def test_a_child_that_was_forked_keeps_nothing_alive(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, signal, time\n"
        "from agentgym.sandboxes import make_backend\n"
        "async def main():\n"
        "    backend = make_backend('bubblewrap')\n"
        "    async with await backend.start() as sandbox:\n"
        "        await sandbox.exec('sleep 60 & echo')\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(20)\n"
        "            os._exit(0)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    (tmp_path / "cache").mkdir()
    environment = {**os.environ, "AGENTGYM_CACHE": str(tmp_path / "cache")}
    started = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    doomed = Doomed.__new__(Doomed)
    doomed.process, doomed.folder, doomed.cache = started, tmp_path, tmp_path / "cache"  # type: ignore[assignment]
    doomed.shares = os.geteuid() != 0
    doomed.user = USERS[0] + started.pid % (USERS[1] - USERS[0])
    try:
        assert started.wait(30) == -signal.SIGKILL
        assert gone(doomed) < 15
    finally:
        os.killpg(started.pid, signal.SIGKILL)


def test_a_launcher_that_is_killed_takes_its_sandboxes_along() -> None:
    async def main() -> None:
        async with make_backend("bubblewrap") as backend:
            boxes = [await backend.start(SPEC) for _ in range(3)]
            snapshot = await boxes[0].snapshot()
            forks = [await box.fork() for box in boxes]
            assert isinstance(backend, BubblewrapBackend) and backend._launcher is not None
            backend._launcher._process.kill()
            for box in (*boxes, *forks):
                with pytest.raises(SandboxFailed):
                    await box.exec("sleep 5", seconds=20)
            with pytest.raises(SandboxFailed):
                await boxes[0].snapshot()
            assert (await (await backend.start(SPEC)).exec("echo on")).stdout == "on\n"
            await backend.forget(snapshot)
            for box in (*boxes, *forks):
                await box.close()

    asyncio.run(main())
    mine = [record for record in records.listed() if record.pid == os.getpid()]
    assert mine == []
