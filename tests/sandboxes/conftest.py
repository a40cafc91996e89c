"""Nothing of what these tests start is left when they have ended."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator

import pytest

from agentgym.sandboxes import records
from agentgym.sandboxes.records import start_of


def groups() -> set[str]:
    """Control groups of sandboxes whose owner is this process, or is gone."""
    found = set()
    # Others make and remove groups meanwhile, which this walk forgives.
    for folder, names, _ in os.walk("/sys/fs/cgroup"):
        if os.path.basename(folder) == "agentgym":
            for name in names:
                _, pid, started, *_ = [*name.split("."), "", ""]
                if pid.isdigit() and (int(pid) == os.getpid() or str(start_of(int(pid))) != started):
                    found.add(f"{folder}/{name}")
    return found


def recorded() -> set[str]:
    """Sandboxes on record whose owner is this process, or is gone."""
    return {record.id for record in records.listed() if record.pid == os.getpid() or record.orphaned}


@pytest.fixture
def forward() -> Callable[[float], None]:
    """Lets the clock of the running event loop jump on by seconds, as for a loop that was held up.

    With it a deadline passes at a moment of the test's choice, on a machine of any speed.
    """

    def jump(seconds: float) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time
        loop.time = lambda: now() + seconds  # type: ignore[method-assign]

    return jump


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Records and control groups, once every other fixture is down."""
    before = groups() | recorded()
    yield
    until = time.monotonic() + 60
    while left := (groups() | recorded()) - before:
        assert time.monotonic() < until, f"the tests of sandboxes left {sorted(left)}"
        time.sleep(0.2)
