"""Shell tasks: a folder, a request, a shell; what lies in the folder in the end is judged.

Invariants: a task's folder is made in a sandbox that no policy enters, and its files alone come to the
policy's; what a policy left is copied out of its sandbox before that is closed, and laid beside a folder
made anew in a sandbox that the policy never entered; there it is read and nothing of it runs. A program that
was asked for runs in a third sandbox, which holds nothing of the truth; what it says is compared outside.

The tasks are in :mod:`agentgym.environments.code.terminal_tasks`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentgym.actions import write_calls
from agentgym.arguments import one_of
from agentgym.environments.code import terminal_tasks as shop
from agentgym.environments.code.base import Score
from agentgym.environments.code.base_folder import FolderEnv
from agentgym.environments.code.terminal_chore import Run
from agentgym.errors import EnvironmentFailed, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import ExecResult, PathRefused, Sandbox
from agentgym.sandboxes.base import MIB
from agentgym.sandboxes.scratch import Scratch
from agentgym.task import Task, TaskSet
from agentgym.tools import Tool
from agentgym.tools.bash import bash_tool
from agentgym.tools.edit import edit_tool

MOST_BYTES = 64 * MIB
MOST_FILES = 10_000
"""What a policy may leave."""

KEPT = 64 << 10
"""Bytes kept of what a program says, and of each file that it makes."""

SECONDS = 60.0
"""Deadline of making a folder, and of judging one."""


class Terminal(FolderEnv):
    """Shell tasks about files, text, git, archives, processes and SQLite.

    Args:
        categories: Which to take, of :data:`~agentgym.environments.code.terminal_tasks.CATEGORIES`; default:
            all.
        without: Programs that the sandbox has not, such as ``git``: tasks that need one are left out of the
            task sets, see :attr:`left_out`.
        edit: Whether there is the tool ``edit`` beside ``bash`` and ``submit``.
        sandbox: Name or import path of the sandbox backend.
        sandbox_options: Its options.
        limits: See :class:`~agentgym.environments.code.base.CodeEnv`.
        max_steps: Truncate after so many turns, and judge what is there then; ``None`` never does.
        render_mode: ``ansi`` or ``None``.

    Attributes:
        left_out: Names of the kinds of tasks that ``without`` leaves out.

    Raises:
        UnknownName: There is no such category.
        UsageError: Nothing is left, or no task needs a program of ``without``.
    """

    version = "1"

    def __init__(
        self,
        *,
        categories: Sequence[str] | None = None,
        without: Sequence[str] = (),
        edit: bool = True,
        sandbox: str = "bubblewrap",
        sandbox_options: Mapping[str, Any] | None = None,
        limits: Mapping[str, float] | None = None,
        max_steps: int | None = 30,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            sandbox=sandbox,
            sandbox_options=sandbox_options,
            limits=limits,
            max_steps=max_steps,
            render_mode=render_mode,
        )
        categories = _names("categories", categories, shop.CATEGORIES)
        without = _names(
            "without", without, sorted({need for kind in shop.CHORES.values() for need in kind.needs})
        )
        chosen = [name for name in shop.CHORES if shop.category(name) in categories]
        self._names = tuple(name for name in chosen if not set(shop.CHORES[name].needs) & set(without))
        self.left_out = tuple(name for name in chosen if name not in self._names)
        if not self._names:
            raise UsageError("no shell task is left", hint="give other categories, or less in without")
        self._edit = edit
        self._left: Scratch | None = None

    # The environment contract ---------------------------------------------------------------

    def tasks(self, split: str) -> TaskSet:
        """The variants of a split: all kinds of tasks with its first variant, then with its second."""
        variants = shop.VARIANTS[self.require_split(split)]
        ids = [f"{name}/{variant}" for variant in variants for name in self._names]
        whole = len(self._names) == len(shop.CHORES)
        version = self.version if whole else f"{self.version}-{'+'.join(self._names)}"
        return TaskSet(split, ids, lambda task_id: _task(split, task_id), version=version)

    def expert(self, task: Task) -> Sequence[str]:
        """The commands of the task's solution, then submit."""
        calls = [ToolCall("bash", {"command": command}) for command in task.private["oracle"]]
        return [write_calls([call]) for call in (*calls, ToolCall("submit", {}))]

    # A code environment's parts -------------------------------------------------------------

    async def opening(self, task: Task) -> str:
        """Make the folder, give it to the policy, start what runs beside it, and tell what is asked."""
        self.forget()
        for program in shop.chore(task.id).needs:
            found = await self.sandbox.exec(["sh", "-c", 'command -v "$1"', "sh", program], seconds=SECONDS)
            if not found.ok:
                raise UsageError(
                    f"the task {task.id!r} needs {program}, and the sandbox has none",
                    hint=f"leave such tasks out (without=[{program!r}]), or give a sandbox that has it",
                )
        await _lay(self.sandbox, task.id, ".")
        # The worker in there was told the solution and the check.
        await self.shed()
        settled = await self.sandbox.exec(shop.SETTLING, stdin=shop.settle(task.id), seconds=SECONDS)
        _made(settled, task.id)
        return (
            f"{task.instruction}\n\nYou have a shell whose working directory is that folder; paths are "
            "relative to it. Other files that you leave there do no harm where nothing else is said. Call "
            "submit when all is done: what is there then is judged."
        )

    def tools(self, task: Task) -> Sequence[Tool]:
        """``bash``, ``edit`` if it is wanted, and ``submit``."""
        edit = (edit_tool(self.sandbox),) if self._edit else ()
        return bash_tool(self.sandbox, seconds=self.seconds), *edit, self.submit_tool()

    async def take(self) -> Path | str:
        """A copy of the policy's folder on this machine, or why there is none."""
        self.forget()
        self._left = await asyncio.to_thread(Scratch, "Terminal artifact")
        folder = self._left.path / "after"
        try:
            await self.sandbox.download(".", folder, max_bytes=MOST_BYTES, max_files=MOST_FILES)
        except PathRefused as refused:
            return f"the folder cannot be copied: {refused.message}"
        return folder

    def forget(self) -> None:
        """See :meth:`FolderEnv.forget`."""
        if self._left is not None:
            self._left.close()
            self._left = None

    async def scoring(self, task: Task, artifact: Path | str) -> Score:
        """1 if what was left is as asked, else 0; ``info["why"]`` says in what it is not."""
        try:
            why = artifact if isinstance(artifact, str) else await self._judge(task, artifact)
        finally:
            await asyncio.to_thread(self.forget)
        told = "What is there is not what was asked for." if why else "What is there is what was asked for."
        return Score(float(not why), not why, told, {"why": why})

    # Its parts ------------------------------------------------------------------------------

    async def _judge(self, task: Task, folder: Path) -> str:
        done: list[dict[str, Any]] = []
        if runs := shop.chore(task.id).runs():
            async with self.fresh_sandbox() as sandbox:
                if why := await _lay_beside(sandbox, folder):
                    return why
                for number, run in enumerate(runs):
                    ran = await _run(sandbox, f"run-{number}", run)
                    if ran is None:
                        return "the program takes too long"
                    done.append(ran)
        async with self.fresh_sandbox() as sandbox:
            await _lay(sandbox, task.id, "before")
            if why := await _lay_beside(sandbox, folder):
                return why
            request = shop.judge(task.id, "before", "after", done)
            judged = await sandbox.exec(shop.COMMAND, stdin=request, seconds=SECONDS)
        try:
            return str(json.loads(judged.stdout)["why"]) if judged.ok else "what was left cannot be judged"
        except (ValueError, KeyError, TypeError):
            return "what was left cannot be judged"


async def _lay(sandbox: Sandbox, task_id: str, root: str) -> None:
    """Make a task's folder in a sandbox that no policy enters; raises as :func:`_made`."""
    _made(await sandbox.exec(shop.COMMAND, stdin=shop.lay(task_id, root), seconds=SECONDS), task_id)


def _made(made: ExecResult, task_id: str) -> None:
    """See that a step of making a task's folder went well.

    Raises:
        EnvironmentFailed: It did not.
    """
    if not made.ok:
        said = made.stderr.strip().rpartition("\n")[2] or made.ended or f"status {made.return_code}"
        raise EnvironmentFailed(
            f"the folder of the task {task_id!r} cannot be made: {said[:300]}",
            hint="the sandbox needs bash, coreutils and Python 3.10 with its standard library",
        )


async def _lay_beside(sandbox: Sandbox, folder: Path) -> str:
    """Copy what a policy left into ``after``; returns why it cannot be."""
    try:
        await sandbox.upload(folder, "after")
    except (PathRefused, UsageError) as refused:
        return f"the folder cannot be copied: {refused.message.replace(str(folder), 'the folder')}"
    return ""


async def _run(sandbox: Sandbox, folder: str, run: Run) -> dict[str, Any] | None:
    """Run a policy's program once, in a folder of its own; ``None`` if it met its deadline."""
    await sandbox.exec(["mkdir", folder], seconds=SECONDS)
    for name, text in run.files.items():
        await sandbox.write(f"{folder}/{name}", text)
    ran = await sandbox.exec(run.argv, cwd=folder, stdin=run.stdin.encode(), seconds=run.seconds, limit=KEPT)
    if ran.timed_out or ran.ended:
        return None
    kept = {}
    for name in run.keep:
        try:
            kept[name] = (await sandbox.read(f"{folder}/{name}", limit=KEPT)).decode("utf-8", "replace")
        except PathRefused:
            continue
    return {"code": ran.return_code, "stdout": ran.stdout, "files": kept}


def _names(what: str, given: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    if given is None:
        return tuple(known)
    given = [given] if isinstance(given, str) else list(given)
    return tuple(one_of(what, name, tuple(known)) for name in given)


def _task(split: str, task_id: str) -> Task:
    chore = shop.chore(task_id)
    facts = {"category": shop.category(chore.name), "difficulty": chore.difficulty, "needs": chore.needs}
    return Task(task_id, split, chore.asked(), facts, {"oracle": tuple(chore.oracle())})
