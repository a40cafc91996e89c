"""Records: whose a sandbox is, and that what somebody else may still hold is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agentgym.sandboxes import records


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTGYM_CACHE", str(tmp_path))


def of_a_dead_process(tmp_path: Path) -> records.Record:
    gone = subprocess.Popen([sys.executable, "-I", "-S", "-c", "pass"])
    gone.wait()
    made = records.Record.new("process-1", "process", "a test", {"folder": str(tmp_path / "files")})
    return replace(made, pid=gone.pid, started=1)


def test_what_a_dead_owner_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    left = of_a_dead_process(tmp_path)
    records.add(left)
    assert [record.id for record in records.collect()] == ["process-1"]
    assert records.listed() == [] and not (tmp_path / "files").exists()


def test_what_a_living_owner_has_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    records.add(records.Record.new("process-2", "process", "", {"folder": str(tmp_path / "files")}))
    assert records.collect() == [] and (tmp_path / "files").exists()


def test_a_number_that_was_given_anew_owns_nothing(tmp_path: Path) -> None:
    mine = records.Record.new("process-3", "process", "", {"folder": str(tmp_path / "files")})
    assert not mine.orphaned and replace(mine, started=mine.started - 1).orphaned


def test_another_machines_owner_cannot_be_told_dead(tmp_path: Path) -> None:
    """A cache may be shared: a process of that number here says nothing of one there."""
    left = replace(of_a_dead_process(tmp_path), host="elsewhere pid:[1]")
    records.add(left)
    assert not left.orphaned and records.collect() == []
    assert [record.host for record in records.listed()] == ["elsewhere pid:[1]"]


def test_a_process_that_is_only_remains_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert records.start_of(child.pid) is None
    child.wait()
