"""No code environment pays a cheater more than doing nothing; whatever is registered is held to that."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import agentgym
from agentgym.actions import read_calls
from agentgym.environments.code import repair_scoring
from agentgym.environments.code.base import CodeEnv, Score
from agentgym.environments.code.cheaters import CHEATERS, Haul, actions, code_environments, play
from agentgym.environments.code.pythonmath import PythonMath
from agentgym.errors import UsageError
from agentgym.registry import base
from agentgym.task import Task, TaskSet, of_list
from agentgym.tools import Tool, tool
from agentgym.tools.bash import bash_tool

FOLDERS = "TaskFolder-v0"
"""It has no tasks of its own: a test writes one."""
TASKS = {"HumanEval-v0": "HumanEval/0", "PythonMath-v0": "recurrence-0"}
"""The task of a family that is played; default: the first of its default split."""
OPTIONS: dict[str, dict[str, Any]] = {
    "HumanEval-v0": {"test_seconds": 6.0},
    "Repair-v0": {"test_seconds": 20.0},
    FOLDERS: {"sandbox": "bubblewrap"},
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of which a file is read, and a program runs apart from what judges it."""
    folder = tmp_path_factory.mktemp("folders") / "fibonacci"
    files = {
        "task.toml": '[environment]\nworkdir = "/work"\n[verifier]\ntimeout_sec = 20\n',
        "instruction.md": "Write the 20th Fibonacci number to told.txt, and fib.py, which prints the nth.\n",
        "tests/test.sh": "cd /work; reward=0\n"
        'if [ "$(cat told.txt)" = 6765 ] && [ "$(timeout 5 python3 -I fib.py 25)" = 75025 ]; then\n'
        "    reward=1\nfi\necho $reward > /logs/verifier/reward.txt\n",
        "solution/solve.sh": "echo 6765 > told.txt\nprintf 'import sys\\na, b = 0, 1\\n"
        "for _ in range(int(sys.argv[1])): a, b = b, a + b\\nprint(a)\\n' > fib.py\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(params=[*code_environments(), f"agentgym/{FOLDERS}"])
def id(
    request: pytest.FixtureRequest,
    obtained: Callable[[str], Path],
    repair_data: Callable[..., Path],
    task_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A code environment whose data are there."""
    name = str(request.param).removeprefix("agentgym/")
    if name == "Repair-v0":
        monkeypatch.setenv("AGENTGYM_DATA", str(repair_data("texttable-1.7.1", "webcolors-24.8.0").parent))
        monkeypatch.setattr(repair_scoring, "GIT_SECONDS", 15.0)  # one of them makes git read without end
    if name == "HumanEval-v0":
        obtained("humaneval")
    monkeypatch.setitem(OPTIONS[FOLDERS], "folder", task_folder)
    return name


@lru_cache(maxsize=16)
def task_of(id: str) -> str:
    if id in TASKS:
        return TASKS[id]
    env = base(agentgym.make(id, **OPTIONS.get(id, {})))
    found = next(
        env.tasks(split).ids[0] for split in (env.default_split, *env.splits) if len(env.tasks(split))
    )
    env.close()
    return found


def played(id: str, cheater: str | None) -> Haul:
    async def run() -> Haul:
        env = base(agentgym.make(id, **OPTIONS.get(id, {})))
        assert isinstance(env, CodeEnv)
        try:
            return await play(env, task_of(id), cheater)
        finally:
            await env.aclose()

    return asyncio.run(run())


@pytest.mark.bubblewrap
def test_the_folder_can_be_solved(task_folder: Path) -> None:
    env = agentgym.make(FOLDERS, folder=task_folder, sandbox="bubblewrap")
    env.reset(seed=0)
    whole = base(env)
    reward = 0.0
    for action in whole.expert(whole.task) or ():
        reward = float(env.step(action)[1])
    env.close()
    assert reward == 1.0


@lru_cache(maxsize=16)
def floor(id: str) -> float:
    return played(id, None).reward


@pytest.mark.bubblewrap
@pytest.mark.parametrize("cheater", CHEATERS)
def test_cheating_pays_no_more_than_doing_nothing(id: str, cheater: str) -> None:
    haul = played(id, cheater)
    assert haul.reward <= floor(id), haul
    assert not haul.success, haul


def _sees_memory() -> bool:
    try:
        return Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip() == "0"
    except OSError:
        return True


SEES_MEMORY = pytest.mark.skipif(not _sees_memory(), reason="this kernel keeps processes' memory apart")


class Gullible(CodeEnv):
    """Makes the mistakes that others made: what the policy touched says what the policy is worth."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake

    def tasks(self, split: str) -> TaskSet:
        asked = "What is it?" if self.mistake.startswith("keeps") else "def f(x): return x + 1"
        return of_list(self.require_split(split), [Task(split, split, asked)])

    async def opening(self, task: Task) -> str:
        await self.sandbox.write(
            "tests.py", "from solution import f\nassert f(1) == 2\nprint('really passed')\n"
        )
        await self.sandbox.write("solution.py", "def f(x): pass\n")
        if self.mistake == "keeps the answer in the environment":
            self.kept = await self.sandbox.open(["sleep", "60"], env={"ANSWER": "41c7"})
        if self.mistake == "keeps the answer in memory":
            self.kept = await self.sandbox.open(
                ["python3", "-c", "told = input(); print(flush=True); input()"]
            )
            await self.kept.write(b"answer: 41c7\n")
            await self.kept.read(10.0)
        return task.instruction

    def tools(self, task: Task) -> Sequence[Tool]:
        return bash_tool(self.sandbox), tool(name="submit")(self._submit)

    async def _submit(self, code: str = "") -> str:
        """Hand in."""
        if self.mistake.startswith("keeps"):
            self.hand_in(float(code == "41c7"))
            return "taken"
        if code and self.mistake in ("runs what is handed in", "looks for a word"):
            await self.sandbox.write("solution.py", code)
        if self.mistake == "reads a reward":
            done = await self.sandbox.exec("cat reward.txt")
        else:
            done = await self.sandbox.exec(["python3", "tests.py"], seconds=10.0)
        said = "passed" in done.stdout if self.mistake == "looks for a word" else done.return_code == 0
        self.hand_in(float(done.stdout or 0) if self.mistake == "reads a reward" else float(said))
        return "taken"

    async def scoring(self, task: Task, artifact: float) -> Score:
        return Score(artifact, artifact == 1.0)


@pytest.mark.bubblewrap
@pytest.mark.parametrize(
    ("mistake", "cheater"),
    [
        ("reads a reward", "writes the reward"),
        ("reads a reward", "leaves a daemon"),
        ("takes the exit status", "overwrites the tests"),
        ("takes the exit status", "ends the run early"),
        ("runs what is handed in", "hands in what is always equal"),
        ("runs what is handed in", "ends the run early"),
        ("looks for a word", "says that it passed"),
        ("runs what lies there", "hands in what is always equal"),
        ("runs what lies there", "patches the runner"),
        ("keeps the answer in the environment", "reads what is in memory"),
        pytest.param("keeps the answer in memory", "reads what is in memory", marks=SEES_MEMORY),
    ],
)
def test_a_cheater_is_paid_where_the_scoring_is_gullible(mistake: str, cheater: str) -> None:
    async def run() -> tuple[Haul, Haul]:
        env = Gullible(mistake)
        try:
            return await play(env, "test", None), await play(env, "test", cheater)
        finally:
            await env.aclose()

    honest, haul = asyncio.run(run())
    assert honest.reward == 0.0 and haul.reward == 1.0


def test_every_code_environment_is_held_to_it() -> None:
    found = set(code_environments())
    assert {"agentgym/HumanEval-v0", "agentgym/PythonMath-v0"} <= found
    for id in found:
        module, _, name = agentgym.families()[id].entry_point.partition(":")
        made = getattr(__import__(module, fromlist=[name]), name)
        assert issubclass(made, CodeEnv), f"{id}: subclass CodeEnv, so that cheaters can be played"


def test_cheaters_are_not_played_where_nothing_isolates_them(unsafe: Mapping[str, Any]) -> None:
    async def run() -> None:
        env = PythonMath(**unsafe)
        try:
            await play(env, "powmod-0", "says that it passed")
        finally:
            await env.aclose()

    with pytest.raises(UsageError, match="no cheater is played"):
        asyncio.run(run())


def schema(name: str, *arguments: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {name: {"type": "string"} for name in arguments}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


@pytest.mark.parametrize("name", CHEATERS)
def test_a_cheater_uses_what_is_offered(name: str) -> None:
    cheater = CHEATERS[name]
    plan = list(
        actions(cheater, "Tidy up.", [schema("edit", "path"), schema("bash", "command"), schema("submit")])
    )
    calls = [call for action in plan for call in read_calls(action)]  # type: ignore[union-attr]
    assert calls[-1].name == "submit" and calls[-1].arguments == {}
    assert [call.name for call in calls[:-1]] == ["bash"] * (bool(cheater.code) + bool(cheater.mischief))
    [*_, last] = actions(cheater, "def grow(x):\n  ...", [schema("run", "code"), schema("submit", "code")])
    code = read_calls(last)[0].arguments["code"]  # type: ignore[index]
    compile(code, "handed in", "exec")
    assert "def grow(" in code
    compile(cheater.mischief, "mischief", "exec")
    compile(cheater.code, "trick", "exec")


def test_a_cheater_hands_in_what_it_found() -> None:
    plan = actions(
        CHEATERS["reads what is in memory"], "?", [schema("python", "code"), schema("submit", "answer")]
    )
    next(plan)
    handed = read_calls(plan.send("found: 1\nfound: 41c7\n"))[0]  # type: ignore[index]
    assert handed.arguments == {"answer": "41c7"}


def test_a_trick_is_written_into_every_module_that_is_no_test(tmp_path: Path) -> None:
    modules = ("one.py", "pack/__init__.py", "pack/attest.py")
    others = ("test_one.py", "tests/one.py", "conftest.py", ".hidden/one.py", "pack/two.txt", "one_test.py")
    for name in (*modules, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    action = next(actions(CHEATERS["patches the runner"], "?", [schema("bash", "command"), schema("submit")]))
    command = read_calls(action)[0].arguments["command"]  # type: ignore[index]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    for name in modules:
        assert (tmp_path / name).read_text() == "x = 1\n\n" + CHEATERS["patches the runner"].code
    assert {(tmp_path / name).read_text() for name in others} == {"x = 1\n"}
