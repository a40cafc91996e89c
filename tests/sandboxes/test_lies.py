"""A worker that lies: whatever it says, the host stays bounded, in time, and in the folder it was told."""

from __future__ import annotations

import asyncio
import marshal
import os
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym.sandboxes import PathRefused, SandboxEnded, SandboxSpec
from agentgym.sandboxes.served import End, ServedSandbox

Say = Callable[[bytes, int, bytes], None]
Lie = Callable[[Say, str, int, tuple[Any, ...]], None]


class Lying(ServedSandbox):
    """A sandbox whose worker is a thread that answers as a test wants it to."""

    backend = "lying"

    def __init__(self, lie: Lie) -> None:
        super().__init__("lying", SandboxSpec())
        self._lie = lie
        requests, into = os.pipe()
        out, self._answers = os.pipe()
        self._requests = os.fdopen(requests, "rb")
        self._attach(out, into)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            while head := self._requests.read(4):
                name, number, *rest = marshal.loads(self._requests.read(int.from_bytes(head, "big")))
                self._lie(self._say, name, number, tuple(rest))
        except BrokenPipeError:
            pass
        finally:
            self._requests.close()
            os.close(self._answers)

    def _say(self, kind: bytes, number: int, content: bytes) -> None:
        self.shout(kind + number.to_bytes(4, "big") + len(content).to_bytes(4, "big") + content)

    def shout(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._answers, view) :]

    async def _verdict(self, why: str) -> End:
        return End(why or "hung up")

    async def _close(self) -> None:
        self._detach()
        await asyncio.to_thread(self._thread.join)

    async def snapshot(self) -> Any:
        raise NotImplementedError

    async def restore(self, snapshot: Any) -> None:
        raise NotImplementedError

    async def fork(self) -> Any:
        raise NotImplementedError


def against(lie: Lie, use: Callable[[Lying], Awaitable[Any]]) -> Any:
    """What using a sandbox with this worker comes to, and how long the event loop was held up at most."""

    async def main() -> Any:
        sandbox = Lying(lie)
        worst = 0.0

        async def tick() -> None:
            nonlocal worst
            while True:
                # What the loop itself does, whatever else the machine does; a tenth of what may pass in all.
                before, busy = time.monotonic(), time.thread_time()
                await asyncio.sleep(0.005)
                worst = max(worst, time.thread_time() - busy, (time.monotonic() - before) / 10)

        ticking = asyncio.create_task(tick())
        try:
            async with asyncio.timeout(30):
                return await use(sandbox)
        finally:
            ticking.cancel()
            await sandbox.close()
            assert worst < 1.0, f"the event loop stood still for {worst:.2f} s"

    return asyncio.run(main())


def flood(frame: Callable[[int], bytes]) -> Lie:
    """Ever the same frame, as fast as can be."""

    def lie(say: Say, name: str, number: int, rest: tuple[Any, ...]) -> None:
        shout = say.__self__.shout  # type: ignore[attr-defined]
        for _ in range(2000):
            shout(frame(number) * 5000)
        say(b"k", number, b"")

    return lie


def frame(kind: bytes, number: int, content: bytes = b"") -> bytes:
    return kind + number.to_bytes(4, "big") + len(content).to_bytes(4, "big") + content


@pytest.mark.parametrize(
    "lie",
    [
        flood(lambda number: frame(b"o", number)),
        flood(lambda number: frame(b"e", number, b"x" * 1000)),
        flood(lambda number: frame(b"o", 12345, b"x")),
        flood(lambda number: frame(b"h", 0, b"3.11")),
        flood(lambda number: frame(b"z", number)),
        flood(lambda number: b"o\0\0\0\1\xff\xff\xff\xff"),
    ],
    ids=["empty", "too-much", "for-nobody", "greetings", "unknown", "giant"],
)
def test_a_flood_of_frames_ends_the_sandbox_and_costs_little(lie: Lie) -> None:
    tracemalloc.start()
    try:
        result = against(lie, lambda sandbox: sandbox.exec("true", limit=10_000))
        assert result.ended and result.return_code == -9
        assert len(result.stdout) <= 10_000 and len(result.stderr) <= 10_000
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reading", [False, True])
def test_output_that_nobody_asked_for_does_not_pile_up(reading: bool) -> None:
    async def use(sandbox: Lying) -> None:
        process = await sandbox.open(["sh"])
        until = time.monotonic() + 2
        with pytest.raises(SandboxEnded, match="more than it was asked for"):
            while True:
                await asyncio.sleep(0.001)
                if reading and time.monotonic() < until:
                    await process.read(5)
                else:
                    await process.write(b"")

    tracemalloc.start()
    try:
        against(flood(lambda number: frame(b"o", number, b"x" * 1000)), use)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_a_listing_without_end_is_refused_at_once() -> None:
    def lie(say: Say, name: str, number: int, rest: tuple[Any, ...]) -> None:
        for _ in range(60):
            say(b"o", number, b"f 0 0 a\0" * (1 << 17))
        say(b"k", number, b"")

    async def use(sandbox: Lying) -> None:
        with pytest.raises(PathRefused):
            await sandbox.download("x", Path("/nowhere/x"), max_files=1000)

    tracemalloc.start()
    try:
        against(lie, use)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


LISTINGS = {
    "up": b"f 644 1 ../escaped\0",
    "up inside": b"d 755 0 a\0f 644 1 a/../../escaped\0",
    "absolute": b"f 644 1 /tmp/escaped-agentgym\0",
    "empty step": b"f 644 1 a//b\0",
    "dot": b"f 644 1 ./b\0",
    "negative": b"f 644 -5 a\0",
    "no number": b"f 644 ten a\0",
    "huge number": b"f 644 " + b"9" * 5000 + b" a\0",
    "huge": b"f 644 " + b"9" * 100 + b" a\0",
    "no mode": b"f rw 1 a\0",
    "short": b"f 644\0",
    "link without target": b"l 777 1 a\0",
    "file and folder": b"f 644 1 a\0f 644 1 a/b\0",
    "folder twice a file": b"d 755 0 a\0f 644 1 a\0",
    "the same file": b"f 644 1 a\0f 644 1 a\0",
    "long name": b"f 644 1 " + b"n" * 300 + b"\0",
    "deep": b"f 644 1 " + b"d/" * 1200 + b"x\0",
    "below a link": b"d 755 0 d\0l 777 1 a\0.\0l 777 1 a/l\0../x\0f 644 1 x\0",
    "file below a link": b"l 777 1 a\0.\0f 644 1 a/f\0",
}


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS)
def test_a_listing_that_cannot_be_is_refused_and_leaves_nothing(listing: bytes, tmp_path: Path) -> None:
    def lie(say: Say, name: str, number: int, rest: tuple[Any, ...]) -> None:
        say(b"o", number, listing if name == "list" else b"x")
        say(b"k", number, b"")

    async def use(sandbox: Lying) -> None:
        with pytest.raises(PathRefused):
            await sandbox.download("source", tmp_path / "target")

    against(lie, use)
    assert list(tmp_path.rglob("*")) == []
    assert not os.path.lexists("/tmp/escaped-agentgym")


LINKS = {
    "out": (b"l", b"../../outside"),
    "absolute": (b"l", b"/etc/passwd"),
    "up behind a link": (b"l", b"here/../x"),
    "up behind a link, hidden": (b"l", b"./here/../x"),
    "to what is not copied": (b"l", b"absent"),
}


@pytest.mark.parametrize("link", [link for _, link in LINKS.values()], ids=LINKS)
def test_a_link_that_leads_out_is_left_out(link: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("the host's")

    def lie(say: Say, name: str, number: int, rest: tuple[Any, ...]) -> None:
        listing = b"f 644 1 x\0l 777 1 here\0.\0l 777 1 ok\0x\0l 777 1 bad\0" + link + b"\0"
        say(b"o", number, listing if name == "list" else b"y")
        say(b"k", number, b"")

    against(lie, lambda sandbox: sandbox.download("source", tmp_path / "target"))
    assert sorted(os.listdir(tmp_path / "target")) == ["here", "ok", "x"]
    for place in (tmp_path / "target").rglob("*"):
        assert place.resolve().is_relative_to(tmp_path / "target")


def test_more_content_than_the_listing_said_is_refused(tmp_path: Path) -> None:
    def lie(say: Say, name: str, number: int, rest: tuple[Any, ...]) -> None:
        if name == "list":
            say(b"o", number, b"f 644 10 a\0")
            say(b"k", number, b"")
        else:
            while True:
                say(b"o", number, b"x" * 100_000)

    async def use(sandbox: Lying) -> None:
        with pytest.raises((PathRefused, SandboxEnded)):
            await sandbox.download("source", tmp_path / "target")

    against(lie, use)
    assert os.listdir(tmp_path) == []


def test_results_that_cannot_be_are_results(tmp_path: Path) -> None:
    for content in (b"", b"short", b"\xff" * 40, b"\xff" * 39, b"\0" * 400):

        def lie(say: Say, name: str, number: int, rest: tuple[Any, ...], content: bytes = content) -> None:
            say(b"x", number, content)

        result = against(lie, lambda sandbox: sandbox.exec("true"))
        assert isinstance(result.return_code, int) and not result.ended


def test_a_callers_own_mistake_is_the_callers_alone() -> None:
    def lie(say: Say, name: str, number: int, rest: tuple[Any, ...]) -> None:
        for word in (b"a", b"b", b"c"):
            say(b"o", number, word)
        say(b"x", number, b"".join(value.to_bytes(8, "big") for value in (256, 0, 0, 0, 0)))

    def mistaken(stream: str, piece: bytes) -> None:
        raise RuntimeError("mine")

    async def use(sandbox: Lying) -> Any:
        with pytest.raises(RuntimeError, match="mine"):
            await sandbox.exec("true", on_output=mistaken, seconds=5)
        return await sandbox.exec("true", seconds=5)

    assert against(lie, use).stdout == "abc"
