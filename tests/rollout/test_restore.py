from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentgym import journal as journals
from agentgym.journal import Journal
from agentgym.policies.base import Completion, Policy, Request, Sampling
from agentgym.rollout.engine import Episode
from agentgym.trajectory import Trajectory
from agentgym.wrappers.stack import EnvConfig

Play = Callable[..., list[Trajectory]]
SAMPLING = Sampling(max_tokens=6)
EPISODES = [Episode(f"e{i}", f"echo-train-{i}") for i in range(3)]


class Stopped(Policy):
    """Passes calls on until a turn: there the run is cut off, as by Ctrl-C."""

    def __init__(self, inner: Policy, at: int | None = None) -> None:
        self.inner, self.at = inner, at
        self.renderer, self.context_limit = inner.renderer, inner.context_limit
        self.turns: list[int] = []

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if any(request.turn.turn == self.at for request in requests):
            raise KeyboardInterrupt
        self.turns += [request.turn.turn for request in requests]
        return await self.inner.generate(requests)


@pytest.fixture
def env(wild: str) -> EnvConfig:
    return EnvConfig(f"{wild}:Moody", {"turns": 4})


@pytest.fixture
def interrupted(
    tmp_path: Path, play: Play, env: EnvConfig, tiny_policy: Callable[..., Any]
) -> tuple[Path, Policy]:
    """The folder of a run that was cut off before turn 2 of one episode, and its policy."""
    policy, folder = tiny_policy(), tmp_path / "run"
    with Journal.create(folder, {}) as journal, pytest.raises(KeyboardInterrupt):
        play(env, Stopped(policy, at=2), EPISODES[:1], journal, sampling=SAMPLING)
    asyncio.run(policy.aclose())
    return folder, tiny_policy()


def go_on(play: Play, env: EnvConfig, folder: Path, policy: Policy) -> tuple[Trajectory, list[int]]:
    watched = Stopped(policy)
    with Journal.open(folder) as journal:
        [done] = play(env, watched, EPISODES[:1], journal, journals.load(folder), sampling=SAMPLING)
    assert journals.load(folder) == {done.id: done}
    return done, watched.turns


def test_finished_turns_are_taken_again_and_not_sampled_again(
    play: Play, env: EnvConfig, interrupted: tuple[Path, Policy], timeless: Callable[..., list[Trajectory]]
) -> None:
    folder, policy = interrupted
    [before] = journals.load(folder).values()
    assert before.outcome is None and len(before.turns) == 2
    done, sampled = go_on(play, env, folder, policy)
    assert sampled == [2, 3]
    assert (str(done.outcome), done.attempt) == ("completed", 0)
    assert done.turns[:2] == before.turns
    length = len(before.segments[0])
    assert done.segments[0].token_ids[:length] == before.segments[0].token_ids
    assert done.segments[0].logp_rollout[:length] == before.segments[0].logp_rollout
    [uninterrupted] = play(env, policy, EPISODES[:1], sampling=SAMPLING)
    assert [t.completion for t in done.turns] == [t.completion for t in uninterrupted.turns]
    assert done.segments[0].token_ids == uninterrupted.segments[0].token_ids


@pytest.mark.parametrize("variable", [("MOOD", "sad "), ("MOOD_AT", "0"), ("MOOD_AT", "1")])
def test_an_environment_that_answers_otherwise_starts_the_episode_anew(
    play: Play,
    env: EnvConfig,
    interrupted: tuple[Path, Policy],
    monkeypatch: pytest.MonkeyPatch,
    variable: tuple[str, str],
) -> None:
    folder, policy = interrupted
    monkeypatch.setenv(*variable)
    done, sampled = go_on(play, env, folder, policy)
    assert sampled == [0, 1, 2, 3]
    assert (str(done.outcome), done.attempt, len(done.turns)) == ("completed", 1, 4)
    assert [len(t.turns) for t in journals.attempts(folder)["e0"]] == [2, 4]


def test_a_crash_while_turns_are_taken_again_is_a_failure_like_any_other(
    play: Play, env: EnvConfig, interrupted: tuple[Path, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, policy = interrupted
    monkeypatch.setenv("MOOD", "dead")
    broken = journals.load(folder)["e0"]
    observed = broken.turns[0].observation
    broken.turns[0] = replace(
        broken.turns[0], observation=(replace(observed[0], text="dead" + observed[0].text),)
    )  # type: ignore[arg-type,call-arg,union-attr]
    with Journal.open(folder) as journal:
        [done] = play(env, policy, EPISODES[:1], journal, {"e0": broken}, sampling=SAMPLING)
    assert done.outcome is not None
    assert (str(done.outcome), done.outcome.doubtful) == ("infra_failed(environment)", True)
    assert (done.attempt, done.turns) == (1, [])
    assert journals.load(folder)["e0"] == done


def test_ended_episodes_are_given_back_and_those_without_a_turn_begin_again(
    tmp_path: Path, play: Play, env: EnvConfig, tiny_policy: Callable[..., Any]
) -> None:
    policy = Stopped(tiny_policy())
    with Journal.create(tmp_path / "run", {}) as journal:
        [ended] = play(env, policy, EPISODES[:1], journal, sampling=SAMPLING)
        policy.turns.clear()
        blank = Trajectory("e1", env.id, "echo-train-1")
        journal.begin(blank)
        restored = {"e0": ended, "e1": blank}
        done = play(env, policy, EPISODES, journal, restored, sampling=SAMPLING)
    assert done[0] is ended
    assert [t.attempt for t in done] == [0, 1, 0]
    assert len(policy.turns) == 8
    assert journals.load(tmp_path / "run") == {t.id: t for t in done}
