from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import agentgym
from agentgym.environments.text.textworld import TextWorld

# Each family in its smallest form with something to it; games of the test split are in the cache after the
# first run.
FAMILIES: dict[str, dict[str, Any]] = {
    "CoinCollector": {"level": 3},
    "TreasureHunter": {"level": 5},
    "Cooking": {"recipe": 1, "take": 1, "go": 6, "open": True, "cook": True, "cut": True},
    "Simple": {},
    "Custom": {"world": "w2-o3-q4"},
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make() -> Iterator[Callable[..., TextWorld]]:
    """Make a family in its test form; every environment is closed at the end of the test."""
    made: list[Any] = []

    def build(family: str, **kwargs: Any) -> TextWorld:
        env = agentgym.make(f"agentgym/TextWorld-{family}-v0", **{**FAMILIES[family], **kwargs}).unwrapped
        assert isinstance(env, TextWorld)
        made.append(env)
        return env

    yield build
    for env in made:
        env.close()


@pytest.fixture
def begun(make: Callable[..., TextWorld]) -> Callable[..., TextWorld]:
    """The same, with an episode of ``task`` begun."""

    def build(family: str, task: str = "test-000000", **kwargs: Any) -> TextWorld:
        env = make(family, **kwargs)
        env.reset(options={"task_id": task})
        return env

    return build
