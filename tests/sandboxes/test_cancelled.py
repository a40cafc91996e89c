"""A start of a bubblewrap sandbox that is cancelled: nothing of it stays, and it gets no other file."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym.sandboxes import SandboxSpec, make_backend
from agentgym.sandboxes.bubblewrap import BubblewrapBackend
from agentgym.sandboxes.launching import Launching

pytestmark = pytest.mark.bubblewrap

Broken = Callable[[BubblewrapBackend], Awaitable[object]]
WAYS: dict[str, Broken] = {
    "start": lambda backend: backend.start(),
    "start with files": lambda backend: backend.start(SandboxSpec(source=Path(__file__).parent)),
    "run": lambda backend: backend.run(["/bin/sh", "-c", "echo written by the sandbox"]),
}


def groups() -> set[str]:
    """Control groups of this process's sandboxes."""
    places = (folder for folder, *_ in os.walk("/sys/fs/cgroup") if os.path.basename(folder) == "agentgym")
    return {f"{place}/{name}" for place in places for name in os.listdir(place) if f".{os.getpid()}." in name}


def opened() -> BubblewrapBackend:
    made = make_backend("bubblewrap")
    assert isinstance(made, BubblewrapBackend)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_a_start_that_is_cancelled_gets_no_other_file(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of its descriptors may be others' files by the time that the launcher is asked."""
    sent: list[str] = []
    ask = Launching.ask

    def late(self: Launching, what: str, /, *fds: int, **arguments: Any) -> dict[str, Any]:
        if what == "start":
            time.sleep(0.01)
            sent.extend(os.readlink(f"/proc/self/fd/{fd}") for fd in fds)
        return ask(self, what, *fds, **arguments)

    async def work() -> None:
        async with opened() as backend:
            await WAYS[way](backend)
            monkeypatch.setattr(Launching, "ask", late)
            for _ in range(5):
                started = asyncio.ensure_future(WAYS[way](backend))
                await asyncio.sleep(0.008)
                started.cancel()
                await asyncio.sleep(0)
                files = [(tmp_path / f"ledger-{number}").open("w") for number in range(8)]
                await asyncio.wait({started})
                for file in files:
                    file.close()

    asyncio.run(work())
    assert [name for name in sent if "ledger" in name] == []
    assert [file for file in tmp_path.iterdir() if file.read_text()] == []


@pytest.mark.parametrize("way", WAYS)
def test_a_start_that_is_cancelled_leaves_nothing(way: str) -> None:
    chance = random.Random(way)

    def left(backend: BubblewrapBackend) -> tuple[int, set[str]]:
        assert backend._launcher is not None
        mounts = Path(f"/proc/{backend._launcher._process.pid}/mountinfo")
        return mounts.read_text().count(" /mnt/"), groups()

    async def work() -> None:
        async with opened() as backend:
            await backend.run(["/bin/true"])
            before = left(backend)
            for _ in range(25):
                started = asyncio.ensure_future(WAYS[way](backend))
                await asyncio.sleep(chance.uniform(0, 0.025))
                started.cancel()
                await asyncio.wait({started})
                if not started.cancelled() and way != "run":
                    await started.result().close()  # type: ignore[attr-defined]
            for _ in range(400):  # the kernel lets go of what is dead in its own time
                if left(backend) == before:
                    break
                await asyncio.sleep(0.05)
            assert left(backend) == before

    asyncio.run(work())
