"""Problems of mathematics, with a Python interpreter at hand and a boxed answer.

Invariant: an answer is compared on the host where it is a number or a text, by code that evaluates nothing
(:mod:`agentgym.environments.code.boxed`); whatever needs algebra is read and compared in a sandbox of its own
(:mod:`agentgym.environments.code.symbolic`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentgym.actions import write_calls
from agentgym.arguments import one_of
from agentgym.environments.code import pythonmath_problems, sympy_pack
from agentgym.environments.code.base import CodeEnv, Refused, Score
from agentgym.environments.code.boxed import boxed, plain, same, worded
from agentgym.environments.code.symbolic import SPEC, compare
from agentgym.errors import DataUnavailable, JudgeFailed, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import SandboxSpec
from agentgym.task import Task, TaskSet
from agentgym.tools import Tool
from agentgym.tools.python import python_tool
from agentgym.tools.submit import submit_tool

Files = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]

SPLITS = ("train", "valid", "test")
COMPARE_SECONDS = 10.0
"""Deadline of one comparison by algebra."""

_GUIDE = r"\boxed{…}"


class PythonMath(CodeEnv):
    r"""Questions of mathematics; a tool ``python``; the answer in ``\boxed{…}`` or by ``submit``.

    Args:
        file: JSONL of ``question`` and ``answer``, in place of the generated problems: a path, or a path a
            split. A line of a single file may name its ``split``; otherwise it is of ``test``. ``problem`` is
            read like ``question``; an answer is taken out of its last box, or from behind ``####``. Where no
            split is named, ``reset`` draws from the first that has tasks.
        kinds: Kinds of generated problems to keep; default: all, see
            :data:`agentgym.environments.code.pythonmath_problems.KINDS`.
        sandbox: Name or import path of the sandbox backend.
        sandbox_options: Its options.
        limits: See :class:`~agentgym.environments.code.base.CodeEnv`; default: 30 ``seconds`` a call.
        max_steps: Truncate after so many turns; ``None`` never does.
        render_mode: ``ansi`` or ``None``.
    """

    splits = SPLITS
    version = "2"

    def __init__(
        self,
        *,
        file: Files | None = None,
        kinds: Sequence[str] | str | None = None,
        sandbox: str = "bubblewrap",
        sandbox_options: Mapping[str, Any] | None = None,
        limits: Mapping[str, float] | None = None,
        max_steps: int | None = 10,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            sandbox=sandbox,
            sandbox_options=sandbox_options,
            limits=limits,
            max_steps=max_steps,
            render_mode=render_mode,
        )
        sympy_pack.required()
        self._kinds = _kinds(kinds)
        self._files = _files(file)
        if self._files and kinds is not None:
            raise UsageError("file and kinds exclude each other", hint="kinds are of generated problems")
        self._sets: dict[str, TaskSet] = {}

    # The environment contract ---------------------------------------------------------------

    def tasks(self, split: str) -> TaskSet:
        """The problems of a split.

        Raises:
            DataUnavailable: A file cannot be read.
        """
        self.require_split(split)
        if split not in self._sets:
            self._sets[split] = self._of_files(split) if self._files else self._generated(split)
        return self._sets[split]

    def expert(self, task: Task) -> Sequence[str]:
        """The answer, boxed."""
        return [rf"\boxed{{{task.private['answer']}}}"]

    def nop(self, task: Task) -> Sequence[str]:
        """Give no answer."""
        return [write_calls([ToolCall("submit", {"answer": "none"})])]

    # A code environment's parts -------------------------------------------------------------

    def sandbox_spec(self, task: Task) -> SandboxSpec:
        """See :meth:`CodeEnv.sandbox_spec`."""
        return replace(SPEC, pids=64)

    async def opening(self, task: Task) -> str:
        """The question."""
        return (
            f"{task.instruction}\n\nYou may compute with the tool python. Then give the final answer in "
            f"{_GUIDE}, exact, calculated to the end and as simple as it can be; that ends the task."
        )

    def tools(self, task: Task) -> Sequence[Tool]:
        """``python`` and ``submit``."""
        run = python_tool(
            self.sandbox,
            seconds=self.seconds,
            description=(
                "Run Python code in an interpreter that goes on from call to call. You see what is printed, "
                "the value of the last line where it is an expression, and the traceback of an error. SymPy "
                f"can be imported. A call has {self.seconds:g} seconds."
            ),
        )
        given = False

        async def python(**arguments: Any) -> Any:
            # With the first call: an answer without one costs nothing.
            nonlocal given
            if not given:
                await sympy_pack.give_sympy(self.sandbox)
                given = True
            return await run.function(**arguments)

        return replace(run, function=python), replace(
            submit_tool("Give the final answer, exact and as simple as it can be. This ends the task."),
            function=self._submit,
        )

    async def said(self, text: str) -> str:
        """A boxed answer ends the episode."""
        if (answer := boxed(text)) is None:
            raise Refused(f"There is no answer in {_GUIDE}, and no call of a tool. {self._ways()}")
        self.hand_in(answer)
        return ""

    async def restart(self, why: str) -> str:
        """Nothing is kept in the sandbox: there is another one."""
        await self.renew()
        return f"The sandbox has ended ({why}); a new one was started, without the interpreter's names."

    async def scoring(self, task: Task, artifact: str) -> Score:
        """Whether the answer is the reference's.

        Raises:
            JudgeFailed: It cannot be told: the judge does not start, or cannot read the reference.
        """
        reference = str(task.private["answer"])
        how, right = "plain", same(artifact, reference)
        if right is None:
            async with self.fresh_sandbox(SPEC) as sandbox:
                how = await compare(sandbox, artifact, reference, seconds=COMPARE_SECONDS)
            if how == "unreadable reference":
                if not worded(plain(reference)):
                    raise JudgeFailed(
                        f"the reference {reference!r} of the task {task.id!r} cannot be read: whether what "
                        "is spelled otherwise is right, nobody can tell",
                        hint="write a number, an expression, an equation, an interval, a list, or words of "
                        "letters alone",
                    )
                how = "different"
            right = how == "same"
        return Score(float(right), right, info={"compared": how})

    # Its parts ------------------------------------------------------------------------------

    def _submit(self, answer: str) -> str:
        self.hand_in(boxed(answer) or answer)
        return "submitted"

    def _generated(self, split: str) -> TaskSet:
        ids = [id for id in pythonmath_problems.ids(split) if id.rpartition("-")[0] in self._kinds]

        def build(id: str) -> Task:
            made = pythonmath_problems.problem(id)
            kind = id.rpartition("-")[0]
            return Task(id, split, made.question, {"kind": kind}, {"answer": made.answer})

        return TaskSet(split, ids, build, version=self.version)

    def _prepare(self, seed: int | None, options: dict[str, Any] | None) -> Task:
        asked = dict(options or {})
        if self._files and not (asked.get("task_id") or asked.get("split") or self._split):
            asked["split"] = next((split for split in self.splits if len(self.tasks(split))), self.splits[0])
        return super()._prepare(seed, asked)

    def _of_files(self, split: str) -> TaskSet:
        digest = hashlib.sha256()
        table: dict[str, Task] = {}
        for named, path in self._files.items():
            if named not in ("", split):
                continue
            try:
                content = path.read_bytes()
                digest.update(content)
                made = _read(content.decode("utf-8"), named, path.stem)
            except (OSError, ValueError) as error:
                raise DataUnavailable(
                    f"the questions of {path} cannot be read: {error}",
                    hint='write a line like {"question": "What is 2 + 2?", "answer": "4"} for each',
                ) from error
            table.update((task.id, task) for task in made if task.split == split)
        return TaskSet(split, list(table), table.__getitem__, version=digest.hexdigest()[:16])


def _read(content: str, split: str, stem: str) -> list[Task]:
    """The tasks of a file.

    Raises:
        ValueError: A line is none, or has the id of another.
    """
    made: list[Task] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            task = _task(json.loads(line), split, f"{split or stem}-{number}")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if (first := lines.setdefault(task.id, number)) != number:
            raise ValueError(f"lines {first} and {number} have the same id {task.id!r}")
        made.append(task)
    return made


def _task(entry: Any, split: str, id: str) -> Task:
    if not isinstance(entry, dict):
        raise ValueError("a line is no object")
    question = entry.get("question", entry.get("problem"))
    answer = entry.get("answer", entry.get("solution"))
    if not isinstance(question, str) or not isinstance(answer, str | int | float):
        raise ValueError(f"{id} has no question and answer")
    told = str(answer)
    if (inside := boxed(told)) is not None:
        told = inside
    elif "####" in told:
        told = told.rpartition("####")[2].strip()
    of = split or str(entry.get("split", "test"))
    if of not in SPLITS:
        raise ValueError(f"{id} is of the split {of!r}, which is none of {', '.join(SPLITS)}")
    return Task(
        id if entry.get("id") is None else str(entry["id"]), of, question.strip(), {}, {"answer": told}
    )


def _kinds(given: Sequence[str] | str | None) -> frozenset[str]:
    known = tuple(pythonmath_problems.KINDS)
    names = known if given is None else (given,) if isinstance(given, str) else tuple(given)
    return frozenset(one_of("kinds", name, known) for name in names)


def _files(given: Files | None) -> dict[str, Path]:
    if given is None:
        return {}
    named = dict(given) if isinstance(given, Mapping) else {"": given}
    for split, path in named.items():
        if split not in ("", *SPLITS):
            raise UsageError(f"file names the split {split!r}", hint=f"splits: {', '.join(SPLITS)}")
        if not Path(path).is_file():
            raise UsageError(f"{path} is no file", hint="give a JSONL file of questions and answers")
    return {split: Path(path) for split, path in named.items()}
