"""Collections: the order of tasks, the failure rate, what the environments say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentgym.errors import EnvironmentFailed, UsageError
from agentgym.outcome import Outcome
from agentgym.policies import make_policy
from agentgym.policies.base import PolicyContext
from agentgym.rollout.engine import Episode, RolloutConfig, RolloutEngine
from agentgym.testing import EchoEnv
from agentgym.trainers.collect import Collection, TaskOrder, collect, environment_metrics, plan
from agentgym.wrappers.stack import EnvConfig


def test_the_order_depends_on_seed_and_position_alone() -> None:
    tasks = EchoEnv().tasks("train")
    order = TaskOrder(tasks, 3)
    straight = [order[i] for i in range(80)]
    assert [TaskOrder(tasks, 3)[i] for i in reversed(range(80))] == straight[::-1]
    assert sorted(straight[:32]) == sorted(tasks.ids) == sorted(straight[32:64])
    assert straight[:32] != straight[32:64] and straight != [TaskOrder(tasks, 4)[i] for i in range(80)]
    assert {TaskOrder(tasks, 0, first=2)[i] for i in range(9)} == set(tasks.ids[:2])
    with pytest.raises(UsageError, match="no tasks"):
        TaskOrder(tasks[:0], 0)


def test_members_of_a_group_share_the_task() -> None:
    episodes = plan(TaskOrder(EchoEnv().tasks("train"), 0), 4, 10, 2, 3)
    assert [(e.group, e.member) for e in episodes] == [(10, 0), (10, 1), (10, 2), (11, 0), (11, 1), (11, 2)]
    assert len({e.id for e in episodes}) == 6 and len({e.task_id for e in episodes}) == 2


@pytest.mark.parametrize(("limit", "stops"), [(0.4, True), (0.5, False)])
def test_too_many_failures_stop_the_run(limit: float, stops: bool) -> None:
    async def go() -> Any:
        env = EnvConfig("agentgym.testing:CrashEnv", worker="thread")
        policy = make_policy("expert", PolicyContext(env.id))
        engine = RolloutEngine(env, policy)
        episodes = [Episode("a", "calm-0"), Episode("b", "begin-raise", "begin")]
        try:
            return await collect(engine, episodes, {}, max_failure_rate=limit)
        finally:
            await engine.aclose()
            await policy.aclose()

    if stops:
        with pytest.raises(EnvironmentFailed, match="1 of 2 episodes failed") as caught:
            asyncio.run(go())
        assert "max_failure_rate" in caught.value.hint
    else:
        assert [t.valid for t in asyncio.run(go())] == [True, False]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("limit", "again"), [(0.4, True), (0.5, False)])
def test_failures_that_stopped_a_run_are_tried_again(
    make_trajectory: Callable[..., Any], deterministic: bool, limit: float, again: bool
) -> None:
    async def go() -> Any:
        env = EnvConfig("agentgym.testing:EchoEnv")
        policy = make_policy("expert", PolicyContext(env.id))
        engine = RolloutEngine(env, policy, RolloutConfig(deterministic=deterministic))
        try:
            return await collect(engine, episodes, restored, max_failure_rate=limit)
        finally:
            await engine.aclose()
            await policy.aclose()

    episodes = [Episode(id, "echo-train-0") for id in ("a", "b")]
    restored = {
        "a": make_trajectory("a"),
        "b": make_trajectory("b", outcome=Outcome.infra_failed("environment")),
    }
    first, second = asyncio.run(go())
    assert second.valid == again and second.attempt == int(again)
    # In deterministic mode the whole collection is sampled anew.
    assert (first is restored["a"]) == (not (again and deterministic))


def test_a_failure_is_in_no_statistic(make_trajectory: Callable[..., Any]) -> None:
    lost = make_trajectory("f", reward=9.0, outcome=Outcome.infra_failed("tool"))
    made = Collection.of([lost, make_trajectory("t", reward=1.0, lengths=((2, 3), (2, 1)))])
    assert made.rewards.tolist() == [0, 1] and made.valid.tolist() == [False, True]
    assert {row.trajectory for row in made.rows} == {1}
    metrics = environment_metrics(made.trajectories)
    assert (metrics["success"], metrics["turns/mean"], metrics["infra_failed"]) == (1, 2, 1)
    assert metrics["outcome/infra_failed(tool)"] == metrics["outcome/completed"] == 1


def test_nothing_collected_has_tensors_too() -> None:
    made = Collection.of([])
    assert made.whole is None and len(made.rewards) == len(made.sampled) == 0
    assert environment_metrics([])["success"] == 0
