from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentgym
from agentgym import plugins
from agentgym.errors import UnknownName, UsageError

Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution: ``(name, its entry_points.txt, its module's source)``."""
    monkeypatch.syspath_prepend(tmp_path)

    def clear() -> None:
        plugins.declared.cache_clear()
        plugins.load_environments.cache_clear()

    def add(name: str, entry_points: str, source: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        (tmp_path / f"{name}.py").write_text(source)
        clear()

    yield add
    monkeypatch.undo()
    clear()


def test_a_broken_plugin_hides_nothing(install: Install) -> None:
    install(
        "broken_a", "[agentgym.environments]\nbroken = broken_a:setup\n", "raise RuntimeError('no luck')\n"
    )
    install("broken_b", "[agentgym.environments]\ngone = broken_b:nowhere\n", "")
    install(
        "works",
        "[agentgym.environments]\nworks = works:setup\n",
        "import agentgym\n"
        "def setup():\n"
        "    agentgym.register('plugtest/Echo-v0', 'agentgym.testing:EchoEnv')\n",
    )
    with pytest.warns(UserWarning, match="plug-in") as told:
        known = agentgym.families()
    assert "plugtest/Echo-v0" in known
    assert "agentgym/TextWorld-Cooking-v0" in known
    texts = [str(w.message) for w in told]
    assert any("'broken' (broken_a:setup) failed: no luck" in text for text in texts)
    assert any("'gone' (broken_b:nowhere) failed" in text for text in texts)
    agentgym.make("plugtest/Echo-v0").close()


def test_a_module_is_an_entry_point_too(install: Install) -> None:
    install(
        "by_import",
        "[agentgym.environments]\nby_import = by_import\n",
        "import agentgym\nagentgym.register('plugtest/Noop-v0', 'agentgym.testing:NoopEnv')\n",
    )
    assert "plugtest/Noop-v0" in agentgym.families()


def test_parts_are_found_by_name_in_any_group(install: Install) -> None:
    install(
        "parts",
        "[agentgym.algorithms]\nfancy = parts:Fancy\nlost = parts:Lost\n"
        "[agentgym.policies]\nshy = parts:Shy\n",
        "class Fancy: pass\nclass Shy: pass\n",
    )
    assert plugins.find("algorithms", "fancy", {}, "algorithm").__name__ == "Fancy"
    assert plugins.find("policies", "shy", {}, "policy").__name__ == "Shy"
    with pytest.raises(UnknownName, match="did you mean 'fancy'"):
        plugins.find("algorithms", "fnacy", {}, "algorithm")
    with pytest.raises(UnknownName, match="unknown algorithm 'shy'"):
        plugins.find("algorithms", "shy", {}, "algorithm")
    with pytest.raises(UsageError, match="algorithm 'lost' of the package 'parts' cannot be loaded"):
        plugins.find("algorithms", "lost", {}, "algorithm")


def test_built_in_names_win_and_import_paths_always_work(install: Install) -> None:
    install("parts2", "[agentgym.policies]\nnoop = parts2:Mine\n", "class Mine: pass\n")
    builtin = {"noop": "agentgym.testing:NoopEnv"}
    assert plugins.find("policies", "noop", builtin, "policy").__name__ == "NoopEnv"
    assert plugins.find("policies", "parts2:Mine", builtin, "policy").__name__ == "Mine"
    with pytest.raises(UnknownName, match="noop"):
        plugins.find("policies", "nop", builtin, "policy")


def test_nothing_is_imported_until_it_is_asked_for(install: Install) -> None:
    install("costly", "[agentgym.tools]\ncostly = costly:Tool\n", "raise SystemExit('imported')\n")
    assert set(plugins.declared("tools")) >= {"costly"}
    with pytest.raises(UnknownName, match="costly"):
        plugins.find("tools", "cheap", {}, "tool")


def test_an_import_path_reaches_into_classes() -> None:
    assert plugins.import_path("agentgym.testing:EchoEnv.sizes") == {"train": 32, "valid": 8, "test": 16}


@given(st.one_of(st.text(), st.from_regex(r"[.:\w]*:[.:\w]*", fullmatch=True)))
def test_no_import_path_is_a_traceback(path: str) -> None:
    with pytest.raises(UsageError, match="cannot import"):
        plugins.import_path("no_such_package" + path)
    with pytest.raises(UsageError, match="cannot import"):
        plugins.import_path(":" + path)
    with pytest.raises(UsageError, match="cannot import"):
        plugins.import_path("." + path)
