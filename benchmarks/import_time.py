"""Seconds that ``import agentgym`` takes in a fresh interpreter, start of the interpreter left out.

Wall time includes whatever else runs on the machine, so the best of the repeats is the figure to hold
against the limit; the median is beside it, and CPU seconds, which other load disturbs less.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

LIMIT_SECONDS = 0.4
HEAVY = ("torch", "transformers", "vllm", "playwright", "docker", "ray", "textworld")

_CHILD = """
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
import agentgym
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([wall, cpu, sorted({m.split(".")[0] for m in sys.modules})]))
"""


def measure(repeats: int = 5) -> dict[str, Any]:
    """Import seconds: best and median of ``repeats`` interpreters, after one that warms the disk's cache."""
    walls, cpus, loaded = [], [], set[str]()
    for run in range(repeats + 1):
        command = [sys.executable, "-c", _CHILD]
        wall, cpu, modules = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        loaded |= set(modules)
        if run:
            walls.append(wall)
            cpus.append(cpu)
    return {
        "seconds": min(walls),
        "median_seconds": statistics.median(walls),
        "cpu_seconds": min(cpus),
        "limit_seconds": LIMIT_SECONDS,
        "heavy_modules": sorted(loaded.intersection(HEAVY)),
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
