from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentgym.errors import DeadlineExceeded, EnvironmentFailed, PolicyFailed, UnknownName
from agentgym.messages import text_of
from agentgym.rollout import pool as pools
from agentgym.rollout.pool import EnvPool, Handle
from agentgym.wrappers.stack import EnvConfig

KINDS = ["async", "thread", "process"]
CRASH = "agentgym.testing:CrashEnv"


def on(config: EnvConfig, use: Callable[[Handle], Awaitable[Any]], **options: Any) -> Any:
    """Lease one environment and use it."""

    async def run() -> Any:
        pool = EnvPool(config, 1, **options)
        try:
            async with pool.lease() as handle:
                return await use(handle)
        finally:
            await pool.aclose()

    return asyncio.run(run())


def says(config: EnvConfig, action: str) -> str:
    async def use(handle: Handle) -> str:
        await handle.reset(0, None, 60)
        return text_of((await handle.step(action, 60)).content)

    return str(on(config, use))


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds; one that nobody has reaped yet has ended."""
    for _ in range(500):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_the_kinds_of_worker_answer_alike(wild: str) -> None:
    async def use(handle: Handle) -> list[Any]:
        return [
            await handle.reset(7, "train-3", 60),
            await handle.step("look", 60),
            await handle.step("end", 60),
        ]

    one, *others = (on(EnvConfig(f"{wild}:Wild", worker=kind), use) for kind in KINDS)
    assert others == [one, one]
    begin, middle, end = one
    assert begin.info["admissible_actions"] == ["end"] and "odd" not in begin.info
    assert type(middle.reward) is float and end.info["success"] is True and end.terminated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ["timeout", "score high", "exit"])
def test_the_kinds_of_worker_fail_alike(wild: str, kind: Any, action: str) -> None:
    with pytest.raises(
        EnvironmentFailed, match=r"step raised (TimeoutError|ValueError|SystemExit|RuntimeError)"
    ):
        says(EnvConfig(f"{wild}:Wild", worker=kind), action)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_built_has_failed(wild: str, kind: Any) -> None:
    with pytest.raises(EnvironmentFailed, match="RuntimeError: cannot be built"):
        says(EnvConfig(f"{wild}:Wild", {"broken": True}, worker=kind), "look")


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_task_is_the_callers_mistake(wild: str, kind: Any) -> None:
    with pytest.raises(UnknownName, match="unknown task 'nowhere'") as caught:
        on(EnvConfig(f"{wild}:Wild", worker=kind), lambda handle: handle.reset(0, "nowhere", 60))
    assert caught.value.name == "nowhere" and "train-0" in caught.value.hint


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        ("print 10000000", "ok"),
        ("stdin", "read ''"),
        ("big 5000000", "o" * 5_000_000),
        ("say \ud800 é \U0001f600 \ud83d\ude00 \x00", "\ud800 é \U0001f600 \ud83d\ude00 \x00"),
    ],
    ids=["print", "stdin", "big", "surrogates"],
)
def test_nothing_that_an_environment_says_breaks_the_pipe(
    wild: str, action: str, answer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert says(EnvConfig(f"{wild}:Wild", worker="process"), action) == answer


@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize("call", ["reset", "step", "close"])
def test_every_call_has_a_deadline(
    kind: Any, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pools, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(pools, "ABANDON_SECONDS", 0.2)
    config = EnvConfig(CRASH, {"hang": 8.0}, worker=kind)

    async def use(handle: Handle) -> None:
        if call == "reset":
            await handle.reset(0, "calm-0", 60)  # the worker is up: the deadline is of the call alone
            await handle.reset(0, "begin-hang", 0.2)
        await handle.reset(0, "calm-0", 60)
        await handle.step("hang" if call == "step" else "close hang", 0.2 if call == "step" else 60)

    with caplog.at_level(logging.WARNING):
        if call == "close":
            on(config, use)
            assert "close did not finish within 0.2 s" in caplog.text
        else:
            with pytest.raises(DeadlineExceeded, match=f"{call} did not finish within 0.2 s"):
                on(config, use)


def test_a_hung_process_is_killed_with_its_children(wild: str) -> None:
    pids: list[int] = []

    async def use(handle: Handle) -> None:
        await handle.reset(0, None, 60)
        pids.extend(int(pid) for pid in text_of((await handle.step("child", 60)).content).split())
        await handle.step("hang", 0.2)

    with pytest.raises(DeadlineExceeded):
        on(EnvConfig(f"{wild}:Wild", worker="process"), use)
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_cancelled_lease_ends_its_process(wild: str) -> None:
    async def run() -> list[int]:
        pool, pids = EnvPool(EnvConfig(f"{wild}:Wild", worker="process"), 1), []

        async def episode() -> None:
            async with pool.lease() as handle:
                await handle.reset(0, None, 60)
                answer = text_of((await handle.step("child", 60)).content)
                pids.extend(int(pid) for pid in answer.split())
                await handle.step("hang", 60)

        task = asyncio.create_task(episode())
        while not pids:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return pids

    assert all(gone(pid) for pid in asyncio.run(run()))


@pytest.mark.parametrize("how", ["itself", "from outside"])
def test_a_dead_worker_is_told_from_a_slow_one_and_replaced(wild: str, how: str) -> None:
    async def run() -> None:
        pool = EnvPool(EnvConfig(CRASH if how == "itself" else f"{wild}:Wild", worker="process"), 1)
        with pytest.raises(EnvironmentFailed, match=r"died during step .exit code (13|-9)"):
            async with pool.lease() as handle:
                await handle.reset(0, None, 60)
                if how == "from outside":
                    os.kill(int(text_of((await handle.step("child", 60)).content).split()[0]), signal.SIGKILL)
                    await handle.step("look", 60)
                await handle.step("die", 60)
        async with pool.lease() as handle:
            await handle.reset(0, None, 60)
        await pool.aclose()

    asyncio.run(run())


def test_hung_threads_are_counted_and_capped_and_forgotten_when_they_end(
    wild: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "ABANDON_SECONDS", 0.05)

    async def run() -> None:
        pool = EnvPool(EnvConfig(f"{wild}:Wild", worker="thread"), 1, abandon_limit=2)
        for expected in (1, 2):
            with pytest.raises(DeadlineExceeded):
                async with pool.lease() as handle:
                    await handle.reset(0, None, 60)
                    await handle.step("hang 1.5", 0.05)
            assert pool.abandoned == expected
        with pytest.raises(EnvironmentFailed, match='worker="process"'):
            async with pool.lease():
                pass
        while pool.abandoned:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        async with pool.lease() as handle:
            await handle.reset(0, None, 60)
        await pool.aclose()

    asyncio.run(run())


def test_a_thread_that_only_failed_is_no_hung_one(wild: str) -> None:
    async def run() -> int:
        pool = EnvPool(EnvConfig(f"{wild}:Wild", worker="thread"), 1, abandon_limit=1)
        for _ in range(3):
            with pytest.raises(EnvironmentFailed, match="its own"):
                async with pool.lease() as handle:
                    await handle.reset(0, None, 60)
                    await handle.step("timeout", 60)
        return pool.abandoned

    assert asyncio.run(run()) == 0


def test_an_environment_is_used_again_and_a_failed_one_is_not(wild: str) -> None:
    async def run() -> None:
        pool = EnvPool(EnvConfig(f"{wild}:Wild", worker="async"), 2)
        async with pool.lease() as first:
            await first.reset(0, None, 60)
        with pytest.raises(EnvironmentFailed):
            async with pool.lease() as second:
                assert second is first
                await second.step("timeout", 60)
        async with pool.lease() as third:
            assert third is not first
        await pool.aclose()

    asyncio.run(run())


ORPHAN = """
import asyncio, sys
from agentgym.messages import text_of
from agentgym.rollout.pool import EnvPool
from agentgym.wrappers.stack import EnvConfig

async def main():
    async with EnvPool(EnvConfig("wild_env:Wild", worker="process"), 1).lease() as handle:
        await handle.reset(0, None, 60)
        print(text_of((await handle.step("child", 60)).content), flush=True)
        await handle.step("hang", 600)

asyncio.run(main())
"""


def test_kill_9_of_the_owner_leaves_no_worker(wild: str, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        worker, child = (int(pid) for pid in owner.stdout.readline().split())
        owner.kill()
    try:
        assert gone(worker)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (PolicyFailed("out of memory"), True),
        (DeadlineExceeded("generate", 1.0, boundary="policy"), True),
        (EnvironmentFailed("broken"), False),
        (ValueError("a mistake"), False),
    ],
)
def test_an_environment_outlives_the_failure_of_a_policy(kind: Any, error: Exception, kept: bool) -> None:
    async def run() -> None:
        pool = EnvPool(EnvConfig("agentgym.testing:EchoEnv", worker=kind), 1)
        try:
            with pytest.raises(type(error)):
                async with pool.lease() as first:
                    await first.reset(0, None, 60)
                    raise error
            async with pool.lease() as second:
                assert (second is first) == kept
                assert (await second.reset(1, None, 60)).content
        finally:
            await pool.aclose()

    asyncio.run(run())
