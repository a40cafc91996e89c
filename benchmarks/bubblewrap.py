"""Milliseconds that bubblewrap sandboxes take: to start, to run a command, to fork; and a hundred at once.

What is measured is what a caller waits for: ``start`` until the worker inside has answered, ``once`` from the
call to the result of a sandbox that is made for one command and removed, ``running`` from the call to the
result, ``fork`` until the new sandbox answers and holds every file. Beside them, in the same run and in turn,
a plain subprocess, which isolates nothing: it says how loaded the machine is.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from agentgym.sandboxes import Backend, Sandbox, make_backend

FILES, BYTES = 1_000, 10_240
AT_ONCE = 100
FILL = f"mkdir f && for i in $(seq {FILES}); do head -c {BYTES} /dev/zero > f/$i; done"


async def timed(call: Callable[[], Awaitable[Any]], done: Callable[[Any], Awaitable[None]]) -> float:
    started = time.perf_counter()
    result = await call()
    took = time.perf_counter() - started
    await done(result)
    return took


def told(times: list[float]) -> dict[str, float]:
    ordered = sorted(1000 * t for t in times)
    return {
        "p50_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[int(0.95 * (len(ordered) - 1))], 2),
        "best_ms": round(ordered[0], 2),
        "repeats": len(ordered),
    }


async def subprocess_true() -> None:
    process = await asyncio.create_subprocess_exec("/bin/true")
    assert await process.wait() == 0


async def at_once(backend: Backend) -> dict[str, float]:
    started = time.perf_counter()
    made = await asyncio.gather(*(backend.start() for _ in range(AT_ONCE)))
    ready = time.perf_counter()
    results = await asyncio.gather(*(sandbox.exec("echo $((6 * 7))") for sandbox in made))
    ran = time.perf_counter()
    alive = sum(result.stdout == "42\n" for result in results)
    await asyncio.gather(*(sandbox.close() for sandbox in made))
    return {
        "alive": alive,
        "start_s": round(ready - started, 2),
        "command_s": round(ran - ready, 2),
        "close_s": round(time.perf_counter() - ran, 2),
    }


async def measure(repeats: int = 60) -> dict[str, Any]:
    """Every figure of one backend, in turn, so that other load meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in ("start", "once", "running", "fork", "subprocess")}

    async def close(sandbox: Sandbox) -> None:
        await sandbox.close()

    async def held(sandbox: Sandbox) -> None:
        counted = await sandbox.exec("ls f | wc -l; du -b -d 0 f | cut -f 1")
        assert counted.stdout.split()[0] == str(FILES), counted
        await sandbox.close()

    async def right(result: Any) -> None:
        assert result is None or result.ok, result

    async with make_backend("bubblewrap") as backend:
        full = await backend.start()
        assert (await full.exec(FILL)).ok
        running = await backend.start()
        for _ in range(repeats):
            times["start"].append(await timed(backend.start, close))
            times["once"].append(await timed(lambda: backend.run(["/bin/true"]), right))
            for _ in range(5):
                times["running"].append(await timed(lambda: running.exec(["/bin/true"]), right))
            times["fork"].append(await timed(full.fork, held))
            times["subprocess"].append(await timed(subprocess_true, right))
        report: dict[str, Any] = {name: told(taken) for name, taken in times.items()}
        report["at_once"] = await at_once(backend)
        report["enforces"] = sorted(backend.enforces)
    return report


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure()), indent=2))
