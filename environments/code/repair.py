"""Repository repair in the way of SWE-bench: a package with a fault, a shell and an editor, hidden tests.

Invariants: the policy works on the repository as it was before the change, in a git repository of one
commit; what is judged is the patch that it leaves, in a sandbox that it never entered
(:mod:`agentgym.environments.code.repair_scoring`), by tests that it never saw.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from agentgym import paths
from agentgym.actions import write_calls
from agentgym.environments.code import repair_images as images_of
from agentgym.environments.code import repair_scoring as scoring
from agentgym.environments.code.base import CodeEnv, Score, named
from agentgym.environments.code.repair_instances import (
    SWE_BENCH,
    TESTBED_PYTHON,
    Instance,
    load,
)
from agentgym.environments.code.repair_measure import SECONDS, WORK
from agentgym.errors import MissingData, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import Sandbox, SandboxSpec
from agentgym.task import Task, TaskSet
from agentgym.tools import Tool, tool
from agentgym.tools.bash import bash_tool
from agentgym.tools.edit import edit_tool

NAME = "repair"
"""The data set."""

_CHUNK = 24_000
"""Characters of a patch that the expert passes in one command."""


class Repair(CodeEnv):
    """Repair a package so that hidden tests pass.

    Args:
        data: A folder made by ``agentgym data build repair``, or a JSON or JSONL file in the form of
            SWE-bench; default: the data set ``repair``.
        images: Name of an instance's container image where its record names none, with ``{id}``,
            ``{id_1776}`` or ``{id_s}`` in it. Records with images need the sandbox backend ``docker``.
        python: The interpreter of such images that runs the tests.
        build_dockerfiles: Build an image from the Dockerfile that a record brings. A Dockerfile is somebody's
            program, and building it runs it with the network and the rights of the Docker daemon: say so
            only for records that you trust.
        test_seconds: Deadline of the hidden tests.
        sandbox: Name or import path of the sandbox backend.
        sandbox_options: Its options.
        limits: See :class:`~agentgym.environments.code.base.CodeEnv`.
        max_steps: Truncate after so many turns; what was changed by then is scored.
        render_mode: ``ansi`` or ``None``.
    """

    splits = ("train", "test")
    default_split = "test"
    version = "1"

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        images: str = SWE_BENCH,
        python: str = TESTBED_PYTHON,
        build_dockerfiles: bool = False,
        test_seconds: float = SECONDS,
        sandbox: str = "bubblewrap",
        sandbox_options: Mapping[str, Any] | None = None,
        limits: Mapping[str, float] | None = None,
        max_steps: int | None = 50,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            sandbox=sandbox,
            sandbox_options=sandbox_options,
            limits={"seconds": 120.0, **named("limits", limits)},
            max_steps=max_steps,
            render_mode=render_mode,
        )
        self._data = None if data is None else Path(data)
        self._images, self._python, self._dockerfiles = images, python, build_dockerfiles
        if not isinstance(test_seconds, int | float) or not 1 <= test_seconds <= 3_600:
            raise UsageError(f"test_seconds is {test_seconds!r}", hint="give 1 to 3600")
        self._test_seconds = test_seconds
        self._known: dict[str, Instance] | None = None
        self._base = ""

    def tasks(self, split: str) -> TaskSet:
        """The instances of a split, in the order of their file.

        Raises:
            MissingData: The data set was never built.
            DataUnavailable: It cannot be read.
        """
        self.require_split(split)
        known = self._instances()
        ids = [id for id, instance in known.items() if instance.split == split]
        return TaskSet(split, ids, lambda id: _task(known[id]), version=self.version)

    def sandbox_spec(self, task: Task) -> SandboxSpec:
        """The repository, and what its tests need."""
        return scoring.spec_of(self._instances()[task.id])

    async def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Start the policy's sandbox and tell what goes wrong."""
        instance = self._instances()[task.id]
        if instance.dockerfile:
            await images_of.build(instance, allowed=self._dockerfiles)
        return await super().begin(task)

    async def opening(self, task: Task) -> str:
        """Set the repository up and tell the problem."""
        instance = self._instances()[task.id]
        self._base = await scoring.prepare(self.sandbox, instance)
        return (
            f"The folder {WORK} holds the source of {instance.repo}"
            f"{f' {instance.version}' if instance.version else ''}, a git repository. Something is wrong "
            f"with it:\n\n{instance.statement}\n\nRepair the source so that it is as described. Hidden tests "
            "decide, and others that pass now have to pass then; changes of tests and of their configuration "
            f"are left out. `{instance.test_command}` runs the tests that are there. There is no "
            "network. Call submit when you are done: the state of the folder is what you hand in."
        )

    def tools(self, task: Task) -> Sequence[Tool]:
        """A shell, an editor, and the way to hand in."""
        return (
            bash_tool(self.sandbox, seconds=self.seconds),
            edit_tool(self.sandbox),
            tool(name="submit")(self._submit),
        )

    async def _submit(self) -> str:
        """Hand in the repository as it is now. This ends the task."""
        self.hand_in(await scoring.take_patch(self.sandbox, self._base))
        return "The repository was taken."

    async def unsubmitted(self) -> tuple[bytes, str]:
        """What was changed by the last turn."""
        return await scoring.take_patch(self.sandbox, self._base)

    async def scoring(self, task: Task, artifact: tuple[bytes, str]) -> Score:
        """Apply the patch to the repository as it was, and run the hidden tests."""
        patch, why = artifact
        if why:
            return Score(0.0, False, info={"why": why, "patch": ""})
        verdict = await scoring.score(
            self._started, self._instances()[task.id], patch, seconds=self._test_seconds
        )
        info = {
            "why": verdict.why,
            "fail_to_pass": verdict.fail_to_pass,
            "pass_to_pass": verdict.pass_to_pass,
            "dropped": list(verdict.dropped),
            "patch": patch.decode("utf-8", "replace"),
        }
        return Score(float(verdict.success), verdict.success, info=info)

    def expert(self, task: Task) -> Sequence[str]:
        """Apply the change that the next release made, and submit."""
        text = base64.b64encode(str(task.private["patch"]).encode("utf-8", "surrogateescape")).decode()
        pieces = [text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)]
        commands = [f"printf %s '{piece}' >> /tmp/change" for piece in pieces]
        commands.append(
            "base64 -d /tmp/change > /tmp/change.patch && git apply --whitespace=nowarn /tmp/change.patch"
        )
        return [
            *(write_calls([ToolCall("bash", {"command": command})]) for command in commands),
            write_calls([ToolCall("submit", {})]),
        ]

    def _started(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        return self.fresh_sandbox(spec)

    def _instances(self) -> dict[str, Instance]:
        if self._known is None:
            place = self._data or paths.find_data(NAME)
            if place is None:
                raise MissingData(NAME, paths.data_path(), hint="agentgym data build repair")
            found = load(place, images=self._images, python=self._python)
            self._known = {instance.id: instance for instance in found}
        return self._known


def _task(instance: Instance) -> Task:
    return Task(
        instance.id,
        instance.split,
        instance.statement,
        metadata={
            "repo": instance.repo,
            "version": instance.version,
            "licence": instance.licence,
            "fail_to_pass": len(instance.fail_to_pass),
            "pass_to_pass": len(instance.pass_to_pass),
        },
        private={
            "patch": instance.patch,
            "test_patch": instance.test_patch,
            "fail_to_pass": instance.fail_to_pass,
            "pass_to_pass": instance.pass_to_pass,
        },
    )
