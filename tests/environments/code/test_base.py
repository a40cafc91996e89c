"""What every code environment has from its base class, shown on the smallest one."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import agentgym
from agentgym.actions import write_calls
from agentgym.environments.code import backends
from agentgym.environments.code.base import CALLS, CodeEnv, Score
from agentgym.errors import EnvironmentFailed, SandboxFailed, UnknownName, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import SandboxEnded, SandboxSpec, records
from agentgym.sandboxes.process import ProcessBackend
from agentgym.task import Task, TaskSet, of_list
from agentgym.tools import Tool, ToolError, tool

UNSAFE = {"sandbox": "process", "sandbox_options": {"unsafe": True}}


class Counting(CodeEnv):
    """Leave a file ``answer`` that holds 42."""

    restarts = False
    scored_in: str = ""

    def tasks(self, split: str) -> TaskSet:
        return of_list(self.require_split(split), [Task(f"count-{split}", split, "Write 42 into answer.")])

    async def opening(self, task: Task) -> str:
        await self.sandbox.write("notes", "keep calm\n")
        return task.instruction

    def tools(self, task: Task) -> Sequence[Tool]:
        return tool(name="sh")(self._sh), tool(name="submit")(self._submit)

    async def _sh(self, command: str) -> str:
        """Run a command."""
        done = await self.sandbox.exec(command, seconds=self.seconds)
        if done.timed_out:
            raise ToolError("that took too long")
        return done.stdout + done.stderr

    async def _submit(self) -> str:
        """End the task."""
        self.hand_in(await self.sandbox.read("answer"))
        return "done"

    async def unsubmitted(self) -> Any:
        done = await self.sandbox.exec("cat answer")
        return done.stdout.encode() if done.ok else None

    async def restart(self, why: str) -> str | None:
        if not self.restarts:
            return None
        await self.renew()
        return "A new sandbox was started."

    async def scoring(self, task: Task, artifact: bytes) -> Score:
        async with self.fresh_sandbox() as judge:
            self.scored_in = judge.id
            await judge.write("artifact", artifact)
            if artifact == b"end it":
                raise SandboxEnded("the artifact ended it")
            done = await judge.exec("cat artifact; ls")
            right = done.stdout.startswith("42")
            return Score(float(right), right, info={"files": done.stdout.split()})

    def expert(self, task: Task) -> Sequence[str]:
        return [call("sh", command="echo 42 > answer"), call("submit")]


def call(name: str, **arguments: Any) -> str:
    return write_calls([ToolCall(name, arguments)])


@pytest.fixture
def env() -> Iterator[Counting]:
    made = Counting(**UNSAFE)
    yield made
    made.close()


def test_an_episode_is_scored_in_a_sandbox_that_the_policy_never_entered(env: Counting) -> None:
    observation, info = env.reset(seed=0)
    assert observation == "Write 42 into answer."
    assert [schema["function"]["name"] for schema in info["tools"]] == ["sh", "submit"]
    mine = env.sandbox
    observation, reward, terminated, truncated, info = env.step(call("sh", command="cat notes"))
    assert (observation, reward, terminated, truncated) == ("keep calm\n", 0.0, False, False)
    assert info["valid_action"] and info["role"] == "tool"
    for action in env.expert(env.task):
        observation, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert info["files"] == ["42", "artifact"]
    assert env.scored_in and env.scored_in != mine.id
    with pytest.raises(UsageError, match="closed"):
        asyncio.run(mine.read("notes"))


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("", "The answer is empty."),
        ("I give up", "The tools are sh, submit."),
        ('{"name": "sh"', "JSON"),
        (call("fly"), "there is no tool 'fly'"),
        (call("sh", cmd="ls"), "command: Field required"),
        (write_calls([ToolCall("sh", {"command": "true"})] * (CALLS + 1)), f"at most {CALLS} calls"),
    ],
)
def test_what_cannot_be_taken_is_answered(env: Counting, action: str, said: str) -> None:
    env.reset(seed=0)
    observation, reward, terminated, _, info = env.step(action)
    assert said in observation
    assert (reward, terminated, info["valid_action"]) == (0.0, False, False)


def test_several_calls_are_one_turn_and_the_one_that_hands_in_is_the_last(env: Counting) -> None:
    env.reset(seed=0)
    calls = [
        ToolCall("sh", {"command": "echo 42 > answer"}),
        ToolCall("sh", {"command": "cat answer notes"}),
        ToolCall("submit", {}),
        ToolCall("sh", {"command": "echo 43 > answer"}),
    ]
    observation, reward, *_ = env.step(write_calls(calls))
    assert (observation, reward) == ("The answer was taken.", 1.0)


def test_a_command_has_a_deadline_and_a_late_one_is_an_answer() -> None:
    env = Counting(limits={"seconds": 0.3, "memory": 64 << 20}, **UNSAFE)
    env.reset(seed=0)
    assert env.sandbox.spec.memory == 64 << 20
    observation, *_, info = env.step(call("sh", command="sleep 60"))
    assert observation == "Error: that took too long" and not info["valid_action"]
    env.close()


def test_the_last_turn_is_truncated_and_what_is_there_is_scored() -> None:
    for command, reward in (("echo 42 > answer", 1.0), ("true", 0.0)):
        env = Counting(max_steps=1, **UNSAFE)
        env.reset(seed=0)
        observation, got, terminated, truncated, info = env.step(call("sh", command=command))
        assert (observation, got, terminated, truncated) == ("", reward, False, True)
        assert info["success"] == bool(reward)
        env.close()


def test_a_policy_that_ends_its_sandbox_is_scored(env: Counting) -> None:
    env.reset(seed=0)
    observation, reward, terminated, _, info = env.step(call("sh", command="kill -9 $PPID; sleep 5"))
    assert "The sandbox has ended" in observation and info["ended"]
    assert (reward, terminated, info["success"]) == (0.0, True, False)
    env.reset(seed=0)
    assert env.step(call("sh", command="cat notes"))[0] == "keep calm\n"


def test_a_family_may_start_another_sandbox(env: Counting) -> None:
    env.restarts = True
    env.reset(seed=0)
    observation, _, terminated, _, _ = env.step(call("sh", command="kill -9 $PPID; sleep 5"))
    assert observation.endswith("A new sandbox was started.") and not terminated
    assert env.step(call("sh", command="ls"))[0] == ""


def test_an_artifact_that_ends_the_scoring_scores_nothing(env: Counting) -> None:
    env.reset(seed=0)
    env.step(call("sh", command="printf 'end it' > answer"))
    _, reward, terminated, _, info = env.step(call("submit"))
    assert (reward, terminated, info["ended"]) == (0.0, True, "the artifact ended it")


def test_what_breaks_around_a_sandbox_is_raised(env: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise SandboxFailed("no room")

    env.reset(seed=0)
    env.step(call("sh", command="echo 42 > answer"))
    monkeypatch.setattr(ProcessBackend, "start", broken)
    with pytest.raises(SandboxFailed, match="no room"):
        env.step(call("submit"))


def test_a_fork_replays(env: Counting) -> None:
    env.reset(seed=0)
    env.step(call("sh", command="echo 4 > answer"))
    other = env.fork()
    assert isinstance(other, Counting) and other.sandbox.id != env.sandbox.id
    other.step(call("sh", command="echo 42 > answer"))
    assert env.step(call("submit"))[1] == 0.0
    assert other.step(call("submit"))[1] == 1.0
    other.close()


def test_environments_of_one_loop_share_a_backend_and_the_last_one_closes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[ProcessBackend] = []
    close = ProcessBackend.aclose

    async def counted(self: ProcessBackend) -> None:
        closed.append(self)
        await close(self)

    monkeypatch.setattr(ProcessBackend, "aclose", counted)

    async def play() -> None:
        envs = [Counting(**UNSAFE) for _ in range(3)]
        assert len(await asyncio.gather(*(env.areset(seed=0) for env in envs))) == 3
        shared = {id(env._lease.backend) for env in envs if env._lease is not None}
        assert len(shared) == 1
        for env in envs:
            assert not closed
            await env.aclose()
        assert len(closed) == 1
        assert not backends._shared[asyncio.get_running_loop()]

    asyncio.run(play())


def test_environments_of_one_loop_start_few_sandboxes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    start, starting = ProcessBackend.start, 0

    async def play() -> None:
        go = asyncio.Event()

        async def counted(self: ProcessBackend, *given: Any, **named: Any) -> Any:
            nonlocal starting
            starting += 1
            await go.wait()
            return await start(self, *given, **named)

        monkeypatch.setattr(ProcessBackend, "start", counted)
        envs = [Counting(**UNSAFE) for _ in range(6)]
        resets = [asyncio.create_task(env.areset(seed=0)) for env in envs]
        for _ in range(50):
            await asyncio.sleep(0)
        assert starting == 2
        go.set()
        await asyncio.gather(*resets)
        assert starting == 6
        for env in envs:
            await env.aclose()

    asyncio.run(play())


def test_fresh_sandboxes_start_together_and_leave_nothing(
    env: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    async def scoring(task: Task, artifact: bytes) -> Score:
        async with env.fresh_sandboxes(SandboxSpec(), SandboxSpec(workdir="/other")) as (one, other):
            assert one.spec.workdir == "/work" and other.spec.workdir == "/other"
            seen.extend([one.id, other.id])
            assert set(seen) <= {record.id for record in records.listed()}
            raise SandboxEnded("on purpose")

    monkeypatch.setattr(env, "scoring", scoring)
    env.reset(seed=0)
    mine = env.sandbox.id
    env.step(call("sh", command="echo 42 > answer"))
    _, reward, terminated, _, info = env.step(call("submit"))
    assert (reward, terminated, info["ended"]) == (0.0, True, "on purpose")
    assert len({mine, *seen}) == 3
    assert not {mine, *seen} & {record.id for record in records.listed()}


def test_an_environment_may_move_to_another_loop(env: Counting) -> None:
    async def play() -> str:
        await env.areset(seed=0)
        return (await env.astep(call("sh", command="cat notes")))[0]

    before = {record.id for record in records.listed()}
    assert [asyncio.run(play()) for _ in range(2)] == ["keep calm\n"] * 2
    env.reset(seed=0)
    assert env.step(call("sh", command="cat notes"))[0] == "keep calm\n"
    # The loops that are gone took nothing along, and left nothing.
    left = {record.id for record in records.listed() if record.pid == os.getpid()} - before
    assert left == {sandbox.id for sandbox in env._open}


def test_what_an_event_loop_that_is_gone_held_is_ended_by_the_next_one(env: Counting) -> None:
    before = {record.id for record in records.listed()}
    asyncio.run(env.areset(seed=0))  # type: ignore[arg-type]
    other = env.fresh()
    other.reset(seed=0)
    left = {record.id for record in records.listed() if record.pid == os.getpid()} - before
    assert left == {sandbox.id for sandbox in other._open}  # type: ignore[attr-defined]
    other.close()
    env.close()


def test_an_environment_may_be_closed_in_the_middle_of_a_step(env: Counting) -> None:
    before = {record.id for record in records.listed()}

    async def play() -> None:
        await env.areset(seed=0)
        step = asyncio.create_task(env.astep(call("sh", command="sleep 100")))
        await asyncio.sleep(0.3)
        await env.aclose()
        await asyncio.wait([step], timeout=60)
        # That it ended is the caller's doing, and no score.
        with pytest.raises(EnvironmentFailed, match="in the middle of a step"):
            step.result()
        assert not env._open

    asyncio.run(play())
    assert {record.id for record in records.listed() if record.pid == os.getpid()} <= before


async def submitting(env: Counting) -> asyncio.Task[Any]:
    """The last step of an episode, which has handed its artifact in."""
    await env.areset(seed=0)
    await env.astep(call("sh", command="echo 42 > answer"))
    step = asyncio.create_task(env.astep(call("submit")))
    while env._handed is None:  # noqa: ASYNC110 - nobody tells when
        await asyncio.sleep(0)
    return step


def test_an_environment_that_is_closed_while_it_scores_starts_nothing_more(env: Counting) -> None:
    before = {record.id for record in records.listed()}

    async def play() -> None:
        step = await submitting(env)
        await env.aclose()
        await asyncio.wait([step], timeout=60)
        with pytest.raises(EnvironmentFailed, match="closed"):
            step.result()
        assert not env._open and not backends._shared.get(asyncio.get_running_loop())

    asyncio.run(play())
    assert {record.id for record in records.listed() if record.pid == os.getpid()} <= before


def test_a_step_that_a_reset_broke_off_has_no_score(env: Counting) -> None:
    async def play() -> None:
        await env.areset(seed=0)
        step = asyncio.create_task(env.astep(call("sh", command="sleep 100")))
        await asyncio.sleep(0.3)
        await env.areset(seed=1)
        await asyncio.wait([step], timeout=60)
        with pytest.raises(EnvironmentFailed, match="reset in the middle of a step"):
            step.result()
        assert (await env.astep(call("sh", command="cat notes")))[0] == "keep calm\n"
        await env.aclose()

    asyncio.run(play())


def test_a_scoring_that_was_broken_off_is_no_score(env: Counting) -> None:
    async def play() -> None:
        step = await submitting(env)
        step.cancel()
        await asyncio.wait([step])
        assert step.cancelled()
        with pytest.raises(EnvironmentFailed, match="was broken off"):
            await env.astep(call("submit"))
        await env.areset(seed=0)
        await env.astep(call("sh", command="echo 42 > answer"))
        assert (await env.astep(call("submit")))[1] == 1.0
        await env.aclose()

    asyncio.run(play())


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'memory'"):
        Counting(limits={"memori": 1}, **UNSAFE)
    with pytest.raises(UsageError, match="memory of a sandbox"):
        Counting(limits={"memory": 1}, **UNSAFE)
    with pytest.raises(UsageError, match="the limit seconds is 'long'"):
        Counting(limits={"seconds": "long"}, **UNSAFE)  # type: ignore[dict-item]
    for endless in (float("inf"), float("nan")):
        with pytest.raises(UsageError, match="the limit memory"):
            Counting(limits={"memory": endless}, **UNSAFE)
    for whole in ("memory", "pids", "disk", "inodes"):
        with pytest.raises(UsageError, match=f"the limit {whole} is 2.5") as fraction:
            Counting(limits={whole: 2.5}, **UNSAFE)
        assert "whole number" in str(fraction.value)
    assert Counting(limits={"pids": 64.0, "cpus": 0.5}, **UNSAFE)._limits == {"pids": 64.0, "cpus": 0.5}
    for name in ("limits", "sandbox_options"):
        with pytest.raises(UsageError, match=rf"{name} is \[1\]"):
            Counting(**{name: [1]})
    with pytest.raises(UsageError, match="isolates nothing"):
        Counting(sandbox="process").reset(seed=0)
    with pytest.raises(UnknownName, match="docker"):
        Counting(sandbox="dokcer").reset(seed=0)


def test_nop_submits_what_is_there(env: Counting) -> None:
    env.reset(seed=0)
    assert env.nop(env.task) == [call("submit")]
    with contextlib.closing(agentgym.fork(env)) as forked:
        assert forked.unwrapped is not env
