"""What the engine and the journal cost a turn: a no-op environment and a scripted policy around them.

Everything that is not the engine or the journal does nothing, so time over turns is their cost, building the
environments included. ``at_once`` episodes are alive together in one process. The journal waits for the disk
at the end of each episode; ``unsynced_ms_per_turn`` is the cost without that wait, and ``fsync_ms`` what one
such wait takes on this disk, which other load on it makes longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

TURNS = 10
LIMIT_MS = 0.3


def measure(
    repeats: int = 5, *, at_once: tuple[int, ...] = (32, 1000), episodes: int = 1000
) -> dict[str, Any]:
    """Milliseconds a turn at each concurrency: medians of ``repeats`` runs, after one that warms up."""
    report: dict[str, Any] = {"turns": TURNS, "episodes": episodes, "limit_ms": LIMIT_MS}
    for concurrency in at_once:
        synced = [_run(concurrency, episodes, "segment") for _ in range(repeats + 1)][1:]
        unsynced = [_run(concurrency, episodes, "never") for _ in range(repeats)]
        report[f"at_once_{concurrency}"] = {
            "ms_per_turn": statistics.median(wall for wall, _ in synced),
            "cpu_ms_per_turn": statistics.median(cpu for _, cpu in synced),
            "unsynced_ms_per_turn": statistics.median(wall for wall, _ in unsynced),
        }
    report["fsync_ms"] = _fsync(100)
    return report


def _run(concurrency: int, episodes: int, fsync: Any) -> tuple[float, float]:
    """Wall and CPU milliseconds a turn of one run."""
    from agentgym.journal import Journal
    from agentgym.policies.simple import ScriptedPolicy
    from agentgym.rollout.engine import Episode, RolloutConfig, RolloutEngine
    from agentgym.wrappers.stack import EnvConfig

    plan = [Episode(f"e{i:05}", f"noop-train-{i}") for i in range(episodes)]
    env = EnvConfig("agentgym.testing:NoopEnv", {"turns": TURNS})
    config = RolloutConfig(concurrency=concurrency)

    async def collect(folder: Path) -> int:
        with Journal.create(folder, {}, fsync=fsync) as journal:
            async with aclosing(RolloutEngine(env, ScriptedPolicy(["wait"]), config, journal)) as made:
                return sum(len(t.turns) for t in await made.collect(plan))

    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        turns = asyncio.run(collect(Path(folder) / "run"))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert turns == episodes * TURNS
    return 1000 * wall / turns, 1000 * cpu / turns


def _fsync(times: int) -> float:
    """Median milliseconds of an fsync after a write of 4 KB."""
    waits = []
    with tempfile.TemporaryFile() as file:
        for _ in range(times):
            file.write(b"x" * 4096)
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            waits.append(time.perf_counter() - started)
    return 1000 * statistics.median(waits)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
