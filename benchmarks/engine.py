"""What the engine and the journal cost a turn: a no-op environment and a scripted policy around them.

Everything that is not the engine or the journal does nothing, so wall time over turns is their cost, building
the environments included. ``at_once`` episodes are alive together in one process.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

TURNS = 10
LIMIT_MS = 0.3


def measure(
    repeats: int = 5, *, at_once: tuple[int, ...] = (32, 1000), episodes: int = 1000
) -> dict[str, Any]:
    """Milliseconds a turn at each concurrency: median of ``repeats`` runs, after one that warms up."""
    report: dict[str, Any] = {"turns": TURNS, "episodes": episodes, "limit_ms": LIMIT_MS}
    for concurrency in at_once:
        runs = [_run(concurrency, episodes) for _ in range(repeats + 1)][1:]
        report[f"at_once_{concurrency}"] = {
            "ms_per_turn": statistics.median(wall for wall, _ in runs),
            "cpu_ms_per_turn": statistics.median(cpu for _, cpu in runs),
        }
    return report


def _run(concurrency: int, episodes: int) -> tuple[float, float]:
    from agentgym.journal import Journal
    from agentgym.policies.simple import ScriptedPolicy
    from agentgym.rollout.engine import Episode, RolloutConfig, engine
    from agentgym.wrappers.stack import EnvConfig

    plan = [Episode(f"e{i:05}", f"noop-train-{i}") for i in range(episodes)]
    env = EnvConfig("agentgym.testing:NoopEnv", {"turns": TURNS})
    config = RolloutConfig(concurrency=concurrency)

    async def collect(folder: Path) -> int:
        with Journal.create(folder, {}) as journal:
            async with engine(env, ScriptedPolicy(["wait"]), config, journal) as made:
                return sum(len(t.turns) for t in await made.collect(plan))

    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        turns = asyncio.run(collect(Path(folder) / "run"))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert turns == episodes * TURNS
    return 1000 * wall / turns, 1000 * cpu / turns


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
