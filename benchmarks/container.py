"""``docker exec /bin/true`` beside the same command through the worker in the same container.

Both run an existing program in a container that runs already, wait for its end, and read its output and
status; the peer is the daemon's own exec, by the SDK (create, start, inspect), as harnesses use it.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import Any

from agentgym.sandboxes import make_backend


async def measure(repeats: int = 40) -> dict[str, Any]:
    import docker

    client = docker.from_env()
    ours, theirs = [], []
    async with make_backend("docker") as backend, await backend.start() as sandbox:
        container = next(
            c for c in client.containers.list() if sandbox.id in (c.name, c.labels.get("agentgym.id"))
        )
        for _ in range(repeats):
            started = time.perf_counter()
            assert (await sandbox.exec(["/bin/true"])).ok
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            code, _ = await asyncio.to_thread(container.exec_run, ["/bin/true"])
            assert code == 0
            theirs.append(time.perf_counter() - started)
    mine, other = (1000 * statistics.median(times) for times in (ours, theirs))
    return {
        "ours_ms": round(mine, 2),
        "exec_ms": round(other, 2),
        "ratio": round(other / mine, 1),
        "repeats": repeats,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure()), indent=2))
