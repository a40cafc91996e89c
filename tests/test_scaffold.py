from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym import scaffold
from agentgym.errors import AgentGymError, StorageFailed, UsageError


def test_the_files_of_a_package(tmp_path: Path) -> None:
    written = scaffold.create("Paper-lodge", tmp_path)
    assert [str(path.relative_to(tmp_path / "Paper-lodge")) for path in written] == [
        "pyproject.toml",
        "README.md",
        "src/paper_lodge/__init__.py",
        "src/paper_lodge/environment.py",
        "tests/test_environment.py",
    ]
    project = tomllib.loads(written[0].read_text())["project"]
    assert project["name"] == "Paper-lodge"
    assert project["entry-points"]["agentgym.environments"] == {"paper_lodge": "paper_lodge:register"}
    environment = written[3].read_text()
    assert "class PaperLodge(Env[str]):" in environment
    assert len(environment.splitlines()) < 45
    assert not any("$" in path.read_text() for path in written)
    for path in written:
        if path.suffix == ".py":
            compile(path.read_text(), path, "exec")
            assert max(map(len, path.read_text().splitlines())) <= 110


def test_its_own_test_passes_and_so_does_ruff(tmp_path: Path) -> None:
    scaffold.create("paper-lodge", tmp_path)
    root = tmp_path / "paper-lodge"
    here = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, env=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    rules = ["--select", "E,F,I,UP,B,SIM,RUF", "--line-length", "110", "--no-cache", "--isolated"]
    lint = [sys.executable, "-m", "ruff", "check", *rules, "."]
    done = subprocess.run(lint, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_installed_its_id_is_known_without_an_import(tmp_path: Path) -> None:
    scaffold.create("paper-lodge", tmp_path)
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install += ["--disable-pip-version-check", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(tmp_path / "paper-lodge")], check=True, timeout=120)
    code = (
        "import agentgym\n"
        "assert 'paper_lodge/PaperLodge-v0' in agentgym.families()\n"
        "env = agentgym.make('paper_lodge/PaperLodge-v0')\n"
        "assert env.reset(seed=0)[0].startswith('I think')\n"
    )
    here = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=here, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "cannot name a package"),
        ("3d", "cannot name a package"),
        ("a--b", "cannot name a package"),
        ("a-", "cannot name a package"),
        ("../up", "cannot name a package"),
        ("a b", "cannot name a package"),
        ("räume", "cannot name a package"),
        ("a\n", "cannot name a package"),
        ("x" * 61, "cannot name a package"),
        ("class", "Python's own"),
        ("json", "Python's own"),
        ("agentgym", "installed already"),
        ("Numpy", "installed already"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        scaffold.create(name, tmp_path)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=70))
def test_any_name_is_taken_or_refused(name: str) -> None:
    try:
        package = scaffold._package(name)
    except AgentGymError:
        return
    assert package.isidentifier()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "lodge-env").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        scaffold.create("lodge-env", tmp_path)
    assert list((tmp_path / "lodge-env").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageFailed, match="cannot write"):
        scaffold.create("lodge-env", tmp_path / "file")
