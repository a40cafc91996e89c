"""Every test of a family looks for data where `data_path` says."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from agentgym import paths
from agentgym.errors import DataUnavailable, MissingDependency


@pytest.fixture(scope="session", autouse=True)
def found(data_path: None) -> None:
    """See ``data_path``."""


@pytest.fixture(scope="session")
def repair_data() -> Callable[..., Path]:
    """Builds instances of Repair, of the recipes named or of all; skips where they cannot be had.

    The folder is called ``repair``, and is kept in the cache for as long as the recipes stay as they are.
    """
    from agentgym.environments.code import repair_build
    from agentgym.environments.code.repair_archives import Index
    from agentgym.environments.code.repair_recipes import FILE, Recipes, recipes
    from agentgym.sandboxes import make_backend

    def build(*ids: str) -> Path:
        known = recipes()
        chosen = tuple(recipe for recipe in known.recipes if not ids or recipe.id in ids)
        key = hashlib.sha256(FILE.read_bytes() + repr(ids).encode()).hexdigest()[:16]
        place = paths.cache_dir("test-repair", key) / "repair"
        if not place.is_dir():
            made = Path(tempfile.mkdtemp(dir=place.parent))

            async def run() -> None:
                async with make_backend("bubblewrap") as backend:
                    parts = Recipes(libraries=known.libraries, recipes=chosen)
                    assert await repair_build.build(made, backend, Index(), chosen=parts) == {}

            try:
                asyncio.run(run())
            except (DataUnavailable, MissingDependency) as error:
                pytest.skip(f"instances of Repair cannot be built here: {error.message}")
            made.rename(place)
        return place

    return build
