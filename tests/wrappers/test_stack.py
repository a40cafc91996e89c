from __future__ import annotations

import asyncio
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import agentgym
from agentgym.errors import ConfigError, MissingDependency, UnknownName, UsageError
from agentgym.rollout.host import Host
from agentgym.wrappers import ActionFormat, ListActions, ObservationHistory, TimeLimit, TruncateObservation
from agentgym.wrappers.stack import EnvConfig

NOOP = "agentgym.testing:NoopEnv"
FULL = EnvConfig(
    NOOP,
    {"turns": 20},
    worker="thread",
    parser="tags",
    parser_options={"require_thought": True},
    history=2,
    list_actions=True,
    max_turns=4,
    max_observation_chars=500,
    invalid_penalty=0.1,
)


def layers(env: gymnasium.Env[Any, Any]) -> list[type]:
    found = []
    while isinstance(env, gymnasium.Wrapper):
        found.append(type(env))
        env = env.env
    return found


def test_the_order_of_the_stack() -> None:
    assert layers(FULL.build()) == [
        TimeLimit,
        ListActions,
        ObservationHistory,
        ActionFormat,
        TruncateObservation,
    ]
    assert layers(EnvConfig(NOOP).build()) == [ActionFormat]


def test_an_episode_through_the_whole_stack() -> None:
    env = FULL.build()
    observation, info = env.reset(seed=0, options={"task_id": "noop-test-7"})
    assert info["task_id"] == "noop-test-7" and observation.endswith("Admissible actions:\nlook\nwait")
    observation, reward, *_, info = env.step("<action>look</action>")
    assert reward == -0.1 and info["valid_action"] is False
    assert "no <think>…</think> block" in observation and observation.endswith(
        "Admissible actions:\nlook\nwait"
    )
    observation, reward, *_, info = env.step("<think>so</think><action>look</action>")
    assert (reward, info["action"], info["thought"]) == (0.0, "look", "so")
    assert "[action 1] (malformed)" in observation and "[observation 3] Turn 1 of 20." in observation
    env.step("")
    assert env.step("")[4]["truncated_by"] == "turns"


def test_the_same_in_async_form_and_as_a_fork() -> None:
    completions = ["<action>look</action>", "<think>so</think><action>look</action>", ""]

    async def play() -> list[Any]:
        env: Any = FULL.build()
        return [await env.areset(seed=0), *[await env.astep(completion) for completion in completions]]

    env = FULL.build()
    expected = [env.reset(seed=0), *[env.step(completion) for completion in completions]]
    assert asyncio.run(play()) == expected
    again = agentgym.fork(env)
    assert again.step("x") == env.step("x")


@pytest.mark.parametrize(
    "config", [FULL, EnvConfig(NOOP), EnvConfig("TextWorld-Cooking-v0", {"a": [1, None]})]
)
def test_travels_as_json_and_as_a_pickle(config: EnvConfig) -> None:
    data = json.loads(json.dumps(config.to_json()))
    assert EnvConfig.from_json(data) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_json_holds_what_is_set_and_nothing_else() -> None:
    assert EnvConfig(NOOP, max_turns=3).to_json() == {"id": NOOP, "max_turns": 3}


def test_instructions_are_those_of_the_parser() -> None:
    assert "must first think" in FULL.instructions()
    assert EnvConfig(NOOP).instructions() == "Answer with the action alone and nothing else."


def test_content_is_read_through_the_stack() -> None:
    host = Host(EnvConfig("agentgym.testing:ColourEnv", parser="tags", history=1, list_actions=True))
    text, image = host.reset(seed=0, task_id="colour-test-red").content
    assert "Admissible actions:\nred" in text.text  # type: ignore[union-attr]
    assert image.data.startswith(b"\x89PNG")  # type: ignore[union-attr]


class TestWorker:
    def test_the_configs_wins_over_the_class(self) -> None:
        assert EnvConfig(NOOP).resolve_worker() == "async"
        assert EnvConfig(NOOP, worker="process").resolve_worker() == "process"
        assert EnvConfig("agentgym.testing:CrashEnv").resolve_worker() == "process"
        assert EnvConfig("agentgym.testing:ColourEnv").resolve_worker() == "thread"

    def test_of_a_registered_id(self) -> None:
        agentgym.register("tests/Noop-v0", NOOP)
        assert EnvConfig("tests/Noop-v0").resolve_worker() == "async"
        assert EnvConfig("agentgym:tests/Noop-v0").resolve_worker() == "async"

    def test_an_environment_of_another_library_runs_on_a_thread(self) -> None:
        assert EnvConfig("CartPole-v1").resolve_worker() == "thread"

    def test_a_missing_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_wrote\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        agentgym.register("tests/NeedsMore-v0", "needs_more:Env", extra="text")
        with pytest.raises(MissingDependency, match=r"a_package_that_nobody_wrote.*'text'"):
            EnvConfig("tests/NeedsMore-v0").resolve_worker()
        assert "needs_more" not in sys.modules


class TestMistakes:
    def test_values_that_cannot_be(self) -> None:
        with pytest.raises(UnknownName, match="'thread'"):
            EnvConfig(NOOP, worker="threads")  # type: ignore[arg-type]
        with pytest.raises(UnknownName, match="'tags'"):
            EnvConfig(NOOP, parser="tag")
        with pytest.raises(UnknownName, match="'require_thought'"):
            EnvConfig(NOOP, parser="tags", parser_options={"require_thoughts": True})
        with pytest.raises(ConfigError, match="history"):
            EnvConfig(NOOP, history=-1)

    @pytest.mark.parametrize(
        "wrong", [{"max_turns": 0}, {"max_observation_chars": 3}, {"invalid_penalty": -1.0}, {"history": -2}]
    )
    def test_limits_are_refused_before_anything_is_built(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            EnvConfig(NOOP, **wrong)

    def test_unknown_ids_and_keys_name_the_near_ones(self) -> None:
        for action in (
            EnvConfig("TextWorld-Coking-v0").build,
            EnvConfig("TextWorld-Coking-v0").resolve_worker,
        ):
            with pytest.raises(UnknownName, match="TextWorld-Cooking-v0"):
                action()
        with pytest.raises(UnknownName, match="'history'"):
            EnvConfig.from_json({"id": NOOP, "histori": 2})
        with pytest.raises(ConfigError, match="no id"):
            EnvConfig.from_json({})

    def test_what_json_cannot_hold_is_said(self) -> None:
        with pytest.raises(ConfigError, match="cannot be saved"):
            EnvConfig(NOOP, {"turns": object()}).to_json()
