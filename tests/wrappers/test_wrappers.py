from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import agentgym
from agentgym.actions import make_parser
from agentgym.errors import UnknownName, UsageError
from agentgym.messages import ImagePart, TextPart, text_of
from agentgym.testing import ColourEnv, EchoEnv, GuessEnv, NoopEnv
from agentgym.wrappers import (
    ActionFormat,
    ListActions,
    ObservationHistory,
    TextWrapper,
    TimeLimit,
    TruncateObservation,
)

Make = Callable[[gymnasium.Env[Any, Any]], TextWrapper]
EACH: dict[str, Make] = {
    "ActionFormat": lambda env: ActionFormat(env, "plain", 0.5),
    "TruncateObservation": lambda env: TruncateObservation(env, 80),
    "ListActions": lambda env: ListActions(env, ["wait"]),
    "ObservationHistory": lambda env: ObservationHistory(env, 2),
    "TimeLimit": lambda env: TimeLimit(env, 3),
}


def full(env: gymnasium.Env[Any, Any], parser: str = "tags") -> TextWrapper:
    """A stack of all wrappers, in the order of EnvConfig."""
    env = ActionFormat(TruncateObservation(env, 200), parser, 0.25)
    return TimeLimit(ListActions(ObservationHistory(env, 2)), 6)


class Keeps(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Remembers what the environment returned, and copies of it."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.returned: list[Any] = []
        self.copies: list[Any] = []

    def reset(self, **kwargs: Any) -> Any:
        return self._keep(super().reset(**kwargs))

    def step(self, action: Any) -> Any:
        return self._keep(super().step(action))

    def _keep(self, result: Any) -> Any:
        self.returned.append(result)
        self.copies.append(copy.deepcopy(result))
        return result


class Chatty(EchoEnv):
    """Says more than anyone wants to read."""

    def begin(self, task: agentgym.Task) -> tuple[str, dict[str, Any]]:
        _, info = super().begin(task)
        return "".join(str(i % 10) for i in range(1000)), info


@pytest.mark.parametrize("name", EACH)
class TestEach:
    def test_passes_the_checker_of_gymnasium(self, name: str) -> None:
        env = EACH[name](NoopEnv(turns=100))
        with warnings.catch_warnings():
            # It wants unwrapped environments, and a spec to test render modes.
            warnings.simplefilter("ignore")
            check_env(env, skip_render_check=True)
        env.close()

    def test_returns_observations_of_its_space(self, name: str) -> None:
        env = EACH[name](ColourEnv())
        observation, _ = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        for action in ("pink", "mauve"):
            observation, *_ = env.step(action)
            assert env.observation_space.contains(observation)

    def test_leaves_what_it_got_as_it_was(self, name: str) -> None:
        inner = Keeps(ColourEnv())
        env = EACH[name](inner)
        _, info = env.reset(seed=0)
        info["mine"] = 1
        for action in ("pink", "", "mauve"):
            info = env.step(action)[4]
            info["mine"] = 1
        for returned, kept in zip(inner.returned, inner.copies, strict=True):
            assert returned[-1] == kept[-1]
            assert returned[0]["text"] == kept[0]["text"]

    def test_changes_only_the_text_of_an_observation_with_parts(self, name: str) -> None:
        inner = Keeps(ColourEnv())
        env = EACH[name](inner)
        env.reset(seed=0)
        observation = env.step("pink")[0]
        assert observation.keys() == {"text", "screenshot"}
        assert observation["screenshot"] is inner.returned[-1][0]["screenshot"]
        text, image = env.content(observation)
        assert isinstance(text, TextPart) and text.text == observation["text"]
        assert isinstance(image, ImagePart)

    def test_speaks_the_async_form(self, name: str) -> None:
        async def play() -> list[Any]:
            env = EACH[name](GuessEnv())
            first = await env.areset(seed=3)
            seen = [first, *[await env.astep(guess) for guess in ("500000", "", "7")]]
            await env.aclose()
            await env.aclose()
            return seen

        env = EACH[name](GuessEnv())
        expected = [env.reset(seed=3), *[env.step(guess) for guess in ("500000", "", "7")]]
        env.close()
        assert asyncio.run(play()) == expected

    def test_an_inner_wrapper_without_the_async_form_runs_on_a_thread(self, name: str) -> None:
        async def play() -> Any:
            env = EACH[name](gymnasium.wrappers.TimeLimit(GuessEnv(), 2))
            await env.areset(seed=3)
            result = await env.astep("500000")
            await env.aclose()
            return result

        assert asyncio.run(play())[4]["valid_action"] is True

    def test_a_step_out_of_order_is_refused(self, name: str) -> None:
        env = EACH[name](EchoEnv())
        with pytest.raises(UsageError, match="running episode"):
            env.step("apple")
        env.reset(seed=0)
        assert env.step("apple")[2]
        with pytest.raises(UsageError, match="running episode"):
            env.step("apple")
        env.reset(seed=0)
        env.close()
        with pytest.raises(UsageError, match="running episode"):
            env.step("apple")

    def test_is_recorded_in_the_spec(self, name: str) -> None:
        agentgym.register("tests/Wrapped-v0", "agentgym.testing:NoopEnv")
        env = EACH[name](agentgym.make("tests/Wrapped-v0"))
        assert env.spec is not None
        again = gymnasium.make(env.spec, disable_env_checker=True)
        assert env.reset(seed=1) == again.reset(seed=1)
        assert env.step("look") == again.step("look")
        assert type(again).__name__ == name

    def test_what_lies_below_is_reached_by_unwrapped(self, name: str) -> None:
        env = EACH[name](EchoEnv())
        assert isinstance(env.unwrapped, EchoEnv)
        assert len(env.unwrapped.tasks("test")) == 16


class TestActionFormat:
    def test_the_action_reaches_the_environment_and_the_thought_does_not(self) -> None:
        env = ActionFormat(EchoEnv(), "tags")
        observation, _ = env.reset(options={"task_id": "echo-test-0"})
        word = observation.removeprefix("Say: ")
        _, reward, terminated, _, info = env.step(f"<think>easy</think><action>{word}</action>")
        assert (reward, terminated, info["action"], info["thought"]) == (1.0, True, word, "easy")
        assert info["valid_action"] is True

    def test_a_malformed_completion_does_not_reach_the_environment(self) -> None:
        env = ActionFormat(EchoEnv(turns=2), "tags", penalty=0.1)
        env.reset(seed=0)
        before = list(env.unwrapped._actions)
        observation, reward, terminated, truncated, info = env.step("<action>apple")
        assert env.unwrapped._actions == before == []
        assert "<action> is never closed" in observation
        assert env.parser.instructions() in observation
        assert (reward, terminated, truncated) == (-0.1, False, False)
        assert info["valid_action"] is False and info["action"] == "" and info["thought"] is None
        assert "never closed" in info["format_error"]

    def test_what_stays_true_after_a_malformed_turn(self) -> None:
        env = ActionFormat(EchoEnv(turns=3), "tags", penalty=0.1)
        observation, start = env.reset(seed=0)
        assert env.step("?")[4]["admissible_actions"] == start["admissible_actions"]
        _, reward, *_, good = env.step(f"<action>{observation.removeprefix('Say: ')}</action>")
        assert reward == pytest.approx(1 / 3)
        info = env.step("?")[4]
        assert info["score"] == good["score"] == pytest.approx(1 / 3)
        assert info["success"] is False
        assert info["admissible_actions"] == good["admissible_actions"]

    def test_the_penalty_is_taken_once_and_from_the_failing_turn_alone(self) -> None:
        def rewards(penalty: float) -> list[float]:
            env = ActionFormat(EchoEnv(turns=3), "tags", penalty=penalty)
            env.reset(seed=0)
            taken = ("<action>x</action>", "?", "<action>apple</action>", "", "<action>x</action>")
            return [env.step(completion)[1] for completion in taken]

        free, costly = rewards(0.0), rewards(0.5)
        assert [c - f for c, f in zip(costly, free, strict=True)] == [0, -0.5, 0, -0.5, 0]
        assert str(free[1]) == "0.0"

    def test_an_invalid_action_in_the_right_format_costs_nothing_here(self) -> None:
        env = ActionFormat(EchoEnv(turns=2), "plain", penalty=0.5)
        env.reset(seed=0)
        _, reward, *_, info = env.step("no such word")
        assert reward == 0.0 and info["valid_action"] is False and info["action"] == "no such word"

    def test_bad_arguments(self) -> None:
        with pytest.raises(UnknownName, match="'hermes'"):
            ActionFormat(EchoEnv(), "herms")
        for penalty in (-1.0, float("nan"), float("inf")):
            with pytest.raises(UsageError, match="penalty"):
                ActionFormat(EchoEnv(), "plain", penalty)
        env = ActionFormat(EchoEnv(), make_parser("plain"))
        env.reset(seed=0)
        with pytest.raises(UsageError, match="a completion is a str, not int"):
            env.step(3)  # type: ignore[arg-type]


class TestTruncateObservation:
    def test_keeps_both_ends_and_counts_the_middle(self) -> None:
        text = "".join(str(i % 10) for i in range(1000))
        observation, _ = TruncateObservation(Chatty(), 200).reset(seed=0)
        assert observation == f"{text[:84]}\n[… 832 characters left out …]\n{text[-84:]}"
        assert 84 + 832 + 84 == 1000 and len(observation) <= 200

    @pytest.mark.parametrize("limit", range(80, 140))
    def test_never_exceeds_the_limit(self, limit: int) -> None:
        observation, _ = TruncateObservation(Chatty(), limit).reset(seed=0)
        kept = [part for part in observation.split("\n") if "left out" not in part]
        left_out = int(observation.split("[… ")[1].split(" ")[0])
        assert len(observation) <= limit and sum(map(len, kept)) + left_out == 1000

    def test_a_short_text_stays(self) -> None:
        env = TruncateObservation(EchoEnv(), 80)
        assert env.reset(seed=0)[0] == EchoEnv().reset(seed=0)[0]

    def test_a_limit_too_small_for_the_note_is_refused(self) -> None:
        with pytest.raises(UsageError, match="80 or more"):
            TruncateObservation(EchoEnv(), 79)


class TestListActions:
    def test_lists_one_a_line_and_leaves_info_whole(self) -> None:
        env = ListActions(NoopEnv(), exclude=["wait"])
        observation, info = env.reset(seed=0)
        assert observation == "Turn 0 of 5.\n\nAdmissible actions:\nlook"
        assert info["admissible_actions"] == ["look", "wait"]
        assert env.step("look")[0] == "Turn 1 of 5.\n\nAdmissible actions:\nlook"

    def test_without_a_list_nothing_is_added(self) -> None:
        assert "Admissible" not in ListActions(GuessEnv()).reset(seed=0)[0]
        env = ListActions(NoopEnv(turns=1))
        env.reset(seed=0)
        assert env.step("look")[0] == "Turn 1 of 1."

    def test_a_string_is_no_list_of_exclusions(self) -> None:
        with pytest.raises(UsageError, match="list of actions"):
            ListActions(NoopEnv(), exclude="help")


class TestObservationHistory:
    def test_the_last_turns_stand_in_front_numbered(self) -> None:
        env = ObservationHistory(NoopEnv(turns=9), 2)
        assert env.reset(seed=0)[0] == "Turn 0 of 9."
        assert env.step("look")[0] == (
            "Turn 2. Earlier turns:\n"
            "[observation 1] Turn 0 of 9.\n[action 1] look\n"
            "[observation 2] Turn 1 of 9."
        )
        env.step("wait")
        assert env.step("sleep")[0] == (
            "Turn 4. The last 2 of 3 earlier turns:\n"
            "[observation 2] Turn 1 of 9.\n[action 2] wait\n"
            "[observation 3] Turn 2 of 9.\n[action 3] sleep\n"
            "[observation 4] Turn 3 of 9."
        )

    def test_a_new_episode_starts_empty(self) -> None:
        env = ObservationHistory(NoopEnv(), 2)
        env.reset(seed=0)
        env.step("look")
        assert env.reset(seed=0)[0] == "Turn 0 of 5."

    def test_a_window_of_nothing_is_refused(self) -> None:
        with pytest.raises(UsageError, match="1 or more"):
            ObservationHistory(NoopEnv(), 0)


class TestTimeLimit:
    def test_truncates_and_says_why(self) -> None:
        env = TimeLimit(NoopEnv(turns=9), 2)
        env.reset(seed=0)
        *_, truncated, info = env.step("look")
        assert not truncated and "truncated_by" not in info
        _, _, terminated, truncated, info = env.step("look")
        assert (terminated, truncated, info["truncated_by"]) == (False, True, "turns")
        with pytest.raises(UsageError, match="running episode"):
            env.step("look")
        env.reset(seed=0)
        assert not env.step("look")[3]

    def test_an_end_on_the_last_turn_is_the_environments_own(self) -> None:
        env = TimeLimit(NoopEnv(turns=2), 2)
        env.reset(seed=0)
        env.step("look")
        _, reward, terminated, truncated, info = env.step("look")
        assert (reward, terminated, truncated) == (1.0, True, False) and "truncated_by" not in info

    def test_malformed_turns_count(self) -> None:
        env = TimeLimit(ActionFormat(NoopEnv(turns=9), "tags"), 2)
        env.reset(seed=0)
        env.step("?")
        assert env.step("?")[4]["truncated_by"] == "turns"

    def test_a_limit_of_nothing_is_refused(self) -> None:
        with pytest.raises(UsageError, match="1 or more"):
            TimeLimit(NoopEnv(), 0)


class TestStacked:
    def test_a_malformed_turn_is_remembered_and_lists_the_actions_again(self) -> None:
        env = full(NoopEnv(turns=9))
        env.reset(seed=0)
        observation = env.step("look")[0]
        assert "Your answer could not be read. There is no <action>…</action> block." in observation
        assert observation.endswith("Admissible actions:\nlook\nwait")
        after = env.step("<action>look</action>")[0]
        assert "[action 1] (malformed)" in after and "[observation 2] Your answer could not be read." in after
        assert after.count("Admissible actions:") == 1

    def test_an_image_stays_through_a_malformed_turn(self) -> None:
        env = full(ColourEnv())
        first, _ = env.reset(seed=0)
        second = env.step("?")[0]
        assert second["screenshot"] is first["screenshot"] and second["text"] != first["text"]
        assert len(env.content(second)) == 2

    def test_a_fork_is_independent_of_its_origin(self) -> None:
        env = full(NoopEnv(turns=20))
        env.reset(seed=0)
        for completion in ("<action>look</action>", "?", "<action>wait</action>"):
            env.step(completion)
        other = agentgym.fork(env)
        ahead = [env.step(c) for c in ("<action>a</action>", "?", "<action>b</action>")]
        assert ahead[-1][4]["truncated_by"] == "turns"
        assert [other.step(c) for c in ("<action>a</action>", "?", "<action>b</action>")] == ahead
        assert env.unwrapped is not other.unwrapped

    def test_a_fork_of_an_unstarted_and_of_an_ended_stack(self) -> None:
        env = full(EchoEnv())
        with pytest.raises(UsageError, match="running episode"):
            agentgym.fork(env).step("<action>x</action>")
        env.reset(seed=0)
        env.step("<action>x</action>")
        with pytest.raises(UsageError, match="running episode"):
            agentgym.fork(env).step("<action>x</action>")

    def test_an_environment_of_another_library(self) -> None:
        class Foreign(gymnasium.Env[str, str]):
            observation_space = agentgym.spaces.Text()
            action_space = agentgym.spaces.Text()

            def reset(self, **kwargs: Any) -> tuple[str, dict[str, Any]]:
                return "hello", {}

            def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
                return action.upper(), 1.0, False, False, {}

        env = full(Foreign(), "plain")
        env.reset()
        observation, reward, *_, info = env.step("shout")
        assert "[observation 2] SHOUT" in text_of(env.content(observation))
        assert reward == 1.0 and info["action"] == "shout"
        assert env.step(" ")[4]["score"] == 0.0


def test_history_without_observations_is_one_line() -> None:
    env = ObservationHistory(EchoEnv(turns=5), 2, observations=False)
    first, _ = env.reset(seed=0)
    assert "Earlier" not in first
    second = env.step("apple")[0]
    assert second.startswith("Earlier actions: apple\n\n") and first not in second
    env.step("bread")
    assert env.step("chair")[0].startswith("Earlier actions: … bread, chair\n\n")
