"""Backends for the code environments' tests: the real one, and one that is everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

UNSAFE: Mapping[str, Any] = {"sandbox": "process", "sandbox_options": {"unsafe": True}}
ISOLATED: Mapping[str, Any] = {"sandbox": "bubblewrap"}


@pytest.fixture(params=["process", pytest.param("bubblewrap", marks=pytest.mark.bubblewrap)])
def sandboxed(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Arguments that name a backend."""
    return UNSAFE if request.param == "process" else ISOLATED


@pytest.fixture
def unsafe() -> Mapping[str, Any]:
    """Arguments that name the backend that isolates nothing, for what only needs commands run."""
    return UNSAFE
