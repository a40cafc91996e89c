from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentgym.policies.base import Completion, Policy, Request, Sampling
from agentgym.rollout.engine import Episode
from agentgym.trajectory import Trajectory
from agentgym.wrappers.stack import EnvConfig

Play = Callable[..., list[Trajectory]]
NOOP = "agentgym.testing:NoopEnv"


class Watched(Policy):
    """Passes calls on and remembers whose requests they held."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.renderer, self.context_limit = inner, inner.renderer, inner.context_limit
        self.calls: list[list[str]] = []

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append([request.id for request in requests])
        return await self.inner.generate(requests)


class Waits(Policy):
    """Waits, and leaves early where an id says so."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion("wait") for _ in requests]


def test_runs_are_equal_bit_for_bit_whatever_the_timing_and_the_number_of_slots(
    wild: str, play: Play, timeless: Callable[..., list[Trajectory]], tiny_policy: Callable[..., Any]
) -> None:
    env = EnvConfig(f"{wild}:Jittery", {"turns": 3})
    episodes = [Episode(f"e{i}", f"echo-train-{i // 2}", group=i // 2, member=i % 2) for i in range(6)]
    policy = Watched(tiny_policy())
    runs = []
    for slots, order in ((6, 1), (6, -1), (16, 1)):
        options = {"deterministic": True, "concurrency": slots, "sampling": Sampling(max_tokens=6), "seed": 4}
        runs.append(timeless(play(env, policy, episodes[::order], **options))[::order])
    assert runs[0] == runs[1] == runs[2]
    assert policy.calls == [[e.id for e in episodes]] * 9
    assert len({tuple(t.segments[0].token_ids) for t in runs[0]}) == 6  # members differ


def test_a_round_holds_every_live_episode_and_freed_slots_are_filled_first(play: Play) -> None:
    policy = Watched(Waits())
    done = play(
        EnvConfig(NOOP, {"turns": 2}),
        policy,
        [Episode(f"e{i}", f"noop-train-{i}") for i in (3, 1, 2, 0)],
        deterministic=True,
        concurrency=3,
    )
    assert [t.reward for t in done] == [1.0] * 4
    assert policy.calls == [["e1", "e2", "e3"], ["e1", "e2", "e3"], ["e0"], ["e0"]]


def test_an_episode_that_fails_between_rounds_is_not_waited_for(wild: str, play: Play) -> None:
    class Script(Policy):
        async def generate(self, requests: Sequence[Request]) -> list[Completion]:
            return [
                Completion("timeout" if r.id == "e1" else "end" if r.turn.turn == 2 else "look")
                for r in requests
            ]

    policy = Watched(Script())
    done = play(
        EnvConfig(f"{wild}:Wild"),
        policy,
        [Episode(f"e{i}", f"train-{i}") for i in range(3)],
        deterministic=True,
    )
    assert [str(t.outcome) for t in done] == ["completed", "infra_failed(environment)", "completed"]
    assert policy.calls == [["e0", "e1", "e2"], ["e0", "e2"], ["e0", "e2"]]


@pytest.mark.parametrize("limit", [60, 100, 140])
def test_a_full_context_ends_its_episode_before_the_round(
    play: Play, tiny_policy: Callable[..., Any], limit: int
) -> None:
    episodes = [Episode(f"e{i}", f"noop-train-{i}") for i in range(4)]
    done = play(
        EnvConfig(NOOP, {"turns": 20}),
        tiny_policy(context_limit=limit),
        episodes,
        deterministic=True,
        sampling=Sampling(max_tokens=8),
    )
    assert {str(t.outcome) for t in done} == {"truncated(context)"}
