"""Each broken environment breaks the contract in one way, and the check says which."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest

from agentgym import Env, Task, TaskSet, Transition
from agentgym.check import Finding, Report, check
from agentgym.contract import GARBAGE, ITEMS
from agentgym.env import ForkMode, Worker
from agentgym.errors import MissingDependency, UnknownName, UsageError
from agentgym.registry import register
from agentgym.task import of_list


class Door(Env[str]):
    """Say the code, which ``knock`` tells digit by digit. Keeps the whole contract."""

    worker: ClassVar[Worker] = "async"
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def __init__(self, *, render_mode: str | None = None) -> None:
        self.knocks: list[str] = []

    def tasks(self, split: str) -> TaskSet:
        first = 1000 if self.require_split(split) == "train" else 2000
        secrets = {n: {"code": str(n * 7919), "plan": ["knock", "open"]} for n in range(first, first + 5)}
        return of_list(split, [Task(f"door-{n}", split, "Open it.", private=p) for n, p in secrets.items()])

    def begin(self, task: Task) -> Any:
        self.knocks = []
        return f"A door of kind {self.np_random.integers(1000)}.", {"admissible_actions": ["knock", "wait"]}

    def act(self, action: str) -> Any:
        code = self.task.private["code"]
        if action == code:
            return Transition("open", 1.0, True, info={"success": True})
        if action == "knock":
            self.knocks.append(action)
            told = code[len(self.knocks) % len(code)]
            return Transition(f"{told}, {self.np_random.integers(1000)}", info={"digit": told})
        return Transition("no", info={"valid_action": action in ("knock", "wait")})

    def expert(self, task: Task) -> Sequence[str] | None:
        return ["knock", str(task.private["code"])]


class NoVersion(Door):
    version = ""


class StrangeWorker(Door):
    worker = "fiber"  # type: ignore[assignment]


class SharedTasks(Door):
    def tasks(self, split: str) -> TaskSet:
        tasks = super().tasks("train")
        return TaskSet(self.require_split(split), tasks.ids, lambda i: Task(i, split))


class AnySplit(Door):
    def require_split(self, split: str) -> str:
        return split


class ForgetfulTasks(Door):
    built = 0

    def tasks(self, split: str) -> TaskSet:
        ids = super().tasks(split).ids
        return TaskSet(split, ids, self._build_any)

    def _build_any(self, task_id: str) -> Task:
        type(self).built += 1
        return Task(task_id, "train" if task_id < "door-2" else "test", f"number {self.built}")

    def act(self, action: str) -> Transition:
        return Transition("no")

    def expert(self, task: Task) -> None:
        return None


class NarrowActions(Door):
    action_space = gymnasium.spaces.Text(10)


class OutsideSpace(Door):
    observation_space = gymnasium.spaces.Text(3)


class NumpyInfo(Door):
    def act(self, action: str) -> Any:
        return super().act(action)._replace(info={"valid_action": np.bool_(True)})


class EndlessReward(Door):
    def act(self, action: str) -> Any:
        return super().act(action)._replace(reward=float("inf"))


class Moody(Door):
    def begin(self, task: Task) -> Any:
        return f"A door, {os.urandom(4).hex()}.", {}


class Fragile(Door):
    def act(self, action: str) -> Any:
        if action.startswith("{"):
            json.loads(action)
        return super().act(action)


class Shouts(Door):
    def act(self, action: str) -> Any:
        if "\ud83d" in action:
            raise ValueError(action)
        return super().act(action)


class Quitter(Door):
    def act(self, action: str) -> Any:
        if "\x00" in action:
            sys.exit("NUL")
        return super().act(action)


class SiameseFork(Door):
    fork_mode: ClassVar[ForkMode] = "copy"

    def copy_state(self) -> Env[str]:
        made = self.fresh()
        made.knocks = self.knocks  # type: ignore[attr-defined]
        return made


class Scribbles(Door):
    def begin(self, task: Task) -> Any:
        self.listed = ["knock", "wait"]
        return "A door.", {"admissible_actions": self.listed}

    def act(self, action: str) -> Any:
        self.listed.append(action)
        return super().act(action)


class TellsInInfo(Door):
    def begin(self, task: Task) -> Any:
        return "A door.", {"hidden": [{"note": f"the code is {task.private['code']}."}]}


class TellsThePlan(Door):
    def begin(self, task: Task) -> Any:
        return "A door. Plan: 1. knock 2. open", {}


class TellsInRepr(Door):
    def __repr__(self) -> str:
        return f"Door({self._task.private['code']})" if self._task else "Door()"


class TellsInMetadata(Door):
    def tasks(self, split: str) -> TaskSet:
        tasks = [Task(t.id, t.split, t.instruction, dict(t.private), t.private) for t in super().tasks(split)]
        return of_list(split, tasks)


class FalseExpert(Door):
    def expert(self, task: Task) -> Sequence[str]:
        return ["knock"]


class TwoFaced(Door):
    async def act(self, action: str) -> Transition:
        on_owned_loop = threading.current_thread().name == "agentgym-env-loop"
        await asyncio.sleep(0)
        transition: Transition = super().act(action)
        return transition._replace(reward=1.0 if on_owned_loop else 0.0)


class ClosesOnce(Door):
    def close(self) -> None:
        if self._closed:
            raise RuntimeError("already closed")
        super().close()


class LeaksThread(Door):
    stop: ClassVar[threading.Event] = threading.Event()

    def begin(self, task: Task) -> Any:
        threading.Thread(target=self.stop.wait, daemon=True).start()
        return super().begin(task)


class LeaksDescriptor(Door):
    opened: ClassVar[list[int]] = []

    def begin(self, task: Task) -> Any:
        self.opened.append(os.open(os.devnull, os.O_RDONLY))
        return super().begin(task)


class LeaksChild(Door):
    children: ClassVar[list[subprocess.Popen[bytes]]] = []

    def begin(self, task: Task) -> Any:
        if len(self.children) < 60:
            self.children.append(subprocess.Popen(["sleep", "60"]))
        return super().begin(task)


class NoRenderMode(Door):
    def __init__(self) -> None:
        self.knocks = []


class Hangs(Door):
    stop: ClassVar[threading.Event] = threading.Event()

    def act(self, action: str) -> Any:
        self.stop.wait(60)
        return super().act(action)


BROKEN = [
    (NoVersion, "declaration", "version"),
    (StrangeWorker, "declaration", "worker is 'fiber'"),
    (SharedTasks, "splits", "'door-1000' is in 'train' and in 'test'"),
    (AnySplit, "splits", "tasks() of an unknown split was accepted"),
    (ForgetfulTasks, "task lookup", "not the same every time"),
    (NarrowActions, "spaces", "the action space refuses"),
    (OutsideSpace, "spaces", "not in the space"),
    (NumpyInfo, "info", "info['valid_action'] of step() is a bool"),
    (EndlessReward, "info", "reward is inf"),
    (Moody, "determinism", "observation of turn 0 differs"),
    (Fragile, "garbage actions", "raised JSONDecodeError"),
    (SiameseFork, "fork independence", "after other steps"),
    (Scribbles, "observations kept", "was changed later"),
    (TellsInInfo, "private fields", "the info of turn 0"),
    (TellsThePlan, "private fields", "private 'plan'"),
    (TellsInRepr, "private fields", "repr(env)"),
    (TellsInMetadata, "private fields", "the metadata"),
    (FalseExpert, "expert", "1 expert actions do not solve"),
    (TwoFaced, "async form", "reward of turn 1 differs"),
    (ClosesOnce, "close", "already closed"),
    (LeaksThread, "leaks", "threads"),
    (LeaksDescriptor, "leaks", "file descriptors"),
    (LeaksChild, "leaks", "child processes"),
    (NoRenderMode, "gymnasium", "render_mode"),
]


def path_of(kind: type[Env[Any]]) -> str:
    return f"{__name__}:{kind.__name__}"


def finding(report: Report, name: str) -> Finding:
    return next(f for f in report.findings if f.name == name)


@pytest.fixture(autouse=True)
def cleanup() -> Any:
    LeaksThread.stop.clear()
    Hangs.stop.clear()
    yield
    LeaksThread.stop.set()
    Hangs.stop.set()
    while LeaksDescriptor.opened:
        os.close(LeaksDescriptor.opened.pop())
    for child in LeaksChild.children:
        child.kill()
        child.wait()


def test_an_environment_that_keeps_the_contract() -> None:
    report = check(path_of(Door))
    assert report.ok
    assert [f.name for f in report.findings] == list(ITEMS)
    assert [f for f in report.findings if f.ok is not True] == []


@pytest.mark.parametrize("name", ["NoopEnv", "EchoEnv", "GuessEnv", "ColourEnv"])
def test_the_testing_environments_keep_it(name: str) -> None:
    report = check(f"agentgym.testing:{name}", episodes=6)
    assert [f for f in report.findings if f.ok is False] == []


@pytest.mark.parametrize(("kind", "item", "detail"), BROKEN, ids=[k.__name__ for k, _, _ in BROKEN])
def test_a_broken_environment(kind: type[Env[Any]], item: str, detail: str) -> None:
    report = check(path_of(kind))
    found = finding(report, item)
    assert found.ok is False
    assert detail in found.detail
    assert found.hint
    assert not report.ok


def test_one_failure_does_not_hide_the_next() -> None:
    report = check(path_of(Fragile))
    assert [f.name for f in report.findings if f.ok is False] == ["garbage actions"]
    assert len(report.findings) == len(ITEMS)


def test_a_hang_is_found_within_the_time() -> None:
    report = check(path_of(Hangs), seconds=1.0)
    assert report.seconds < 5
    unfinished = [f for f in report.findings if f.ok is False]
    assert [f.name for f in unfinished] == ["spaces"]
    assert "unfinished when the 1 s" in unfinished[0].detail
    assert finding(report, "leaks").ok is None


def test_an_exit_is_a_finding_too() -> None:
    found = finding(check(path_of(Quitter)), "garbage actions")
    assert found.ok is False
    assert "NUL raised SystemExit" in found.detail


def test_a_finding_can_always_be_written() -> None:
    found = finding(check(path_of(Shouts)), "garbage actions")
    assert "ValueError: go \\ud83d north" in found.detail
    assert found.detail.encode()


def test_what_does_not_apply_says_why() -> None:
    report = check("agentgym.testing:ColourEnv")
    assert finding(report, "private fields").ok is None
    assert "no sampled task has private fields" in finding(report, "private fields").detail
    assert finding(report, "async form").ok is None


def test_a_registered_id_with_arguments() -> None:
    register("tests/CheckedEcho-v0", "agentgym.testing:EchoEnv")
    report = check("tests/CheckedEcho-v0", kwargs={"turns": 4}, episodes=2, seed=9)
    assert report.ok
    document = json.loads(json.dumps(report.to_json()))
    assert document["env"] == "tests/CheckedEcho-v0"
    assert document["kwargs"] == {"turns": 4}
    assert (document["seed"], document["episodes"], document["ok"]) == (9, 2, True)
    assert set(document["findings"][0]) == {"name", "ok", "detail", "hint", "seconds"}


def test_the_same_check_finds_the_same() -> None:
    reports = [check("agentgym.testing:GuessEnv", seed=4) for _ in range(2)]
    one, two = ([(f.name, f.ok, f.detail) for f in report.findings] for report in reports)
    assert one == two


def test_what_cannot_be_checked() -> None:
    with pytest.raises(UnknownName, match="TextWorld-Cooking-v0"):
        check("TextWorld-Coking-v0")
    with pytest.raises(UnknownName, match="'turns'"):
        check("agentgym.testing:EchoEnv", kwargs={"turn": 1})
    with pytest.raises(UsageError, match=r"no agentgym\.Env"):
        check("CartPole-v1")
    with pytest.raises(UsageError, match="at least one task"):
        check("agentgym.testing:EchoEnv", episodes=0)


def test_the_garbage_is_wild() -> None:
    texts = list(GARBAGE.values())
    assert len(set(texts)) == len(texts)
    assert "" in texts
    assert max(map(len, texts)) >= 100_000
    assert any("\x00" in text for text in texts)
    assert any(not text.isascii() for text in texts)
    with pytest.raises(UnicodeEncodeError):
        GARBAGE["a lone surrogate"].encode()


@pytest.mark.slow
def test_textworld_keeps_the_contract() -> None:
    pytest.importorskip("textworld")
    try:
        report = check("agentgym/TextWorld-CoinCollector-v0")
    except MissingDependency as missing:
        pytest.skip(str(missing))
    assert [f for f in report.findings if f.ok is False] == []
