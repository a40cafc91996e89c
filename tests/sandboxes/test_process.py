"""The backend that isolates nothing: it says so, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from agentgym.errors import UsageError
from agentgym.sandboxes import make_backend, records


def test_it_starts_only_for_who_says_unsafe() -> None:
    with pytest.raises(UsageError, match="isolates nothing"):
        make_backend("process")


def test_options_that_a_backend_has_not_are_told() -> None:
    with pytest.raises(UsageError, match="'memroy'") as raised:
        make_backend("process", unsafe=True, memroy=1)
    assert raised.value.hint == "it takes unsafe"
    with pytest.raises(UsageError, match="'url'"):
        make_backend("remote")
    with pytest.raises(UsageError, match="no bubblewrap at /no/bwrap"):
        make_backend("bubblewrap", program="/no/bwrap")


@pytest.mark.parametrize(
    "way", ["setsid sleep 300 &", "kill -9 $PPID; sleep 300", "setsid sh -c 'sleep 300 & exit' &"]
)
def test_what_was_left_running_is_ended(way: str) -> None:
    async def check() -> None:
        async with make_backend("process", unsafe=True) as backend:
            sandbox = await backend.start()
            task = asyncio.create_task(sandbox.exec(f"echo $TMPDIR > where; {way}"))
            done, _ = await asyncio.wait({task}, timeout=60)
            assert done, "a command that leaves something behind does not wait for it"
            folders.append(sandbox._folder)  # type: ignore[attr-defined]
            await sandbox.close()

    folders: list[Path] = []
    asyncio.run(check())
    until = time.monotonic() + 60
    while left := running(str(folders[0])):
        assert time.monotonic() < until, left
        time.sleep(0.05)
    assert not folders[0].exists()


def running(folder: str) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            if folder.encode() in place.read_bytes():
                found.append(place.parent.name)
        except OSError:
            continue
    return found


def test_who_stops_waiting_for_the_end_does_not_stop_it() -> None:
    async def check() -> None:
        async with make_backend("process", unsafe=True) as backend:
            for moment in range(4):
                sandbox = await backend.start()
                closing = asyncio.create_task(sandbox.close())
                for _ in range(moment):
                    await asyncio.sleep(0)
                closing.cancel()
                await asyncio.wait([closing])
        assert [record for record in records.listed() if record.pid == os.getpid()] == before

    before = [record for record in records.listed() if record.pid == os.getpid()]
    asyncio.run(check())
