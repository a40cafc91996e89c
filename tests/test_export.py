from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agentgym import export
from agentgym.errors import JournalError, MissingDependency, StorageFailed
from agentgym.journal import FILE, Journal, load
from agentgym.messages import ImagePart, TextPart
from agentgym.outcome import Outcome
from agentgym.policies.base import Completion, Policy, Request
from agentgym.rollout.engine import Episode, RolloutEngine
from agentgym.testing import GuessEnv
from agentgym.trajectory import Segment, Trajectory, Turn
from agentgym.wrappers.stack import EnvConfig

pytest.importorskip("pyarrow")
from pyarrow import parquet


def record(journal: Journal, name: str, outcome: Outcome | None, attempt: int = 0) -> Trajectory:
    """Two turns in two segments; the second segment continues the first one's prompt."""
    trajectory = Trajectory(name, "agentgym/Echo-v0", "task", split="test", attempt=attempt, env_seed=7)
    journal.begin(trajectory)
    for k in range(2):
        segment = Segment(parent=(0, 3) if k else None)
        segment.append_context([1, 2, 3])
        span = segment.append_sampled([4 + k, 5], [-0.1, -1 / 3])
        trajectory.segments.append(segment)
        trajectory.turns.append(
            Turn(
                k,
                k,
                span,
                (TextPart("see \ud800"), ImagePart(b"pixels")),
                f"<action>go {k}</action>",
                f"go {k}",
                0.25,
                score=0.25 * (k + 1),
                success=k == 1,
                admissible_actions=("go 0", "go 1") if k else None,
                seconds={"step": 0.5},
                extras={"parts": {"format": 0.25}},
            )
        )
        journal.turn(trajectory)
    if outcome is not None:
        trajectory.outcome = outcome
        trajectory.final_observation = (TextPart("the end"),)
        journal.end(trajectory)
    return trajectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Journal.create(tmp_path / "run", {}) as journal:
        record(journal, "good", Outcome.completed())
        journal.score("good", "judge", 0.75)
        record(journal, "lost", Outcome.infra_failed("sandbox", "gone"))
        record(journal, "open", None)
    return tmp_path / "run"


def test_a_row_a_trajectory_and_a_row_a_turn(run: Path) -> None:
    paths = export.to_parquet(run)
    assert [p.name for p in paths] == ["trajectories.parquet", "turns.parquet"]
    trajectories, turns = (parquet.read_table(path).to_pylist() for path in paths)
    assert [row["trajectory_id"] for row in trajectories] == ["good", "lost", "open"]
    assert [(row["trajectory_id"], row["index"]) for row in turns] == [
        (name, k) for name in ("good", "lost", "open") for k in range(2)
    ]
    good = trajectories[0]
    assert (good["outcome"], good["reward"], good["success"]) == ("completed", 0.5, True)
    assert (good["turns"], good["sampled_tokens"], good["scores"]) == (2, 4, [("judge", 0.75)])
    assert turns[1] == {
        "trajectory_id": "good",
        "index": 1,
        "segment": 1,
        "start": 3,
        "end": 5,
        "observation": "see \\ud800",
        "images": [ImagePart(b"pixels").digest],
        "completion": "<action>go 1</action>",
        "action": "go 1",
        "reward": 0.25,
        "score": 0.5,
        "success": True,
        "valid_action": True,
        "finish_reason": "stop",
        "policy_version": 0,
        "seed": 0,
        "admissible_actions": ["go 0", "go 1"],
        "seconds": [("step", 0.5)],
        "extras": json.dumps({"parts": {"format": 0.25}}),
    }


def test_the_token_tree_comes_back_exactly(run: Path) -> None:
    path, _ = export.to_parquet(run)
    for row in parquet.read_table(path).to_pylist():
        segments = [
            Segment(
                s["token_ids"],
                s["loss_mask"],
                s["logp_rollout"],
                None if s["parent"] is None else (s["parent"], s["parent_length"]),
            )
            for s in row["segments"]
        ]
        assert segments == load(run)[row["trajectory_id"]].segments


def test_what_did_not_end_validly_has_no_reward(run: Path) -> None:
    trajectories, turns = (parquet.read_table(path).to_pylist() for path in export.to_parquet(run))
    for row in trajectories[1:]:
        assert (row["reward"], row["success"], row["scores"]) == (None, None, [])
    assert [row["outcome"] for row in trajectories[1:]] == ["infra_failed", None]
    assert trajectories[1]["outcome_reason"] == "sandbox"
    for row in turns[2:]:
        assert [row[name] for name in ("reward", "score", "success", "extras")] == [None] * 4
        assert row["action"]


def test_only_the_latest_attempt_is_exported(run: Path, tmp_path: Path) -> None:
    with Journal.open(run) as journal:
        record(journal, "lost", Outcome.truncated("turns"), attempt=1)
    first, _ = export.to_parquet(run, tmp_path / "out")
    rows = {row["trajectory_id"]: row for row in parquet.read_table(first).to_pylist()}
    assert (first.parent, len(rows)) == (tmp_path / "out", 3)
    assert (rows["lost"]["attempt"], rows["lost"]["reward"]) == (1, 0.5)


def test_a_run_without_episodes_has_columns_and_no_rows(tmp_path: Path) -> None:
    Journal.create(tmp_path, {}).close()
    for path in export.to_parquet(tmp_path):
        table = parquet.read_table(path)
        assert table.num_rows == 0 and "trajectory_id" in table.column_names


class Guesser(Policy):
    """Always the same wrong guess."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion("100000") for _ in requests]


def test_private_fields_of_a_task_are_in_no_file(tmp_path: Path) -> None:
    env = GuessEnv()
    tasks = list(env.tasks("test"))[:3]
    config = EnvConfig("agentgym.testing:GuessEnv", max_turns=2)

    async def collect(journal: Journal) -> None:
        engine = RolloutEngine(config, Guesser(), journal=journal)
        await engine.collect([Episode(task.id, task.id, "test") for task in tasks])
        await engine.aclose()

    with Journal.create(tmp_path, {}) as journal:
        asyncio.run(collect(journal))
    texts = [(tmp_path / FILE).read_text(errors="replace")]
    texts += [str(parquet.read_table(path).to_pylist()) for path in export.to_parquet(tmp_path)]
    for task in tasks:
        for text in texts:
            assert task.id in text
            assert task.private["answer"] not in text


def test_a_folder_that_cannot_be_written_and_a_missing_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="cannot write"):
        export.to_parquet(run, tmp_path / "file")
    with pytest.raises(JournalError, match="no journal"):
        export.to_parquet(tmp_path)


def test_without_pyarrow_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="'train'"):
        export.to_parquet(run)
