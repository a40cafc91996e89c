from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import agentgym
from agentgym import plugins, registry
from agentgym.errors import MissingDependency, UnknownName, UsageError
from agentgym.testing import EchoEnv


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations of a test end with it."""
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    before = set(gymnasium.registry)
    yield
    for name in set(gymnasium.registry) - before:
        del gymnasium.registry[name]


def fresh(code: str, *path: Path) -> Any:
    """What ``code`` prints as JSON in a fresh interpreter that imports from ``path`` too."""
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in path]!r}", code]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_registered_id_is_made_in_three_ways(registered: None) -> None:
    agentgym.register("agentgym/Echo-v0", "agentgym.testing:EchoEnv", kwargs={"turns": 2})
    for env in (
        agentgym.make("agentgym/Echo-v0"),
        agentgym.make("Echo-v0"),
        agentgym.make("agentgym:agentgym/Echo-v0"),
        gymnasium.make("agentgym/Echo-v0"),
    ):
        assert isinstance(env.unwrapped, EchoEnv)
        assert env.unwrapped.turns == 2
        assert env.spec is not None
        assert env.spec.id == "agentgym/Echo-v0"
        env.close()
    assert agentgym.make("Echo-v0", turns=5).unwrapped.turns == 5  # type: ignore[attr-defined]


def test_an_import_path_is_made_where_an_id_is() -> None:
    env = agentgym.make("agentgym.testing:EchoEnv", words=3)
    assert isinstance(env, EchoEnv)
    assert len(env.words) == 3


def test_gymnasiums_own_environments_are_made_too() -> None:
    assert agentgym.make("CartPole-v1").action_space == gymnasium.spaces.Discrete(2)


def test_gymnasium_makes_our_ids_after_an_import_and_without_one(tmp_path: Path) -> None:
    code = "import gymnasium, json\n{}env = gymnasium.make({!r})\nprint(json.dumps(env.spec.id))"
    (tmp_path / "lodge.py").write_text(
        "from agentgym import register\nregister('lodge/Echo-v0', 'agentgym.testing:EchoEnv')\n"
    )
    assert fresh(code.format("import lodge\n", "lodge/Echo-v0"), tmp_path) == "lodge/Echo-v0"
    assert fresh(code.format("", "lodge:lodge/Echo-v0"), tmp_path) == "lodge/Echo-v0"


@pytest.mark.parametrize("name", ["agentgym:agentgym/TextWorld-Simple-v0", "agentgym/TextWorld-Simple-v0"])
def test_gymnasium_makes_a_built_in_id(name: str) -> None:
    pytest.importorskip("textworld")
    imports = "" if name.startswith("agentgym:") else "import agentgym\n"
    make = f"env = gymnasium.make({name!r})\nprint(json.dumps(type(env.unwrapped).__name__))"
    assert fresh(f"import gymnasium, json\n{imports}{make}") == "Simple"


def test_an_unknown_id_lists_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="TextWorld-Cooking-v0") as caught:
        agentgym.make("TextWorld-Coking-v0")
    assert "agentgym list" in caught.value.hint
    with pytest.raises(UnknownName, match="did you mean 'agentgym/TextWorld-Simple-v0'"):
        agentgym.make("agentgym/TextWorld-Simple")
    with pytest.raises(UnknownName):
        agentgym.make("")
    with pytest.raises(UsageError, match=r"cannot import 'agentgym\.testing:EcoEnv'"):
        agentgym.make("agentgym.testing:EcoEnv")


@pytest.mark.parametrize("name", ["agentgym.testing:EchoEnv", "agentgym/Echo-v0"])
def test_an_unknown_argument_lists_the_near_ones(registered: None, name: str) -> None:
    agentgym.register("agentgym/Echo-v0", "agentgym.testing:EchoEnv")
    with pytest.raises(UnknownName, match="did you mean 'turns'"):
        agentgym.make(name, turn=3)
    with pytest.raises(UsageError, match="turns is at least 1"):
        agentgym.make(name, turns=0)


def test_other_type_errors_stay_what_they_are(registered: None) -> None:
    with pytest.raises(TypeError, match="not supported between") as caught:
        agentgym.make("agentgym.testing:EchoEnv", turns="many")
    assert caught.value.__notes__ == ["while making agentgym.testing:EchoEnv with turns='many'"]


def test_a_missing_extra_is_named(registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking.py").write_text("import no_such_engine.parts\n")
    monkeypatch.syspath_prepend(tmp_path)
    agentgym.register("agentgym/Lacking-v0", "lacking:Env", extra="text")
    with pytest.raises(MissingDependency, match=r"'no_such_engine' is not installed.*extra 'text'"):
        agentgym.make("agentgym/Lacking-v0")
    agentgym.register("agentgym/Bare-v0", "lacking:Env")
    with pytest.raises(ModuleNotFoundError, match="no_such_engine"):
        agentgym.make("agentgym/Bare-v0")


def test_registering_twice(registered: None) -> None:
    agentgym.register("agentgym/Echo-v0", "agentgym.testing:EchoEnv")
    agentgym.register("agentgym/Echo-v0", "agentgym.testing:EchoEnv")
    with pytest.raises(UsageError, match=r"already registered for agentgym\.testing:EchoEnv"):
        agentgym.register("agentgym/Echo-v0", "agentgym.testing:NoopEnv")
    gymnasium.register("tests/Taken-v0", "agentgym.testing:NoopEnv")
    with pytest.raises(UsageError, match="already registered with Gymnasium"):
        agentgym.register("tests/Taken-v0", "agentgym.testing:EchoEnv")
    with pytest.raises(UsageError, match="call it agentgym/Echo-v0"):
        agentgym.register("agentgym/Echo", "agentgym.testing:EchoEnv")


def test_families_lists_ids_without_importing_them() -> None:
    listed, modules = fresh(
        "import json, sys, agentgym\n"
        "ids = list(agentgym.families())\n"
        "print(json.dumps([ids, [m for m in sys.modules if 'environments' in m or 'textworld' in m]]))"
    )
    assert "agentgym/TextWorld-Cooking-v0" in listed
    assert listed == sorted(listed)
    assert modules == []


def test_the_base_is_found_under_wrappers() -> None:
    env = gymnasium.wrappers.TimeLimit(EchoEnv(), 3)
    assert registry.base(env) is env.unwrapped
    with pytest.raises(UsageError, match=r"CartPoleEnv is no agentgym\.Env"):
        registry.base(gymnasium.make("CartPole-v1"))


def test_plugins_are_loaded_when_an_id_is_unknown(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        agentgym.register("late/Echo-v0", "agentgym.testing:EchoEnv")

    monkeypatch.setattr(plugins, "load_environments", load)
    assert isinstance(agentgym.make("late/Echo-v0").unwrapped, EchoEnv)
    assert "late/Echo-v0" in agentgym.families()
