"""Every test of a family looks for data where `data_path` says."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def found(data_path: None) -> None:
    """See ``data_path``."""
