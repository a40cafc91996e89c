"""Metrics: the JSON lines are the record; a tracker that fails stops nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from agentgym.errors import MissingDependency, StorageFailed, UnknownName
from agentgym.trainers import metrics


def test_a_line_a_step_and_the_last_of_a_step_counts(tmp_path: Path) -> None:
    for first in (0, 1):
        made = metrics.Metrics(tmp_path, (), {})
        for step in range(first, first + 2):
            made.log(step, {"x": 10.0 * first + step, "broken": float("nan")})
        made.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    found = metrics.load(tmp_path)
    assert [found[step]["x"] for step in (0, 1, 2)] == [0, 11, 12]
    assert found[0]["broken"] is None


def test_half_a_line_swallows_no_other(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "x": 1}) + '\n{"step": 1, "x"')
    made = metrics.Metrics(tmp_path, (), {})
    made.log(1, {"x": 2.0})
    made.close()
    assert metrics.load(tmp_path) == {0: {"x": 1}, 1: {"x": 2.0}}


def test_tensorboard_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    made = metrics.Metrics(tmp_path, ("tensorboard",), {"a": 1})
    made.log(0, {"loss/total": 1.0})
    made.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_tracker_that_fails_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *arguments: object) -> None: ...
        def log(self, *arguments: object) -> None:
            raise ConnectionError("no network")

        def close(self) -> None: ...

    monkeypatch.setitem(metrics.TRACKERS, "broken", Broken)
    made = metrics.Metrics(tmp_path, ("broken",), {})
    with pytest.warns(UserWarning, match="Broken stopped: no network"):
        made.log(0, {"x": 1.0})
    made.log(1, {"x": 2.0})
    made.close()
    assert sorted(metrics.load(tmp_path)) == [0, 1]


def test_an_unknown_tracker_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as caught:
        metrics.Metrics(tmp_path, ("tensorbord",), {})
    assert "tensorboard" in str(caught.value) + caught.value.hint


def test_a_full_disk_is_a_failure_of_storage(tmp_path: Path) -> None:
    lines = metrics.JsonLines(tmp_path)
    lines.close()
    lines._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(StorageFailed, match="No space left"):
        lines.log(0, {"x": 1.0})
    lines.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_its_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency) as caught:
        metrics.Metrics(tmp_path, [name], {})
    assert caught.value.hint == f"pip install {name}"
