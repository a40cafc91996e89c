"""Figures beside their targets: what the files that ``agentgym bench`` runs share.

Each benchmark runs in a process of its own, one after another, so that none warms or slows another; ratios
are within one run. The machine is recorded: a figure without it says little.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
SECONDS = 3600.0


@dataclass(frozen=True)
class Target:
    """A figure that a benchmark reports, and what it is held to.

    Attributes:
        name: For a person.
        source: The benchmark's file and the path of keys in its report.
        unit: Of the figure.
        bound: Which side of the limit is good.
        limit: The target.
    """

    name: str
    source: str
    unit: str
    bound: Literal["at most", "at least"]
    limit: float

    @property
    def benchmark(self) -> str:
        return self.source.partition(".")[0]


def measure(targets: Sequence[Target], progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Run every benchmark that ``targets`` names.

    Args:
        targets: The figures.
        progress: Called with the name of each benchmark before it runs.

    Returns:
        ``machine``, ``figures`` (one a target; ``value`` is ``None`` and ``error`` says why where a benchmark
        failed) and ``details`` (each benchmark's own report).
    """
    details: dict[str, Any] = {}
    for name in dict.fromkeys(target.benchmark for target in targets):
        progress(name)
        details[name] = _run(name)
    return {
        "machine": _machine(),
        "figures": [_figure(target, details[target.benchmark]) for target in targets],
        "details": details,
    }


def _run(name: str) -> dict[str, Any]:
    # -P: the folder of the benchmarks must not shadow packages of the same names.
    command = [sys.executable, "-P", str(HERE / f"{name}.py")]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS:g} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    report: dict[str, Any] = json.loads(done.stdout)
    return {**report, "benchmark_seconds": round(time.perf_counter() - started, 1)}


def _figure(target: Target, report: dict[str, Any]) -> dict[str, Any]:
    value: Any = report
    for key in target.source.split(".")[1:]:
        value = value.get(key) if isinstance(value, dict) else None
    figure = {**asdict(target), "value": value, "ok": None}
    if value is None:
        return figure | {"error": report.get("error", f"there is no {target.source}")}
    return figure | {"ok": value <= target.limit if target.bound == "at most" else value >= target.limit}


def _machine() -> dict[str, Any]:
    model = ""
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        names = [
            line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else ""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def main(targets: Sequence[Target]) -> None:
    """Print the report as one JSON document; progress goes to stderr."""
    print(json.dumps(measure(targets, lambda name: print(f"measuring {name}", file=sys.stderr)), indent=2))
