from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentgym import paths
from agentgym.errors import StorageFailed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("AGENTGYM_CACHE", "AGENTGYM_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_cache_is_the_named_folder_else_that_of_the_desktop_else_the_home(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paths.cache_dir("games") == home / ".cache/agentgym/games"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert paths.cache_dir() == home / "xdg/agentgym"
    monkeypatch.setenv("AGENTGYM_CACHE", "~/mine")
    assert paths.cache_dir("a", "b") == home / "mine/a/b"
    assert (home / "mine/a/b").is_dir()


def test_what_was_made_is_tagged_and_what_was_there_is_not(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTGYM_CACHE", str(home))
    (home / "theirs").mkdir()
    paths.cache_dir("theirs", "a")
    paths.cache_dir("ours", "a")
    assert (home / "ours" / paths.TAG).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert not (home / "theirs" / paths.TAG).exists()


def test_a_cache_that_cannot_be_made_names_the_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("in the way")
    monkeypatch.setenv("AGENTGYM_CACHE", str(home / "file"))
    with pytest.raises(StorageFailed, match="AGENTGYM_CACHE"):
        paths.cache_dir("games")


def test_data_is_searched_in_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = home / "first", home / "second"
    monkeypatch.setenv("AGENTGYM_DATA", f"{first}{os.pathsep}{second}{os.pathsep}")
    assert paths.data_path() == [first, second, home / ".local/share/agentgym"]
    assert paths.find_data("search", "corpus.jsonl") is None
    for root in (second, first):
        (root / "search").mkdir(parents=True)
        (root / "search/corpus.jsonl").write_text(root.name)
        found = paths.find_data("search", "corpus.jsonl")
        assert found is not None
        assert found.read_text() == root.name


def test_a_write_replaces_the_whole_file_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.json"
    with paths.atomic_write(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
    with pytest.raises(KeyError), paths.atomic_write(target) as temporary:
        temporary.write_text("half of tw")
        raise KeyError
    assert target.read_text() == "one"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_has_the_mode_of_any_other(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with paths.atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("shared")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
