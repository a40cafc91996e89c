from __future__ import annotations

import copy
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import agentgym
from agentgym.errors import UnknownName, UsageError

MODES: list[Literal["sync", "async"]] = ["sync", "async"]
ECHO = "agentgym.testing:EchoEnv"
COLOUR = "agentgym.testing:ColourEnv"


@pytest.fixture(autouse=True, scope="module")
def echo_id() -> None:
    if "tests/VectorEcho-v0" not in gymnasium.registry:
        gymnasium.register("tests/VectorEcho-v0", "agentgym.testing:EchoEnv")


def words(observations: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text.rsplit(" ", 1)[1] for text in observations)


@pytest.mark.parametrize("mode", MODES)
def test_episodes_run_side_by_side(mode: Literal["sync", "async"]) -> None:
    envs = agentgym.make_vec(ECHO, 3, mode=mode, turns=2)
    observations, infos = envs.reset(seed=[1, 2, 3])
    assert isinstance(observations, tuple)
    assert len(set(infos["task_id"])) > 1
    observations, rewards, _, _, infos = envs.step(words(observations))
    assert rewards.tolist() == [0.5, 0.5, 0.5]
    assert infos["valid_action"].tolist() == [True] * 3
    wrong = ("nonsense 🏔", *words(observations)[1:])
    _, rewards, terminated, truncated, infos = envs.step(wrong)
    assert rewards.tolist() == [0.0, 0.5, 0.5]
    assert terminated.all()
    assert not truncated.any()
    assert infos["success"].tolist() == [False, True, True]
    envs.close()


def test_both_modes_give_the_same_episodes() -> None:
    def play(mode: Literal["sync", "async"]) -> list[Any]:
        envs = agentgym.make_vec(ECHO, 2, mode=mode, turns=2)
        seen: list[Any] = [envs.reset(seed=5)[0]]
        for _ in range(5):
            observations, rewards, *_ = envs.step(("apple", "bread"))
            seen.append((observations, rewards.tolist()))
        envs.close()
        return seen

    assert play("sync") == play("async")


@pytest.mark.parametrize("mode", MODES)
def test_next_step_autoreset(mode: Literal["sync", "async"]) -> None:
    envs = agentgym.make_vec(ECHO, 2, mode=mode, autoreset_mode=AutoresetMode.NEXT_STEP)
    observations, _ = envs.reset(seed=0)
    observations, _, terminated, _, _ = envs.step(words(observations))
    assert observations == ("Right.", "Right.")
    assert terminated.all()
    observations, rewards, terminated, _, infos = envs.step(("ignored", "ignored"))
    assert all(text.startswith("Say: ") for text in observations)
    assert not rewards.any()
    assert not terminated.any()
    assert all(infos["_task_id"])
    envs.close()


@pytest.mark.parametrize("mode", MODES)
def test_same_step_autoreset_keeps_the_final_observation(mode: Literal["sync", "async"]) -> None:
    envs = agentgym.make_vec(COLOUR, 2, mode=mode, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0, options={"task_id": "colour-train-red"})
    observations, rewards, terminated, _, infos = envs.step(("red", "blue"))
    assert rewards.tolist() == [1.0, 0.0]
    assert terminated.all()
    final = infos["final_obs"]
    assert [f["text"] for f in final] == ["Thank you.", "Thank you."]
    assert observations["text"] == ("Look.", "Look.")
    kept = copy.deepcopy(final)
    for _ in range(3):
        envs.step(("green", "white"))
    for now, was in zip(final, kept, strict=True):
        assert now["text"] == was["text"]
        assert np.array_equal(now["screenshot"], was["screenshot"])
        assert not np.shares_memory(now["screenshot"], observations["screenshot"])
    envs.close()


@pytest.mark.parametrize("mode", MODES)
def test_without_autoreset_the_caller_names_which_begin_again(mode: Literal["sync", "async"]) -> None:
    envs = agentgym.make_vec(ECHO, 2, mode=mode, autoreset_mode=AutoresetMode.DISABLED)
    observations, _ = envs.reset(seed=0)
    envs.step(words(observations))
    mask = np.array([True, True])
    observations, infos = envs.reset(options={"reset_mask": mask, "task_id": "echo-test-1"})
    assert list(infos["task_id"]) == ["echo-test-1"] * 2
    assert len(set(observations)) == 1
    envs.close()


def test_gymnasiums_make_vec() -> None:
    for mode, vector_kwargs in (("sync", {}), ("async", {"shared_memory": False})):
        envs = gymnasium.make_vec(
            "tests/VectorEcho-v0", 2, vectorization_mode=mode, vector_kwargs=vector_kwargs
        )
        observations, _ = envs.reset(seed=0)
        _, rewards, *_ = envs.step(words(observations))
        assert rewards.tolist() == [1.0, 1.0]
        envs.close()


def test_what_cannot_be() -> None:
    with pytest.raises(UsageError, match="at least one copy"):
        agentgym.make_vec(ECHO, 0)
    with pytest.raises(UnknownName, match="TextWorld-Cooking-v0"):
        agentgym.make_vec("TextWorld-Coking-v0", 2)
    with pytest.raises(UnknownName, match="'turns'"):
        agentgym.make_vec(ECHO, 2, turn=3)
