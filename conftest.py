"""Tests that need a program which is not here skip, and the run's summary says which and why.

Invariant: one table (scripts/system-packages.txt) says what a marker needs, for the tests and for the
command that installs it.
"""

from __future__ import annotations

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
            if shutil.which(executable) is None:
                reasons[marker] = f"needs {executable}: apt-get install {package}"
    return reasons


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run; `-ra` in pyproject.toml lists it at the end."""
    missing = _missing()
    for item in items:
        for marker in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))
