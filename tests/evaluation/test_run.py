"""Evaluations: which episodes run, what a failure of infrastructure does, and how a run goes on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agentgym import journal
from agentgym.errors import JournalError, PolicyFailed, StorageFailed, UnknownName, UsageError
from agentgym.evaluation.run import EvaluationConfig, evaluate
from agentgym.policies import make_policy
from agentgym.policies.base import Completion, Policy, PolicyContext, Request
from agentgym.rollout.engine import RolloutConfig
from agentgym.trajectory import Trajectory
from agentgym.wrappers.stack import EnvConfig

ECHO = EnvConfig("agentgym.testing:EchoEnv", {"turns": 2})


def policy(name: str, env: EnvConfig = ECHO) -> Policy:
    return make_policy(name, PolicyContext(env.id, dict(env.kwargs)))


class Failing(Policy):
    """Says an apple; breaks on chosen calls, counted for each episode."""

    name = "failing"

    def __init__(self, breaks: dict[str, int], error: type[Exception] = PolicyFailed) -> None:
        self.breaks, self.error = breaks, error
        self.calls: Counter[str] = Counter()

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self.answer(request.id) for request in requests]

    def answer(self, episode: str) -> Completion:
        self.calls[episode] += 1
        if self.calls[episode] <= self.breaks.get(episode, 0):
            raise self.error("broken on purpose")
        return Completion("apple")


def test_expert_solves_everything_and_chance_does_not() -> None:
    config = EvaluationConfig(episodes=16)
    expert = evaluate(ECHO, policy("expert"), config)
    assert (expert.split, expert.episodes, expert.tasks, expert.policy) == ("test", 16, 16, "expert")
    assert expert.success is not None and expert.success.mean == 1 and expert.success.low > 0.75
    assert (expert.reward, expert.turns, expert.infra_failed) == (1.0, 2.0, 0)
    chance = evaluate(ECHO, policy("random"), config)
    assert chance.success is not None and chance.success.mean < 0.3


def test_tasks_are_the_splits_seeded_sample_and_the_seed_alone_decides(tmp_path: Path) -> None:
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        evaluate(ECHO, policy("random"), EvaluationConfig(episodes=10, seed=seed), out=tmp_path / run)
    a, b, c = (journal.load(tmp_path / run) for run in "abc")
    env = ECHO.build()
    assert [a[i].task_id for i in sorted(a)] == env.unwrapped.tasks("test").sample(10, 3)  # type: ignore[attr-defined]
    assert {i: (t.env_seed, [u.action for u in t.turns]) for i, t in a.items()} == {
        i: (t.env_seed, [u.action for u in t.turns]) for i, t in b.items()
    }
    assert [a[i].task_id for i in sorted(a)] != [c[i].task_id for i in sorted(c)]


def test_past_the_splits_size_repeats_are_clustered() -> None:
    report = evaluate(ECHO, policy("expert"), EvaluationConfig(split="valid", episodes=20))
    assert (report.episodes, report.tasks) == (20, 8)
    # All ended alike, so the interval is that of eight tasks, not of twenty.
    assert report.success is not None and report.success.low == pytest.approx(0.6756, abs=1e-4)


def test_samples_of_a_task_share_its_seed_and_give_pass_at_k(tmp_path: Path) -> None:
    config = EvaluationConfig(episodes=32, samples=4)
    report = evaluate(replace(ECHO, kwargs={"words": 2}), policy("random"), config, out=tmp_path / "run")
    assert (report.tasks, report.samples) == (8, 4)
    assert list(report.pass_at_k) == [1, 2, 4]
    assert report.pass_at_k[1] < report.pass_at_k[2] < report.pass_at_k[4]
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in journal.load(tmp_path / "run").values():
        groups.setdefault(trajectory.group, []).append(trajectory)
    for members in groups.values():
        assert len({(t.task_id, t.env_seed) for t in members}) == 1
        assert len({t.turns[0].seed for t in members}) == 4


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"episodes": 0}, ""),
        ({"samples": 0}, ""),
        ({"attempts": 0}, ""),
        ({"seed": -1}, ""),
        ({"episodes": 10, "samples": 4}, "take 8 or 12 episodes"),
        ({"episodes": 3, "samples": 4}, "take 4 or 4 episodes"),
    ],
)
def test_counts_that_cannot_be_are_refused(config: dict[str, int], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        EvaluationConfig(**config)  # type: ignore[arg-type]
    assert hint in caught.value.hint


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="split 'tset'") as caught:
        evaluate(ECHO, policy("expert"), EvaluationConfig(split="tset"))
    assert "test" in caught.value.hint


def test_an_infrastructure_failure_is_retried_and_leaves_no_trace_in_the_result(tmp_path: Path) -> None:
    config = EvaluationConfig(episodes=4)
    seen: list[str] = []
    report = evaluate(
        ECHO, Failing({"e0001": 2}), config, out=tmp_path / "run", on_episode=lambda t: seen.append(t.id)
    )
    assert report.infra_failed == 0
    assert sorted(seen) == ["e0000", "e0001", "e0002", "e0003"]
    tried = journal.attempts(tmp_path / "run")
    assert [str(t.outcome) for t in tried["e0001"]] == ["infra_failed(policy)"] * 2 + ["completed"]
    assert [t.attempt for t in tried["e0001"]] == [0, 1, 2]
    assert len({t.env_seed for t in tried["e0001"]}) == 1


def test_what_stays_lost_is_counted_beside_the_mean_of_the_valid() -> None:
    broken = Failing({"e0000": 99, "e0001": 99, "e0002": 99})
    report = evaluate(ECHO, broken, EvaluationConfig(episodes=12, attempts=2))
    assert report.infra_failed == 3 and report.failure_rate == 0.25
    assert report.outcomes == {"completed": 9, "infra_failed(policy)": 3}
    assert report.success is not None and report.turns == 2
    assert report.success_if_failures_lost == pytest.approx(report.success.mean * 9 / 12)
    assert broken.calls["e0000"] == 2


def test_if_everything_is_lost_there_is_no_mean() -> None:
    report = evaluate(
        ECHO, Failing({f"e000{i}": 9 for i in range(3)}), EvaluationConfig(episodes=3, attempts=1)
    )
    assert report.success is None and report.reward is None and report.turns is None
    assert report.to_json()["success"] == {"mean": None, "ci95": None}
    assert any("lost to infrastructure" in note for note in report.notes)
    assert "-" in report.markdown()


def test_a_mistake_that_no_retry_would_mend_stops_the_evaluation() -> None:
    wrong = Failing({"e0002": 1}, UsageError)
    with pytest.raises(UsageError, match="on purpose"):
        evaluate(ECHO, wrong, EvaluationConfig(episodes=4))
    assert wrong.calls["e0002"] == 1


def test_a_dying_environment_is_lost_and_the_others_are_not() -> None:
    env = EnvConfig("agentgym.testing:CrashEnv", {"hang": 30.0}, max_turns=2)
    config = EvaluationConfig(
        split="begin", episodes=3, attempts=1, rollout=RolloutConfig(concurrency=3, reset_seconds=3)
    )
    report = evaluate(env, policy("expert", env), config)
    assert report.infra_failed == 3 and report.doubtful == 0
    calm = evaluate(env, policy("expert", env), EvaluationConfig(split="train", episodes=4))
    assert calm.success is not None and calm.success.mean == 1


def interrupted(out: Path, config: EvaluationConfig, after: int) -> None:
    """An evaluation that ends like a full disk does: in the middle of its episodes."""

    class Stopping(Failing):
        def answer(self, episode: str) -> Completion:
            if sum(self.calls.values()) >= after:
                raise StorageFailed("stopped on purpose")
            return super().answer(episode)

    with pytest.raises(StorageFailed):
        evaluate(ECHO, Stopping({}), config, out=out)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_resumed_run_reports_what_an_uninterrupted_one_would(
    tmp_path: Path, after: int, deterministic: bool
) -> None:
    config = EvaluationConfig(episodes=8, rollout=RolloutConfig(concurrency=2, deterministic=deterministic))
    whole = evaluate(ECHO, Failing({}), config, out=tmp_path / "whole")
    interrupted(tmp_path / "cut", config, after)
    before = {i: t for i, t in journal.load(tmp_path / "cut").items() if t.outcome is not None}
    resuming = Failing({})
    seen: list[str] = []
    report = evaluate(
        ECHO, resuming, config, out=tmp_path / "cut", resume=True, on_episode=lambda t: seen.append(t.id)
    )
    assert sorted(seen) == [f"e000{i}" for i in range(8)]
    assert not resuming.calls.keys() & (before.keys() if not deterministic else set())
    assert sum(resuming.calls.values()) < 16 or not before
    same = ("success", "reward", "turns", "episodes", "tasks", "outcomes")
    assert [getattr(report, name) for name in same] == [getattr(whole, name) for name in same]
    both = [journal.load(tmp_path / run) for run in ("whole", "cut")]
    one, two = ({i: [u.completion for u in t.turns] for i, t in run.items()} for run in both)
    assert one == two


def test_a_finished_run_is_reported_again_without_a_single_episode(tmp_path: Path) -> None:
    config = EvaluationConfig(episodes=4)
    first = evaluate(ECHO, Failing({}), config, out=tmp_path / "run")
    idle = Failing({})
    again = evaluate(ECHO, idle, config, out=tmp_path / "run", resume=True)
    assert not idle.calls
    assert replace(again, seconds=0.0) == replace(first, seconds=0.0)


def test_resuming_tries_lost_episodes_again(tmp_path: Path) -> None:
    config = EvaluationConfig(episodes=4, attempts=1)
    first = evaluate(ECHO, Failing({"e0002": 9}), config, out=tmp_path / "run")
    assert first.infra_failed == 1
    mended = Failing({})
    second = evaluate(ECHO, mended, config, out=tmp_path / "run", resume=True)
    assert second.infra_failed == 0
    assert mended.calls.keys() == {"e0002"}
    assert journal.load(tmp_path / "run")["e0002"].attempt == 1


def test_another_evaluation_is_not_resumed_and_none_is_overwritten(tmp_path: Path) -> None:
    config = EvaluationConfig(episodes=4)
    evaluate(ECHO, Failing({}), config, out=tmp_path / "run")
    with pytest.raises(JournalError, match="already holds a journal"):
        evaluate(ECHO, Failing({}), config, out=tmp_path / "run")
    with pytest.raises(UsageError, match="seed = 0, not 1"):
        evaluate(ECHO, Failing({}), replace(config, seed=1), out=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="policy = 'failing', not 'expert'"):
        evaluate(ECHO, policy("expert"), config, out=tmp_path / "run", resume=True)
    with pytest.raises(JournalError):
        evaluate(ECHO, Failing({}), config, out=tmp_path / "nothing", resume=True)
    # How fast it runs is free, unless those who are sampled together are part of the result.
    quick = replace(config, rollout=RolloutConfig(concurrency=1))
    evaluate(ECHO, Failing({}), quick, out=tmp_path / "run", resume=True)
    together = replace(config, rollout=RolloutConfig(deterministic=True))
    evaluate(ECHO, Failing({}), together, out=tmp_path / "together")
    apart = replace(config, rollout=RolloutConfig(deterministic=True, concurrency=1))
    with pytest.raises(UsageError, match="concurrency = 16, not 1"):
        evaluate(ECHO, Failing({}), apart, out=tmp_path / "together", resume=True)


def test_an_environments_own_argument_may_be_called_concurrency_and_is_compared(tmp_path: Path) -> None:
    journal.Journal.create(
        tmp_path / "run", {"kind": "eval", "env": {"id": ECHO.id, "kwargs": {"concurrency": 2}}}
    ).close()
    with pytest.raises(UsageError, match=r"env.kwargs.concurrency = 2, not None"):
        evaluate(ECHO, Failing({}), EvaluationConfig(episodes=2), out=tmp_path / "run", resume=True)


def test_a_report_that_cannot_be_written_is_a_failure_of_storage(tmp_path: Path) -> None:
    (tmp_path / "run" / "report.json").mkdir(parents=True)
    with pytest.raises(StorageFailed, match="cannot write the report"):
        evaluate(ECHO, Failing({}), EvaluationConfig(episodes=2), out=tmp_path / "run")


def test_a_training_run_is_not_resumed_as_an_evaluation(tmp_path: Path) -> None:
    journal.Journal.create(tmp_path / "run", {"kind": "train"}).close()
    with pytest.raises(UsageError, match="is no evaluation"):
        evaluate(ECHO, Failing({}), out=tmp_path / "run", resume=True)


def test_a_torn_journal_is_mended_and_the_report_says_so(tmp_path: Path) -> None:
    config = EvaluationConfig(episodes=4)
    evaluate(ECHO, Failing({}), config, out=tmp_path / "run")
    path = tmp_path / "run" / journal.FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="cut "):
        report = evaluate(ECHO, Failing({}), config, out=tmp_path / "run", resume=True)
    assert report.outcomes == {"completed": 4}
    assert any(note.startswith("cut ") for note in report.notes)


def test_secrets_never_reach_the_journal_and_do_not_prevent_resuming(tmp_path: Path) -> None:
    env = replace(ECHO, parser_options={})
    config = EvaluationConfig(episodes=2)
    evaluate(env, Failing({}), config, out=tmp_path / "run", name="served?api_key=sk-123456")
    assert b"sk-123456" not in (tmp_path / "run" / journal.FILE).read_bytes()
    evaluate(env, Failing({}), config, out=tmp_path / "run", resume=True, name="served?api_key=sk-123456")


def test_the_report_lies_beside_the_journal(tmp_path: Path) -> None:
    report = evaluate(ECHO, policy("expert"), EvaluationConfig(episodes=4), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report.to_json()
    assert (tmp_path / "run" / "report.md").read_text() == report.markdown()


def test_it_can_be_awaited_inside_a_running_loop() -> None:
    from agentgym.evaluation.run import aevaluate

    async def inside() -> int:
        return (await aevaluate(ECHO, policy("expert"), EvaluationConfig(episodes=3))).episodes

    assert asyncio.run(inside()) == 3


def test_an_error_of_the_watcher_ends_the_episodes_in_flight_before_the_journal_is_closed(
    tmp_path: Path,
) -> None:
    class Slow(Failing):
        async def generate(self, requests: Sequence[Request]) -> list[Completion]:
            if requests[0].id != "e0000":
                await asyncio.sleep(60)
            return await super().generate(requests)

    def watch(trajectory: Trajectory) -> None:
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        evaluate(ECHO, Slow({}), EvaluationConfig(episodes=4), out=tmp_path / "r", on_episode=watch)
    outcomes = {id: str(t.outcome) for id, t in journal.load(tmp_path / "r").items()}
    assert outcomes == {"e0000": "completed", **{f"e000{i}": "cancelled" for i in (1, 2, 3)}}
