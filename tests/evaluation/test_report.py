"""Reports: figures of hand-made trajectories, and their three forms."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from agentgym.errors import UsageError
from agentgym.evaluation.report import Report, compare, summarise
from agentgym.evaluation.run import EvaluationConfig, evaluate
from agentgym.evaluation.statistics import wilson
from agentgym.outcome import Outcome
from agentgym.policies import PolicyContext, make_policy
from agentgym.policies.base import Sampling
from agentgym.rollout.engine import RolloutConfig
from agentgym.trajectory import Trajectory, Turn
from agentgym.wrappers.stack import EnvConfig


def played(
    id: str, task: str, rewards: list[float], *, success: bool = False, outcome: Outcome | None = None
) -> Trajectory:
    """An ended episode; every turn sampled three tokens, and every second action was not understood."""
    last = len(rewards) - 1
    turns = [
        Turn(
            i,
            0,
            (5 * i + 2, 5 * i + 5),
            (),
            "x",
            "x",
            reward,
            valid_action=i % 2 == 0,
            success=success and i == last,
        )
        for i, reward in enumerate(rewards)
    ]
    return Trajectory(id, "test/Env-v0", task, turns=turns, outcome=outcome or Outcome.completed())


def report(trajectories: list[Trajectory], **extra: object) -> Report:
    given = {"env": "test/Env-v0", "policy": "p", "split": "test", "seed": 0, **extra}
    return summarise(trajectories, **given)  # type: ignore[arg-type]


LOST = Outcome.infra_failed("environment", "the worker died", doubtful=True)


def test_every_figure_of_four_episodes() -> None:
    made = report(
        [
            played("a", "t1", [0.0, 1.0], success=True),
            played("b", "t2", [0.5]),
            played("c", "t3", [0.0, 0.0, 0.0], outcome=Outcome.truncated("turns")),
            played("d", "t4", [9.0], success=True, outcome=LOST),
        ],
        seconds=2.5,
        run="runs/x",
    )
    assert made.success == wilson(1, 3)
    assert (made.reward, made.turns, made.tokens) == (0.5, 2.0, 18)
    assert made.invalid_actions == pytest.approx(2 / 6)
    assert (made.episodes, made.tasks, made.infra_failed, made.doubtful) == (4, 4, 1, 1)
    assert made.success_if_failures_lost == 0.25 and made.failure_rate == 0.25
    assert made.outcomes == {"completed": 2, "infra_failed(environment)": 1, "truncated(turns)": 1}
    assert made.pass_at_k == {1: pytest.approx(1 / 3)}


def test_pass_at_k_leaves_out_tasks_that_lost_samples() -> None:
    whole = [played(f"a{i}", "t1", [1.0], success=i < 2) for i in range(4)]
    short = [played(f"b{i}", "t2", [1.0], outcome=LOST if i else None) for i in range(4)]
    made = report(whole + short, samples=4)
    assert made.pass_at_k == {1: pytest.approx((0.5 + 0) / 2), 2: pytest.approx(5 / 6), 4: 1.0}


def test_the_order_of_episodes_does_not_matter() -> None:
    some = [played(f"{i}", f"t{i % 5}", [i / 7], success=i % 3 == 0) for i in range(20)]
    assert report(some, samples=4) == report(some[::-1], samples=4)


def test_json_has_the_agreed_keys_and_nothing_that_is_not_json() -> None:
    data = report([played("a", "t1", [1.0], success=True)]).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["success"].keys() == {"mean", "ci95"} and len(data["success"]["ci95"]) == 2
    assert data["reward"] == {"mean": 1.0} and data["turns"] == {"mean": 1.0} and data["infra_failed"] == 0
    empty = report([played("a", "t1", [1.0], outcome=LOST)]).to_json()
    assert json.dumps(empty, allow_nan=False)
    assert empty["reward"] == {"mean": None} and empty["tokens"] == {"mean": None, "total": 0}


def test_markdown_and_table_say_the_same_and_let_no_name_break_them() -> None:
    made = report(
        [played("a", "t1", [1.0], success=True), played("b", "t2", [0.0], outcome=LOST)],
        policy="a|b [bold]c[/bold]",
        notes=["mind the gap"],
    )
    markdown = made.markdown()
    assert "| policy | a\\|b [bold]c[/bold] |" in markdown and "> mind the gap" in markdown
    out = io.StringIO()
    Console(file=out, width=200).print(made.table())
    for name, value in made.rows():
        assert name in out.getvalue() and value in out.getvalue()
    assert "1 lost (50.0 %), 1 of them doubtful" in markdown
    assert "| success if lost | 50.0 % |" in markdown


def test_episodes_without_a_turn_are_told() -> None:
    outcome = Outcome.truncated("context", "the prompt has 600 tokens")
    made = report([played("a", "t", [], outcome=outcome), played("b", "u", [0.0])])
    assert "episodes that ended before their first turn: 1 (the prompt has 600 tokens)" in made.notes


def test_a_comparison_is_paired_by_task_and_leaves_out_what_was_lost() -> None:
    before = [played(f"{i}", f"t{i}", [0.0], success=i < 3) for i in range(10)]
    after = [played(f"{i}", f"t{i}", [0.0], success=i < 6) for i in range(9)]
    after.append(played("9", "t9", [0.0], outcome=LOST))
    difference = compare(before, after)
    assert difference.tasks == 9 and difference.mean == pytest.approx(3 / 9)
    assert difference.low <= difference.mean <= difference.high
    with pytest.raises(UsageError):
        compare(before, [])


def test_a_real_model_is_evaluated_by_its_tokens(tiny_model: Path, tmp_path: Path) -> None:
    env = EnvConfig("agentgym.testing:EchoEnv", {"turns": 2}, list_actions=True, max_turns=2)
    policy = make_policy(str(tiny_model), PolicyContext(env.id, dict(env.kwargs)))
    greedy = RolloutConfig(layout="turn", sampling=Sampling(temperature=0.0, max_tokens=4))
    config = EvaluationConfig(split="valid", episodes=4, samples=2, rollout=greedy)
    made = evaluate(env, policy, config, out=tmp_path / "run", name="tiny")
    assert 0 < made.tokens <= 4 * 2 * 4 and made.turns == 2
    assert any("temperature 0" in note for note in made.notes)
    again = evaluate(env, policy, config, out=tmp_path / "run", name="tiny", resume=True)
    assert again.tokens == made.tokens
