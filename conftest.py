"""Tests that need a program which is not here skip, and the run's summary says which and why.

Invariant: one table (scripts/system-packages.txt) says what a marker needs, for the tests and for the
command that installs it. Bubblewrap comes with a Python package, and is tried: the kernel has to allow it.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest


def _missing() -> dict[str, str]:
    """Why tests with a marker cannot run here, by marker."""
    reasons = {}
    table = Path(__file__).parent / "scripts" / "system-packages.txt"
    for line in table.read_text().splitlines():
        if line and not line.startswith("#"):
            marker, executable, package = line.split()[:3]
            if marker != "bubblewrap" and shutil.which(executable) is None:
                reasons[marker] = f"needs {executable}: apt-get install {package}"
    return reasons


def _no_bubblewrap() -> str:
    """Why no sandbox of bubblewrap can be made here; empty where one was made."""
    from agentgym.errors import AgentGymError
    from agentgym.sandboxes import make_backend

    async def tried() -> str:
        async with make_backend("bubblewrap") as backend:
            done = await backend.run(["/bin/true"], seconds=20)
        return "" if done.ok else f"a sandbox of bubblewrap does not work: {done.stderr or done.return_code}"

    try:
        return asyncio.run(tried())
    except AgentGymError as error:
        return f"needs bubblewrap: {error}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run; `-ra` in pyproject.toml lists it at the end."""
    missing = _missing()
    if any(item.get_closest_marker("bubblewrap") for item in items) and (reason := _no_bubblewrap()):
        missing["bubblewrap"] = reason
    for item in items:
        for marker in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))
