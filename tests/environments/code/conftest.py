"""Backends for the code environments' tests: the real ones, and one that is everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

UNSAFE: Mapping[str, Any] = {"sandbox": "process", "sandbox_options": {"unsafe": True}}
ISOLATED = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("bubblewrap", "docker")]
"""Each needs what its marker says."""


@pytest.fixture(params=["process", *ISOLATED])
def sandboxed(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Arguments that name a backend."""
    return UNSAFE if request.param == "process" else {"sandbox": request.param}


@pytest.fixture(params=ISOLATED)
def isolated(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Arguments that name a backend that isolates."""
    return {"sandbox": request.param}


@pytest.fixture
def unsafe() -> Mapping[str, Any]:
    """Arguments that name the backend that isolates nothing, for what only needs commands run."""
    return UNSAFE
