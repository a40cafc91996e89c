"""The pool: fresh sandboxes, in order, no more than the machine can start, and all of them ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentgym.errors import DeadlineExceeded, SandboxFailed, UsageError
from agentgym.sandboxes import Backend, ExecResult, Sandbox, SandboxPool, SandboxSpec, Snapshot, make_backend
from agentgym.sandboxes.pool import Admission


class Slowly(Backend):
    """Starts real sandboxes, when it is let: it counts who starts at a time."""

    name, tier = "slowly", "none"

    def __init__(self) -> None:
        self.inner = make_backend("process", unsafe=True)
        self.go = asyncio.Event()
        self.go.set()
        self.starting = self.peak = self.started = 0
        self.problem: Exception | None = None

    async def start(self, spec: SandboxSpec | None = None, **given: Any) -> Sandbox:
        self.starting += 1
        self.peak = max(self.peak, self.starting)
        try:
            await self.go.wait()
            if self.problem is not None:
                raise self.problem
            self.started += 1
            return await self.inner.start(spec, **given)
        finally:
            self.starting -= 1

    async def run(self, command: Sequence[str], spec: Any = None, *, seconds: float = 1) -> ExecResult:
        return await self.inner.run(command, spec, seconds=seconds)

    async def forget(self, snapshot: Snapshot) -> None:
        await self.inner.forget(snapshot)

    async def aclose(self) -> None:
        await self.inner.aclose()

    def abandon(self) -> None:
        self.inner.abandon()


class Ready(Slowly):
    """Its sandboxes are there at once, when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Sandbox] = []

    async def start(self, spec: SandboxSpec | None = None, **given: Any) -> Sandbox:
        self.starting += 1
        await self.go.wait()
        self.starting -= 1
        if self.problem is not None:
            raise self.problem
        return self.made.pop()


async def until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


def test_a_sandbox_is_given_out_once_and_never_again() -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=1) as pool:
            async with pool.sandbox() as first:
                await first.write("trace", "of the first")
            async with pool.sandbox() as second:
                assert second.id != first.id
                assert (await second.exec("ls -A")).stdout == ""
            with pytest.raises(UsageError, match="closed"):
                await first.exec("true")

    asyncio.run(check())


def test_warm_ones_are_ready_before_they_are_asked_for() -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=2) as pool:
            await pool.release(await pool.acquire())
            await until(lambda: not backend.starting and pool.size == 2)
            backend.go.clear()  # nothing starts any more
            async with asyncio.timeout(60):
                held = [await pool.acquire(), await pool.acquire()]
            backend.go.set()
            assert len({sandbox.id for sandbox in held}) == 2

    asyncio.run(check())


def test_there_are_never_more_than_most_and_who_waits_is_served_in_order() -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=0, most=2) as pool:
            served: list[int] = []

            async def take(number: int) -> None:
                async with pool.sandbox():
                    served.append(number)
                    assert pool.size <= 2
                    await asyncio.sleep(0.01)

            await asyncio.gather(*(take(number) for number in range(8)))
            assert served == sorted(served)

    asyncio.run(check())


def test_who_waits_too_long_is_told_and_takes_nothing_away() -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=0, most=1) as pool:
            held = await pool.acquire()
            with pytest.raises(DeadlineExceeded) as told:
                await pool.acquire(seconds=0.05)
            assert told.value.boundary == "sandbox"
            await pool.release(held)
            async with pool.sandbox(seconds=60):
                pass

    asyncio.run(check())


def test_one_that_comes_as_the_time_runs_out_is_had(forward: Callable[[float], None]) -> None:
    async def check() -> None:
        async with Ready() as backend, SandboxPool(backend, warm=0, most=1) as pool:
            backend.made.append(await backend.inner.start())
            backend.go.clear()
            asking = asyncio.create_task(pool.acquire(seconds=60))
            await until(lambda: backend.starting == 1)
            backend.go.set()
            forward(100)  # the loop finds both at once, and who asked is woken by what came later
            sandbox = await asking
            assert (await sandbox.exec("true")).ok
            await pool.release(sandbox)
            assert pool.size == 0

    asyncio.run(check())


def test_a_start_that_fails_as_the_time_runs_out_is_told(forward: Callable[[float], None]) -> None:
    async def check() -> None:
        async with Ready() as backend, SandboxPool(backend, warm=0, most=1) as pool:
            backend.problem = SandboxFailed("no room")
            backend.go.clear()
            asking = asyncio.create_task(pool.acquire(seconds=60))
            await until(lambda: backend.starting == 1)
            backend.go.set()
            forward(100)
            with pytest.raises(SandboxFailed, match="no room"):
                await asking

    asyncio.run(check())


def test_a_start_that_fails_is_told_to_who_asked_and_slows_the_next_ones() -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=0) as pool:
            pool.admission.allowed = 8.0
            backend.problem = SandboxFailed("no room")
            with pytest.raises(SandboxFailed, match="no room"):
                await pool.acquire()
            assert pool.admission.allowed == 4.0 and pool.size == 0
            backend.problem = None
            async with pool.sandbox() as sandbox:
                assert (await sandbox.exec("true")).ok

    asyncio.run(check())


def test_no_more_start_at_a_time_than_are_admitted() -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=0, most=50) as pool:
            pool.admission.allowed = 3.0
            backend.go.clear()
            waiting = [asyncio.create_task(pool.acquire()) for _ in range(12)]
            await until(lambda: backend.starting >= 3)
            await asyncio.sleep(0.05)
            assert backend.starting == 3
            backend.go.set()
            await asyncio.gather(*waiting)
            assert backend.started == 12

    asyncio.run(check())


def test_nothing_starts_beside_another_when_memory_is_short() -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=4, memory=lambda: 1 << 20) as pool:
            async with pool.sandbox():
                await asyncio.sleep(0.05)
                assert pool.size == 1
            assert backend.peak == 1

    asyncio.run(check())


def test_slow_starts_halve_and_quick_ones_add_a_little() -> None:
    admission = Admission(most=16)
    for _ in range(40):
        admission.took(0.02)
    quick = admission.allowed
    assert 8 < quick <= 16
    admission.took(1.0)
    assert admission.allowed == quick / 2
    for _ in range(20):
        admission.took(5.0)
    assert admission.places == 1
    admission.took(0.1)  # four times the quickest, and nobody would notice
    assert admission.allowed == 2.0


def test_a_lease_that_runs_out_closes_its_sandbox(forward: Callable[[float], None]) -> None:
    async def check() -> None:
        async with Slowly() as backend, SandboxPool(backend, warm=0, lease=100) as pool:
            kept, forgotten = await pool.acquire(), await pool.acquire()
            for _ in range(3):
                forward(60)
                await asyncio.sleep(0)  # whatever is due is done
                pool.renew(kept)
            await until(lambda: pool.size == 1)
            assert (await kept.exec("true")).ok
            with pytest.raises(UsageError, match="closed"):
                await forgotten.exec("true")
            with pytest.raises(UsageError, match="not given out"):
                pool.renew(forgotten)

    asyncio.run(check())


def test_closing_ends_all_and_refuses_who_waits() -> None:
    async def check() -> None:
        async with Slowly() as backend:
            pool = SandboxPool(backend, warm=2, most=2)
            held = await pool.acquire()
            backend.go.clear()
            waiting = [asyncio.create_task(pool.acquire()) for _ in range(3)]
            await asyncio.sleep(0.05)
            backend.go.set()
            closing = asyncio.create_task(pool.aclose())
            results = await asyncio.gather(*waiting, return_exceptions=True)
            await closing
            assert any(isinstance(result, UsageError) for result in results)
            assert pool.size == 0
            with pytest.raises(UsageError):
                await held.exec("true")
            with pytest.raises(UsageError, match="closed"):
                await pool.acquire()

    asyncio.run(check())


@pytest.mark.parametrize("wrong", [{"most": 0}, {"warm": 3, "most": 2}, {"lease": 0.0}])
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SandboxPool(make_backend("process", unsafe=True), **wrong)


def test_starts_that_the_pool_knows_nothing_of_wait_for_each_other_too() -> None:
    """Those of environments: in order, whoever gives up in between, and whatever fails."""
    order: list[int] = []

    async def check() -> None:
        admission, go = Admission(most=2), asyncio.Event()
        running = peak = 0

        async def start(number: int) -> None:
            nonlocal running, peak
            async with admission.start():
                order.append(number)
                running, peak = running + 1, max(peak, running + 1)
                try:
                    await go.wait()
                    if number == 3:
                        raise SandboxFailed("not now")
                finally:
                    running -= 1

        tasks = [asyncio.create_task(start(number)) for number in range(7)]
        await until(lambda: len(order) == 2)
        tasks[2].cancel()  # while it waits
        go.set()
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in told] == [
            type(None), type(None), asyncio.CancelledError, SandboxFailed, type(None), type(None), type(None)
        ]  # fmt: skip
        assert peak == 2 and order == [0, 1, 3, 4, 5, 6]
        async with admission.start():  # nothing is lost
            pass

    asyncio.run(check())


def test_one_whose_turn_comes_as_it_is_cancelled_hands_it_on() -> None:
    async def check() -> None:
        admission = Admission(most=1, allowed=1.0)

        async def start() -> None:
            async with admission.start():
                pass

        async with admission.start():
            second, third = (asyncio.create_task(start()) for _ in range(2))
            await asyncio.sleep(0)
        second.cancel()  # its turn has come, and it has not run since
        await asyncio.wait({second}, timeout=60)
        assert second.cancelled()
        async with asyncio.timeout(60):
            await third

    asyncio.run(check())
