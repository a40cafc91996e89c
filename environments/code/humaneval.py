"""HumanEval over several turns: write a function, run its visible examples, mend it, submit it.

Invariant: hidden tests decide, and they run where the code cannot reach them
(:mod:`agentgym.environments.code.relay`); the same code always meets the same tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from agentgym import datasets
from agentgym.actions import write_calls
from agentgym.environments.code import humaneval_data, humaneval_run
from agentgym.environments.code.base import CodeEnv, Score, named
from agentgym.environments.code.humaneval_data import Problem, problems
from agentgym.environments.code.relay import PYTHON, relay
from agentgym.errors import UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import SandboxSpec
from agentgym.task import Task, TaskSet
from agentgym.tools import Tool, ToolError, tool

LONGEST = 100_000
"""Characters of the longest code that is taken."""

SHOWN = 4_000
"""Characters shown of what a run says, and as many of what the code prints."""

_RUN = "run_examples.py"
_SOURCE = Path(humaneval_run.__file__).read_bytes()
# One order of a set's items, so that an episode can be repeated.
_SPEC = SandboxSpec(env={"PYTHONHASHSEED": "0"}, pids=64)


class HumanEval(CodeEnv):
    """HumanEval (Chen et al., 2021): 164 functions to write.

    Args:
        folder: The data set's folder; default: ``humaneval`` on the data path.
        test_seconds: Deadline of all hidden tests of a problem together.
        sandbox: Name or import path of the sandbox backend.
        sandbox_options: Its options.
        limits: See :class:`~agentgym.environments.code.base.CodeEnv`; default: 10 ``seconds`` a run.
        max_steps: Truncate after so many turns; ``None`` never does.
        render_mode: ``ansi`` or ``None``.
    """

    splits = ("test",)
    version = "1"

    def __init__(
        self,
        *,
        folder: str | Path | None = None,
        test_seconds: float = 20.0,
        sandbox: str = "bubblewrap",
        sandbox_options: Mapping[str, Any] | None = None,
        limits: Mapping[str, float] | None = None,
        max_steps: int | None = 10,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            sandbox=sandbox,
            sandbox_options=sandbox_options,
            limits={"seconds": 10.0, **named("limits", limits)},
            max_steps=max_steps,
            render_mode=render_mode,
        )
        if not isinstance(test_seconds, int | float) or not 0 < test_seconds <= 3_600:
            raise UsageError(f"test_seconds is {test_seconds!r}", hint="give more than 0, at most 3600")
        self._folder = None if folder is None else Path(folder)
        self._test_seconds = float(test_seconds)
        self._tasks: TaskSet | None = None

    # The environment contract ---------------------------------------------------------------

    def tasks(self, split: str) -> TaskSet:
        """The 164 problems, in the benchmark's order.

        Raises:
            MissingData: They were never obtained.
            EnvironmentFailed: Their file is damaged.
        """
        self.require_split(split)
        if self._tasks is None:
            table = problems(self._folder or datasets.find(humaneval_data.NAME))
            version = f"{self.version}.{humaneval_data.WHEEL_SHA256[:12]}"
            self._tasks = TaskSet(split, list(table), lambda id: _task(split, table[id]), version=version)
        return self._tasks

    def expert(self, task: Task) -> Sequence[str]:
        """The benchmark's solution, run and submitted."""
        code = task.instruction + task.private["solution"]
        return [write_calls([ToolCall(name, {"code": code})]) for name in ("run", "submit")]

    def nop(self, task: Task) -> Sequence[str]:
        """Submit no code."""
        return [write_calls([ToolCall("submit", {"code": ""})])]

    # A code environment's parts -------------------------------------------------------------

    def sandbox_spec(self, task: Task) -> SandboxSpec:
        """See :meth:`CodeEnv.sandbox_spec`."""
        return _SPEC

    async def opening(self, task: Task) -> str:
        """The function to write."""
        count = len(task.metadata["examples"])
        examples = f"the {count} examples that its docstring gives" if count else "it once, without examples"
        return (
            f"Write this function:\n\n```python\n{task.instruction.rstrip()}\n```\n\n"
            f"Call run with the function's code to run {examples}, and whatever else the code does. Call "
            "submit with it when it is right: hidden tests decide, and that ends the task."
        )

    def tools(self, task: Task) -> Sequence[Tool]:
        """``run`` and ``submit``."""
        return tool(name="run")(self._run), tool(name="submit")(self._submit)

    async def restart(self, why: str) -> str:
        """Nothing is kept in the sandbox: there is another one."""
        await self.renew()
        return f"The sandbox has ended ({why}); a new one was started."

    async def scoring(self, task: Task, artifact: str) -> Score:
        """Whether the code passes the hidden tests."""
        if not artifact.strip():
            return _score(False, "test", 0)
        # Tests call what the prompt defines, and one (33) the function itself: there that is the solution.
        tests = f"{task.instruction}{task.private['solution']}\n{task.private['tests']}"
        async with self.fresh_sandboxes(_SPEC, _SPEC) as (judge, candidate):
            verdict = await relay(
                judge,
                candidate,
                tests=tests,
                programs=(task.instruction, artifact),
                function=task.metadata["function"],
                seconds=self._test_seconds,
            )
        return _score(verdict.passed, verdict.why, verdict.calls)

    # Its tools ------------------------------------------------------------------------------

    async def _run(
        self, code: Annotated[str, Field(description="The whole function, as Python code.")]
    ) -> str:
        """Run code and then the examples of the function's docstring, and see what fails and what it prints.

        The imports and helper functions above the function are there.
        """
        return await self._examples(_checked(code))

    def _submit(self, code: Annotated[str, Field(description="The whole function, as Python code.")]) -> str:
        """Hand in the function. Hidden tests decide; this ends the task."""
        self.hand_in(_checked(code))
        return "submitted"

    async def _examples(self, code: str) -> str:
        examples = [list(example) for example in self.task.metadata["examples"]]
        told = {"prompt": self.task.instruction, "code": code, "examples": examples}
        await self.sandbox.write(_RUN, _SOURCE)
        done = await self.sandbox.exec(
            [PYTHON, "-I", "-B", _RUN], stdin=json.dumps(told).encode(), seconds=self.seconds, limit=64 << 10
        )
        parts = [_cut(done.stderr.rstrip())] if done.stderr.strip() else []
        if done.stdout.strip():
            parts.append("It printed:\n" + _cut(done.stdout.rstrip()))
        if done.timed_out:
            parts.append(f"It was stopped after {self.seconds:g} seconds.")
        elif done.return_code and not done.ended:
            parts.append(f"It ended with status {done.return_code}.")
        return "\n\n".join(parts)


def _task(split: str, problem: Problem) -> Task:
    return Task(
        problem.id,
        split,
        problem.prompt,
        {
            "function": problem.function,
            "examples": tuple((example.source, example.want) for example in problem.examples),
        },
        {"solution": problem.solution, "tests": problem.tests},
    )


def _score(passed: bool, why: str, calls: int) -> Score:
    told = "The hidden tests passed." if passed else "The hidden tests did not pass."
    return Score(float(passed), passed, told, {"failure": why, "calls": calls})


def _checked(code: str) -> str:
    if len(code) > LONGEST:
        raise ToolError(f"the code has {len(code)} characters, and {LONGEST} are taken")
    return code


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… [{len(text) - SHOWN} more characters]"
