from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import agentgym
from agentgym import Env, Task, TaskSet, Transition
from agentgym.env import ForkMode
from agentgym.errors import EnvironmentFailed, ForkUnsupported, UnknownName, UsageError
from agentgym.task import of_list
from agentgym.testing import AskEnv, ColourEnv, CrashEnv, EchoEnv, GuessEnv, NoopEnv
from agentgym.wrappers.stack import EnvConfig

EXAMPLES = [NoopEnv, EchoEnv, AskEnv, GuessEnv, ColourEnv, CrashEnv]


class DiceEnv(Env[str]):
    """Shows a throw of the seeded die each turn; forks as told."""

    splits = ("train", "test")

    def __init__(self, fork_mode: ForkMode = "replay", *, render_mode: str | None = None) -> None:
        self.fork_mode = fork_mode  # type: ignore[misc]
        self.shut_calls = 0

    def tasks(self, split: str) -> TaskSet:
        self.require_split(split)
        return of_list(
            split, [Task(f"{split}-{i}", split, private={"answer": f"key-{i}"}) for i in range(50)]
        )

    def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        return self._throw(), {}

    def act(self, action: str) -> Transition:
        return Transition(self._throw(), 1.0, terminated=action == "end", truncated=action == "cut")

    def copy_state(self) -> Env[str]:
        return self.fresh()

    def shut(self) -> None:
        self.shut_calls += 1

    def _throw(self) -> str:
        return str(self.np_random.integers(10**9))


class MoodyEnv(DiceEnv):
    """Breaks the contract: depends on what no seed rules."""

    throws = 0

    def _throw(self) -> str:
        type(self).throws += 1
        return f"throw {self.throws}"


class Remembers(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A wrapper with state of its own, and with a reference to what it wraps."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.seen: list[str] = []
        self.base = env.unwrapped

    def step(self, action: str) -> Any:
        self.seen.append(action)
        return super().step(action)


def owned_loops() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "agentgym-env-loop"]


# Gymnasium ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXAMPLES)
def test_gymnasiums_checker_passes(kind: type[Env[Any]]) -> None:
    name = f"tests/{kind.__name__}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, f"agentgym.testing:{kind.__name__}")
    env = gymnasium.make(name)
    check_env(env.unwrapped)
    env.close()


def test_gymnasiums_own_wrappers_and_checker_pass_over_it() -> None:
    env = gymnasium.wrappers.TimeLimit(EchoEnv(turns=3), 2)
    # Gymnasium warns about any wrapped environment, and about one without an id.
    with pytest.warns(UserWarning, match=r"different from the unwrapped|not having a spec"):
        check_env(env)
    env.reset(seed=0)
    assert env.step("x")[3] is False
    assert env.step("x")[3] is True
    env.close()


def test_gymnasiums_checker_passes_over_our_wrappers() -> None:
    stack = EnvConfig(
        "agentgym.testing:EchoEnv", {"turns": 3}, parser="tags", history=2, list_actions=True, max_turns=2
    )
    env = stack.build()
    with pytest.warns(UserWarning, match=r"different from the unwrapped|not having a spec"):
        check_env(env)
    env.close()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_render_shows_the_last_observation(kind: type[Env[Any]]) -> None:
    env = kind(render_mode="ansi")
    assert env.render() == ""
    env.reset(seed=0)
    assert isinstance(env.render(), str)
    assert env.render()
    env.close()


def test_an_environment_without_init_refuses_unknown_arguments() -> None:
    class Plain(EchoEnv):
        __init__ = Env.__init__

    with pytest.raises(TypeError, match="colour"):
        Plain(colour=3)


# Reset and step -----------------------------------------------------------------------------


def test_reset_tells_the_task_and_step_the_score() -> None:
    env = EchoEnv(turns=2)
    _, info = env.reset(seed=1, options={"task_id": "echo-test-3"})
    assert info["task_id"] == env.task.id == "echo-test-3"
    assert info["instruction"] == "Repeat the word."
    first, second = env.expert(env.task)
    assert env.step(first)[1:4] == (0.5, False, False)
    _, reward, terminated, _, info = env.step(second)
    assert (reward, terminated) == (0.5, True)
    assert (info["valid_action"], info["score"], info["success"]) == (True, 1.0, True)


def test_a_split_can_be_named() -> None:
    env = EchoEnv()
    drawn = {env.reset(seed=i, options={"split": "valid"})[1]["task_id"] for i in range(100)}
    assert drawn == set(env.tasks("valid").ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_id": "echo-tets-3"}, "did you mean"),
        ({"task_id": 7}, "unknown task '7'"),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"taskid": "echo-test-3"}, "did you mean 'task_id'"),
        ({3: 4}, "unknown reset option '3'"),
    ],
)
def test_reset_options_that_cannot_be(options: dict[Any, Any], message: str) -> None:
    env = EchoEnv(turns=2)
    env.reset(seed=0)
    task, state = env.task, env.np_random.bit_generator.state
    with pytest.raises(UnknownName, match=message):
        env.reset(seed=5, options=options)
    assert env.task is task, "a refused reset leaves the episode as it was"
    assert env.np_random.bit_generator.state == state
    env.step("x")


def test_an_empty_split_says_so() -> None:
    class Empty(EchoEnv):
        sizes = {"train": 0, "valid": 0, "test": 1}  # noqa: RUF012

    with pytest.raises(UsageError, match="split 'train' has no tasks"):
        Empty().reset(seed=0)


def test_order_of_calls() -> None:
    env = EchoEnv()
    with pytest.raises(UsageError, match="no task yet"):
        _ = env.task
    with pytest.raises(UsageError, match=r"reset\(\) first"):
        env.step("x")
    env.reset(seed=0)
    env.step("x")
    with pytest.raises(UsageError, match="needs a running episode"):
        env.step("x")
    env.reset(seed=0)
    with pytest.raises(UsageError, match="an action is a str, not int"):
        env.step(3)  # type: ignore[arg-type]
    env.step("still alive")


def test_a_begin_that_failed_leaves_no_episode() -> None:
    env = CrashEnv()
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="on command"):
        env.reset(options={"task_id": "begin-raise"})
    with pytest.raises(UsageError, match="needs a running episode"):
        env.step("ok")
    env.reset(seed=0)
    env.step("ok")


@given(st.lists(st.text(st.characters()), max_size=6))
def test_no_action_is_an_exception(actions: list[str]) -> None:
    for env in (NoopEnv(turns=7), EchoEnv(turns=7), GuessEnv(), ColourEnv()):
        env.reset(seed=0)
        for action in actions:
            observation, _, terminated, truncated, info = env.step(action)
            assert env.observation_space.contains(observation)
            assert isinstance(info["valid_action"], bool)
            if terminated or truncated:  # a wild action may be the right one
                env.reset(seed=0)
        env.close()


# Seeds --------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**63 - 1))
@settings(max_examples=30)
def test_same_task_seed_and_actions_give_the_same_episode(seed: int) -> None:
    one, two = DiceEnv(), DiceEnv()
    first, info = one.reset(seed=seed)
    two.reset(seed=3)
    two.step("anything")
    again, _ = two.reset(seed=seed, options={"task_id": info["task_id"]})
    assert first == again, "drawn or named, the task begins in the same state"
    assert [one.step("a")[0] for _ in range(5)] == [two.step("a")[0] for _ in range(5)]


def test_seeds_draw_tasks_evenly() -> None:
    env = DiceEnv()
    drawn = [env.reset(seed=seed)[1]["task_id"] for seed in range(1000)]
    assert len(set(drawn)) == 50
    assert max(drawn.count(i) for i in set(drawn)) < 45
    following = {env.reset()[1]["task_id"] for _ in range(200)}
    assert len(following) > 40, "without a seed the draws go on"


# Fork ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["copy", "replay"])
@pytest.mark.parametrize("seed", [None, 4])
def test_a_fork_goes_on_alike_and_apart(mode: ForkMode, seed: int | None) -> None:
    env = DiceEnv(mode)
    env.reset()
    env.reset(seed=seed)
    env.step("a")
    twin = env.fork()
    assert twin.task == env.task
    assert twin.np_random is not env.np_random
    ahead = [env.step("b")[0] for _ in range(3)]
    assert [twin.step("b")[0] for _ in range(3)] == ahead
    assert twin.step("b")[4]["score"] == 5.0
    twin.close()
    assert env.step("end")[4]["score"] == 5.0
    grandchild = env.fork()
    with pytest.raises(UsageError, match="needs a running episode"):
        grandchild.step("b")


def test_a_fork_before_the_first_reset_is_a_fresh_one() -> None:
    twin = DiceEnv().fork()
    assert twin.reset(seed=1)[0] == DiceEnv().reset(seed=1)[0]


def test_what_cannot_be_forked_says_so() -> None:
    with pytest.raises(ForkUnsupported, match="DiceEnv cannot be forked"):
        DiceEnv("none").fork()
    with pytest.raises(ForkUnsupported, match="has no copy_state"):
        Env.copy_state(DiceEnv("copy"))
    with pytest.raises(ForkUnsupported, match=r"no agentgym\.Env"):
        agentgym.fork(gymnasium.make("CartPole-v1"))


def test_a_replay_that_does_not_reproduce_is_a_failure_of_the_environment() -> None:
    env = MoodyEnv()
    env.reset(seed=0)
    env.step("a")
    with pytest.raises(EnvironmentFailed, match="replaying 1 actions of"):
        env.fork()


def test_a_replay_that_ends_early_is_a_failure_of_the_environment() -> None:
    class Impatient(DiceEnv):
        made = 0

        def __init__(self) -> None:
            super().__init__()
            type(self).made += 1
            self.patience = 5 if self.made == 1 else 1

        def act(self, action: str) -> Transition:
            self.patience -= 1
            return Transition("same", terminated=self.patience == 0)

    env = Impatient()
    env.reset(seed=0)
    env.step("a")
    env.step("a")
    with pytest.raises(EnvironmentFailed, match="replaying 2 actions"):
        env.fork()


def test_a_fork_forks_the_whole_stack() -> None:
    env = Remembers(gymnasium.wrappers.TimeLimit(DiceEnv(), 3))
    env.reset(seed=0)
    env.step("a")
    twin = agentgym.fork(env)
    assert isinstance(twin, Remembers)
    assert twin.base is twin.unwrapped
    assert twin.unwrapped is not env.unwrapped
    assert twin.step("b")[0] == env.step("b")[0]
    twin.step("c")
    assert (env.seen, twin.seen) == (["a", "b"], ["a", "b", "c"])
    assert env.step("d")[3] is True, "the time limit counted its own turns only"


def test_a_wrapper_may_fork_itself() -> None:
    class Own(gymnasium.Wrapper[Any, Any, Any, Any]):
        lock = threading.Lock()

        def fork_wrapper(self, inner: gymnasium.Env[Any, Any]) -> Own:
            return Own(inner)

    env = Own(DiceEnv())
    env.lock = threading.Lock()
    env.reset(seed=0)
    assert agentgym.fork(env).step("a")[0] == env.step("a")[0]


# Private fields and kept observations -------------------------------------------------------


def test_what_a_task_keeps_private_leaves_neither_through_info_nor_repr() -> None:
    env = GuessEnv()
    task = env.tasks("test")[0]
    answer = task.private["answer"]
    told = [repr(task), repr(env), *map(repr, env.reset(options={"task_id": task.id}))]
    told += [repr(env.step(guess)) for guess in ("100000", "999999", "?")]
    assert not any(answer in text for text in told)
    assert env.step(env.expert(task)[0])[4]["success"] is True
    env.close()


def test_observations_are_never_changed_after_they_were_returned() -> None:
    env = ColourEnv()
    seen = [env.reset(options={"task_id": "colour-train-red"})]
    seen.append(env.step("purple")[0::4])
    kept = copy.deepcopy(seen)
    env.reset(options={"task_id": "colour-train-blue"})
    env.step("blue")
    for (observation, info), (was, was_info) in zip(seen, kept, strict=True):
        assert observation["text"] == was["text"]
        assert np.array_equal(observation["screenshot"], was["screenshot"])
        assert info == was_info


def test_nothing_is_built_that_was_not_asked_for() -> None:
    env = ColourEnv(observe=("text",))
    observation, _ = env.reset(seed=0)
    assert observation == {"text": "Look."}
    assert len(env.content(observation)) == 1
    both = ColourEnv()
    _, image = both.content(both.reset(seed=0)[0])
    assert image.data.startswith(b"\x89PNG")  # type: ignore[union-attr]


# Close --------------------------------------------------------------------------------------


def test_close_twice_shuts_once() -> None:
    env = DiceEnv()
    env.reset(seed=0)
    env.close()
    env.close()
    assert env.shut_calls == 1
    with pytest.raises(UsageError, match="is closed"):
        env.reset()
    with pytest.raises(UsageError):
        env.step("a")


def test_close_before_reset() -> None:
    for kind in EXAMPLES:
        kind().close()


# The async form -----------------------------------------------------------------------------


class Failing(GuessEnv):
    async def act(self, action: str) -> Transition:
        await asyncio.sleep(0)
        raise LookupError(action)

    async def shut(self) -> None:
        await asyncio.sleep(0)
        raise OSError("cannot shut")


def test_an_async_environment_works_without_a_loop_and_leaves_no_thread() -> None:
    before = owned_loops()
    env = GuessEnv()
    env.reset(seed=0)
    assert env.step("500000")[0] in ("higher", "lower")
    assert len(owned_loops()) == len(before) + 1
    env.close()
    env.close()
    assert owned_loops() == before


def test_an_exception_goes_through_the_owned_loop_and_leaves_no_thread() -> None:
    before = owned_loops()
    env = Failing()
    env.reset(seed=0)
    for _ in range(2):
        with pytest.raises(LookupError, match="boom"):
            env.step("boom")
    with pytest.raises(OSError, match="cannot shut"):
        env.close()
    env.close()
    assert owned_loops() == before


def test_the_sync_form_works_inside_a_running_loop() -> None:
    async def main() -> str:
        env = GuessEnv()
        env.reset(seed=0)
        answer: str = env.step("no number")[0]
        env.close()
        return answer

    assert asyncio.run(main()) == "That is no number."


@pytest.mark.parametrize("kind", EXAMPLES)
def test_both_forms_give_the_same_episode(kind: type[Env[Any]]) -> None:
    actions = ["x", "500000", "apple", "red", "stop", "y"]

    def play() -> list[Any]:
        env = kind()
        task = env.tasks("train")[0].id
        seen: list[Any] = [repr(env.reset(seed=2, options={"task_id": task}))]
        for action in actions:
            result = env.step(action)
            seen.append(repr(result))
            if result[2] or result[3]:
                break
        env.close()
        return seen

    async def play_on_loop() -> list[Any]:
        env = kind()
        task = env.tasks("train")[0].id
        seen: list[Any] = [repr(await env.areset(seed=2, options={"task_id": task}))]
        for action in actions:
            result = await env.astep(action)
            seen.append(repr(result))
            if result[2] or result[3]:
                break
        await env.aclose()
        await env.aclose()
        return seen

    assert asyncio.run(play_on_loop()) == play()


def test_many_async_environments_wait_together() -> None:
    async def main() -> float:
        envs = [GuessEnv(delay=0.05) for _ in range(100)]
        loop = asyncio.get_running_loop()
        start = loop.time()
        await asyncio.gather(*(env.areset(seed=0) for env in envs))
        await asyncio.gather(*(env.astep("1") for env in envs))
        return loop.time() - start

    assert asyncio.run(main()) < 2.0  # one after another: 10 s


def test_aclose_ends_a_loop_that_the_sync_form_opened() -> None:
    before = owned_loops()
    env = GuessEnv()
    env.reset(seed=0)
    asyncio.run(env.aclose())
    assert owned_loops() == before


def test_experts_solve() -> None:
    for kind in EXAMPLES:
        env = kind()
        for task in env.tasks("train")[:4]:
            env.reset(options={"task_id": task.id})
            actions: Sequence[str] = env.expert(task) or ()
            assert [env.step(action) for action in actions][-1][4]["success"] is True
        env.close()
