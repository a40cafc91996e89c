"""Checkpoints: exact, whole or not there, and never lost to a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agentgym.errors import StorageFailed, UsageError
from agentgym.trainers import checkpoint
from agentgym.trainers.batch import rows

Make = Callable[..., Any]


@pytest.fixture
def step(make_trajectory: Make) -> Callable[[Any], Any]:
    """One update of a learner."""
    chosen = rows([make_trajectory(f"t{i}", lengths=((4, 3),)) for i in range(3)])

    def take(learner: Any) -> Any:
        return learner.step(chosen, lambda batch, outputs: (-outputs.logp.sum(), {}))

    return take


def same(one: Any, other: Any) -> bool:
    states = [learner.state() for learner in (one, other)]
    return states[0][2] == states[1][2] and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(states[0][:2], states[1][:2], strict=True)
    )


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_restored_learner_goes_on_bit_for_bit(
    make_learner: Make, step: Make, tmp_path: Path, lora: Any
) -> None:
    learner = make_learner(lora=lora)
    for _ in range(3):
        step(learner)
    checkpoint.save(tmp_path, 3, learner, {"position": 7})
    found = checkpoint.latest(tmp_path)
    assert found is not None and (found.step, found.extra) == (3, {"position": 7})
    other = make_learner(lora=lora)
    found.restore(other)
    assert same(learner, other)
    step(learner)
    step(other)
    assert same(learner, other)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]


def test_the_last_ones_are_kept(make_learner: Make, tmp_path: Path) -> None:
    learner = make_learner()
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, number, learner, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_half_a_checkpoint_is_ignored(make_learner: Make, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, make_learner(), {})
    (tmp_path / ".step-000002.partial").mkdir()
    (tmp_path / ".step-000002.partial" / "state.json").write_text("{}")
    (tmp_path / "step-000003").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1
    assert checkpoint.latest(tmp_path / "none") is None


def test_a_full_disk_leaves_the_earlier_checkpoint(make_learner: Make, step: Make, tmp_path: Path) -> None:
    learner = make_learner()
    checkpoint.save(tmp_path, 1, learner, {})
    step(learner)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageFailed, match="cannot save the checkpoint") as caught:
            checkpoint.save(tmp_path, 2, learner, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free space" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_another_model_s_or_a_later_version_s_is_refused(make_learner: Make, tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, 1, make_learner(), {})
    with pytest.raises(UsageError, match="another model's"):
        saved.restore(make_learner(lora={"rank": 2}))
    state = json.loads((saved.folder / "state.json").read_text())
    (saved.folder / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("file", ["policy-weights.safetensors", "policy-optimiser.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(make_learner: Make, tmp_path: Path, file: str) -> None:
    saved = checkpoint.save(tmp_path, 1, make_learner(), {})
    path = saved.folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=rf"{saved.folder.name} is damaged") as caught:
        checkpoint.latest(tmp_path).restore(make_learner())
    assert "delete it" in caught.value.hint


def test_a_checkpoint_without_a_part_is_named(make_learner: Make, tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, 1, make_learner(), {})
    with pytest.raises(UsageError, match=r"^the checkpoint \S+ has no learner 'critic'"):
        saved.restore(make_learner(), "critic")
    (saved.folder / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=rf"{saved.folder.name} is damaged"):
        checkpoint.latest(tmp_path)
