from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym.environments.text import textworld_games as games
from agentgym.environments.text.textworld import TextWorld
from agentgym.environments.text.textworld_games import Game, GeneratorPool, Recipe, generate, obtain
from agentgym.errors import DeadlineExceeded, EnvironmentFailed, MissingDependency, UsageError
from agentgym.task import Task

SMALL = Recipe("custom", {"rooms": 1, "objects": 1, "quest_length": 1, "goal": "detailed"}, 7)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENTGYM_CACHE", str(tmp_path))
    return tmp_path


class Shelf(GeneratorPool):
    """A real game that was made before, instead of a generator."""

    def __init__(self, made: Path) -> None:
        self.made, self.calls = made, 0

    def make(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        self.calls += 1
        for name in ("game.z8", "game.json"):
            shutil.copy(self.made / name, folder)
        facts: dict[str, Any] = json.loads((self.made / "facts.json").read_text())["facts"]
        return facts


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(obtain(SMALL).path.parent)


def test_everything_that_makes_a_game_is_in_its_key(monkeypatch: pytest.MonkeyPatch):
    others = [
        Recipe("custom", {**SMALL.settings, "rooms": 2}, 7),
        Recipe("custom", SMALL.settings, 8),
        Recipe("simple", SMALL.settings, 7),
    ]
    folders = {recipe.folder for recipe in (SMALL, *others)}
    reordered = Recipe("custom", dict(reversed(SMALL.settings.items())), 7)
    assert len(folders) == 4 and reordered.folder == SMALL.folder
    monkeypatch.setattr(games, "textworld_version", lambda: "9.9")
    assert SMALL.folder not in folders


def described(game: Game) -> Any:
    """TextWorld's description of a game, without the place where its maker was installed."""
    description = json.loads(game.path.with_suffix(".json").read_text())
    del description["KB"]["text_grammars_path"]
    return description


def test_a_game_depends_on_its_recipe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = obtain(SMALL)
    monkeypatch.setenv("AGENTGYM_CACHE", str(tmp_path))
    pool = GeneratorPool(1)
    try:
        obtain(Recipe("custom", {**SMALL.settings, "rooms": 3}, 1), pool)
        after = obtain(SMALL, pool)
    finally:
        pool.close()
    assert after.path != before.path and described(after) == described(before)
    assert (after.walkthrough, after.objective) == (before.walkthrough, before.objective)


@pytest.mark.slow
def test_generation_is_the_same_in_every_process_for_every_family(
    family: str, make: Callable[..., TextWorld], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = set()
    for cache in ("one", "two"):
        monkeypatch.setenv("AGENTGYM_CACHE", str(empty_cache / cache))
        env = make(family)
        game = obtain(env.tasks("train")[0].private.recipe)  # type: ignore[attr-defined]
        seen.add((game.path.with_suffix(".json").read_bytes(), game.walkthrough, game.objective))
    assert len(seen) == 1


def test_many_processes_make_a_game_once(empty_cache: Path):
    code = (
        "from agentgym.environments.text import textworld_games as games\n"
        "made, make = [], games._make\n"
        "games._make = lambda *a: made.append(1) or make(*a)\n"
        f"recipe = games.Recipe('custom', {dict(SMALL.settings)!r}, 7)\n"
        "print(games.obtain(recipe).walkthrough, file=__import__('sys').stderr)\n"
        "print(len(made))\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    ends = [racer.communicate(timeout=120) for racer in racers]
    assert sorted(out.strip() for out, _ in ends) == ["0", "0", "1"]
    assert len({err for _, err in ends}) == 1
    assert [p.name for p in SMALL.folder.parent.iterdir()] == [SMALL.folder.name]


@pytest.mark.parametrize("name", ["game.z8", "game.json", "facts.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_torn_game_is_made_anew(shelf: Shelf, empty_cache: Path, name: str, damage: str):
    path = obtain(SMALL, shelf).path.parent / name
    whole = path.read_bytes()
    torn = {"truncate": whole[: len(whole) // 2], "flip": whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:]}
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(torn[damage])
    assert obtain(SMALL, shelf).path.is_file() and shelf.calls == 2
    assert obtain(SMALL, shelf).walkthrough and shelf.calls == 2


def test_a_failed_generation_leaves_nothing(empty_cache: Path):
    class Broken(GeneratorPool):
        def make(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
            (folder / "game.z8").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obtain(SMALL, Broken(1))
    assert list(SMALL.folder.parent.iterdir()) == []


def test_what_a_killed_process_left_is_swept(shelf: Shelf, empty_cache: Path):
    parent = SMALL.folder.parent
    fresh, stale = parent / "partial-fresh", parent / "partial-stale"
    fresh.mkdir()
    stale.mkdir()
    os.utime(stale, (time.time() - 7200,) * 2)
    obtain(SMALL, shelf)
    assert fresh.exists() and not stale.exists()


def test_a_generator_that_takes_too_long_is_killed(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(games, "GENERATION_SECONDS", 0.2)
    pool = GeneratorPool(1)
    generator = pool._take()
    pool._give(generator)
    with pytest.raises(DeadlineExceeded):
        obtain(SMALL, pool)
    assert not generator.alive and list(SMALL.folder.parent.iterdir()) == []


def test_a_generator_that_dies_is_an_infrastructure_failure_and_is_replaced(empty_cache: Path):
    pool = GeneratorPool(1)
    first = pool._take()
    os.killpg(first._process.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFailed):
        first.make(SMALL, empty_cache)
    pool._give(first)
    while first.alive:
        time.sleep(0.01)
    assert obtain(SMALL, pool).walkthrough
    (second,) = pool._all
    assert second is not first and second.alive
    pool.close()
    pool.close()
    assert not second.alive


def test_generators_end_with_the_process_that_started_them():
    code = (
        "import os, signal\n"
        "from agentgym.environments.text.textworld_games import shared\n"
        "print(shared._take()._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("the generator outlived its owner")


def test_an_impossible_game_says_why(empty_cache: Path):
    pool = GeneratorPool(1)
    try:
        with pytest.raises(UsageError, match=r"8 attempts: ValueError: Expected level") as raised:
            obtain(Recipe("coin_collector", {"level": 301}, 0), pool)
        assert "shorter quest" in raised.value.hint and len(pool._idle) == 1
    finally:
        pool.close()


def test_the_last_environment_to_close_stops_the_generators(
    make: Callable[..., TextWorld], empty_cache: Path
):
    one, two = (make("Custom", world="w1-o1-q1") for _ in range(2))
    one.reset(options={"task_id": "train-000000"})
    two.reset(options={"task_id": "train-000000"})
    generators = list(games.shared._all)
    assert len(generators) == 1 and generators[0].alive
    one.close()
    assert generators[0].alive
    two.close()
    assert not generators[0].alive and games.shared._all == []


def test_generate_makes_what_is_missing_and_tells_its_progress(
    make: Callable[..., TextWorld], empty_cache: Path
):
    tasks = make("Custom", world="w1-o1-q1").tasks("train")[:2]
    seen: list[tuple[int, int]] = []
    assert generate(tasks, processes=2, progress=lambda *at: seen.append(at)) == 2
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert generate(tasks) == 0
    facts = [json.loads((t.private.recipe.folder / "facts.json").read_text())["facts"] for t in tasks]  # type: ignore[attr-defined]
    assert all(fact["walkthrough"] and fact["objective"] for fact in facts)


def test_generate_refuses_other_tasks():
    with pytest.raises(UsageError, match="no TextWorld task"):
        generate([Task("x", "train")])


def test_without_textworld_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise games.PackageNotFoundError(name)

    games.textworld_version.cache_clear()
    monkeypatch.setattr(games, "version", missing)
    with pytest.raises(MissingDependency, match=r"agentgym-llm\[text\]"):
        SMALL.folder  # noqa: B018
    games.textworld_version.cache_clear()
