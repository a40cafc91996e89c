"""Task folders of Harbor and Terminal-Bench as an environment.

Invariants: what judges runs in a container that the policy never entered, made of the task's image anew, with
the policy's files at their paths, the tests and an empty place for the reward from our side; nothing of the
policy runs there but what the tests themselves run, and nothing at all runs there when the reward is read. A
reward is a number from 0 to 1 that all that was written agrees on, else it is 0. Somebody's Dockerfile is
built only for a caller who says so.

Tests that run the policy's code give it their own rights: within those it can write the reward itself, and
nobody outside can tell. Such tests are as strong as their authors made them.

Harbor calls this a separate verifier. By default both upstreams judge in the container in which the policy
worked: what a policy changed outside the judged paths counts there and not here.
"""

from __future__ import annotations

import asyncio
import base64
import io
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentgym.actions import write_calls
from agentgym.environments.code import harbor_verdict as verdict
from agentgym.environments.code.base import Score, named
from agentgym.environments.code.base_folder import FolderEnv
from agentgym.environments.code.harbor_folder import TaskFolder, read_folder
from agentgym.errors import EnvironmentFailed, MissingDependency, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import Mount, PathRefused, Sandbox, SandboxSpec
from agentgym.sandboxes.base import MIB
from agentgym.sandboxes.scratch import Scratch
from agentgym.task import Task, TaskSet, of_list
from agentgym.tools import Tool
from agentgym.tools.bash import bash_tool
from agentgym.tools.edit import edit_tool

MOST_BYTES = 256 * MIB
MOST_FILES = 50_000
"""What a policy may leave."""

DISK = 1024
"""Most megabytes of files where they are kept in memory."""

SECONDS = 120.0
"""Deadline of one command of the policy where ``limits`` says nothing else."""

BUILD_SECONDS = 3_600.0
_LOGS = ("verifier", "agent", "artifacts")
_CHUNK = 60_000


class TaskFolders(FolderEnv):
    """Tasks in the forms of Harbor and of Terminal-Bench 1.

    Args:
        folder: A task's folder, or a folder of tasks; needed.
        build: Build a task's image from its Dockerfile where the daemon has none. That runs somebody's
            commands, with the network and the rights of the Docker daemon.
        image: Name of a task's image, with ``{id}``; default: the one that the task names, or the one that
            ``build`` makes.
        workdir: The working directory, where it is another than the task's files tell.
        sandbox: Name or import path of the sandbox backend. Only tasks without an image run in others than
            ``docker``.
        sandbox_options: Its options; default for ``docker``: a root that can be written, and its user 0, as
            both forms expect.
        limits: See :class:`~agentgym.environments.code.base.CodeEnv`; they come before the task's own.
        max_steps: Truncate after so many turns, and judge what is there then; ``None`` never does.
        render_mode: ``ansi`` or ``None``.

    Attributes:
        left_out: Why a task is left out of the task set, by id.

    Raises:
        UsageError: There is no folder, or no task in it that can be used.
        DataUnavailable: A task's files cannot be read.
    """

    splits = ("test",)
    version = "1"

    def __init__(
        self,
        *,
        folder: str | Path | None = None,
        build: bool = False,
        image: str | None = None,
        workdir: str | None = None,
        sandbox: str = "docker",
        sandbox_options: Mapping[str, Any] | None = None,
        limits: Mapping[str, float] | None = None,
        max_steps: int | None = 50,
        render_mode: str | None = None,
    ) -> None:
        if not isinstance(folder, str | Path):
            raise UsageError(
                "no folder of tasks is given" if folder is None else f"folder is {folder!r}",
                hint="give folder=…: a task's folder, or a folder of tasks (--env folder=… for a command)",
            )
        if sandbox == "docker":
            sandbox_options = {"writable": True, "user": "0:0", **named("sandbox_options", sandbox_options)}
        super().__init__(
            sandbox=sandbox,
            sandbox_options=sandbox_options,
            limits={"seconds": SECONDS, **named("limits", limits)},
            max_steps=max_steps,
            render_mode=render_mode,
        )
        self._build, self._image, self._workdir = build, image, workdir
        found = read_folder(Path(folder))
        why = {task.id: self._lacks(task) for task in found}
        self.left_out = {id: reason for id, reason in why.items() if reason}
        self._folders = {task.id: task for task in found if not why[task.id]}
        if not self._folders:
            first = next(iter(self.left_out.items()))
            raise UsageError(f"no task of {folder} can be used: {first[0]}: {first[1]}")
        self._kept: Scratch | None = None
        self._around: Scratch | None = None

    # The environment contract ---------------------------------------------------------------

    def tasks(self, split: str) -> TaskSet:
        """The tasks that can be used, ordered by id."""
        self.require_split(split)
        made = [_task(split, task) for task in self._folders.values()]
        version = "-".join([self.version, *(task.digest[:8] for task in self._folders.values())])
        return of_list(split, made, version=version)

    async def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """See :meth:`CodeEnv.begin`."""
        self.forget()
        self._around = await asyncio.to_thread(_surroundings, self._folders[task.id])
        await self._see_image(self._folders[task.id])
        return await super().begin(task)

    def expert(self, task: Task) -> Sequence[str] | None:
        """The task's own solution, run from where the policy works; then submit."""
        commands = _solved(self._folders[task.id])
        if commands is None:
            return None
        calls = [ToolCall("bash", {"command": command}) for command in commands]
        return [write_calls([call]) for call in (*calls, ToolCall("submit", {}))]

    # A code environment's parts -------------------------------------------------------------

    def sandbox_spec(self, task: Task) -> SandboxSpec:
        """See :meth:`CodeEnv.sandbox_spec`."""
        return self._spec(self._folders[task.id], judging=False)

    async def opening(self, task: Task) -> str:
        """The instruction, as it is."""
        folder = self._folders[task.id]
        await self._places(self.sandbox, folder)
        return (
            f"{folder.instruction}\n\nYou have a shell in {self._workdir_of(folder)}. Call submit when all "
            "is done: the files that are there then are judged."
        )

    def tools(self, task: Task) -> Sequence[Tool]:
        """``bash``, ``edit`` and ``submit``."""
        return bash_tool(self.sandbox, seconds=self.seconds), edit_tool(self.sandbox), self.submit_tool()

    async def take(self) -> Mapping[str, Path | None] | str:
        """Copies of what is judged on this machine, by path; or why there are none."""
        paths = self._paths(self._folders[self.task.id])
        self._forget_kept()
        self._kept = await asyncio.to_thread(Scratch, "TaskFolders artifact")
        taken: dict[str, Path | None] = {}
        for number, path in enumerate(paths):
            taken[path] = None
            if (await self.sandbox.exec(["test", "-e", path])).return_code == 1:
                continue
            taken[path] = place = self._kept.path / str(number)
            try:
                await self.sandbox.download(
                    path, place, max_bytes=MOST_BYTES // len(paths), max_files=MOST_FILES // len(paths)
                )
            except PathRefused as refused:
                return f"what was left cannot be copied: {refused.message}"
        return taken

    def forget(self) -> None:
        """See :meth:`FolderEnv.forget`."""
        self._forget_kept()
        if self._around is not None:
            self._around.close()
            self._around = None

    async def scoring(self, task: Task, artifact: Mapping[str, Path | None] | str) -> Score:
        """The reward of the task's own tests; ``info["why"]`` says why there is none."""
        folder = self._folders[task.id]
        try:
            if isinstance(artifact, str):
                return _score(0.0, artifact)
            async with self.fresh_sandbox(self._spec(folder, judging=True)) as sandbox:
                await self._places(sandbox, folder)
                for path, source in artifact.items():
                    if why := await _put(sandbox, source, path, self._workdir_of(folder)):
                        return _score(0.0, why)
                return await self._verdict(sandbox, folder)
        finally:
            await asyncio.to_thread(self.forget)

    # Its parts ------------------------------------------------------------------------------

    def _lacks(self, task: TaskFolder) -> str:
        if task.lacks:
            return task.lacks
        if task.needs_image and self._backend != "docker":
            return f"it needs an image, and the sandbox {self._backend!r} has none"
        outside = [path for path in task.artifacts if not _below(path, self._workdir_of(task))]
        if outside and not task.needs_image:
            return f"without an image {outside[0]} cannot be written"
        return ""

    def _workdir_of(self, task: TaskFolder) -> str:
        return self._workdir or task.workdir

    def _paths(self, task: TaskFolder) -> tuple[str, ...]:
        return task.artifacts or (self._workdir_of(task),)

    def _name(self, task: TaskFolder) -> str | None:
        if self._image is not None and task.needs_image:
            return self._image.replace("{id}", task.id)
        if task.image is not None or task.context is None:
            return task.image
        flat = re.sub(r"[^a-z0-9]+", "-", task.id.lower()).strip("-") or "task"
        return f"agentgym-task-{flat}:{_context_hash(task.context)}"

    def _spec(self, task: TaskFolder, *, judging: bool) -> SandboxSpec:
        mounts: list[Mount] = []
        if not task.needs_image:
            # The root cannot be written: the places that a task expects there are laid over it.
            assert self._around is not None
            mounts.append(Mount(self._around.path / "logs", "/logs"))
            if judging:
                mounts.append(Mount(self._around.path / "tests", "/tests"))
        env = {**task.env, **(task.judging_env if judging else {})}
        return SandboxSpec(
            image=self._name(task),
            workdir=self._workdir_of(task),
            cpus=task.cpus,
            memory=max(64, task.memory) * MIB,
            disk=max(64, min(task.storage, DISK)) * MIB,
            pids=512,
            env=env,
            mounts=tuple(mounts),
        )

    async def _see_image(self, task: TaskFolder) -> None:
        """See that an image that is to be built is there.

        Raises:
            UsageError: It is not, and is not to be built.
            EnvironmentFailed: It cannot be built.
            MissingDependency: The docker SDK is not installed.
        """
        name = self._name(task)
        if name is None or task.context is None:
            return
        await asyncio.wait_for(
            asyncio.to_thread(_built, name, task.context, self._build, self._options.get("base_url")),
            BUILD_SECONDS,
        )

    async def _places(self, sandbox: Sandbox, task: TaskFolder) -> None:
        root = "/logs" if task.needs_image else "/tmp/logs"
        made = await sandbox.exec(["mkdir", "-p", *(f"{root}/{name}" for name in _LOGS)])
        if not made.ok:
            raise EnvironmentFailed(f"{root} of {task.id!r} cannot be made: {made.stderr.strip()[:200]}")

    async def _verdict(self, sandbox: Sandbox, task: TaskFolder) -> Score:
        if task.needs_image:
            assert self._around is not None
            await sandbox.upload(self._around.path / "tests", "/tests")
        # In a sandbox of tier none, all that runs would be all of this machine.
        command = verdict.command(f"/tests/{task.script}", alone=self.tier != "none")
        ran = await sandbox.exec(command, seconds=task.seconds, limit=verdict.MOST_SAID)
        if why := verdict.broken(ran):
            return _score(0.0, why)
        left = ran.return_code == verdict.ALONE
        if task.form == "terminal-bench":
            reward, why, count = verdict.summed(ran)
            return _score(reward, why, left_running=left, tests=count)
        given: dict[str, float | None] = {}
        for name in ("reward.json", "reward.txt"):
            try:
                data = await sandbox.read(f"/logs/verifier/{name}", limit=64 << 10)
            except PathRefused:
                continue
            given[name] = verdict.read_reward(data, name)
        return _score(*verdict.agreed(given), left_running=left)

    def _forget_kept(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def _surroundings(task: TaskFolder) -> Scratch:
    """A folder with the tests as ``tests``, and ``logs`` with links to where logs can be written."""
    scratch = Scratch("TaskFolders tests", mode=0o755)
    made = scratch.path
    if task.tests.is_dir():
        shutil.copytree(task.tests, made / "tests", symlinks=True)
    else:
        (made / "tests").mkdir()
    if task.form == "terminal-bench":
        shutil.copyfile(task.path / task.script, made / "tests" / task.script)
    for place in [made / "tests", *(made / "tests").rglob("*")]:
        if not place.is_symlink():
            place.chmod(0o755)
    (made / "logs").mkdir(mode=0o755)
    for name in _LOGS:
        (made / "logs" / name).symlink_to(f"/tmp/logs/{name}")
    return scratch


async def _put(sandbox: Sandbox, source: Path | None, path: str, workdir: str) -> str:
    """Make ``path`` what was left of it; returns why it cannot be."""
    if path == workdir:
        # It may be a place of its own, which cannot be removed.
        cleared = await sandbox.exec(["find", path, "-mindepth", "1", "-delete"], cwd="/")
    else:
        cleared = await sandbox.exec(["rm", "-rf", "--", path], cwd="/")
    if not cleared.ok:
        raise EnvironmentFailed(f"{path} cannot be emptied: {cleared.stderr.strip()[:200]}")
    if source is not None:
        try:
            await sandbox.upload(source, path)
        except (PathRefused, UsageError) as refused:
            return f"what was left cannot be copied: {refused.message.replace(str(source), path)}"
    return ""


def _solved(task: TaskFolder) -> list[str] | None:
    """Commands that run a task's solution; ``None`` where it has none."""
    if task.solution is None:
        return None
    script = task.solution if task.solution.is_file() else task.solution / "solve.sh"
    files = [script] if task.solution.is_file() else [p for p in task.solution.rglob("*") if p.is_file()]
    home = "/solution" if task.needs_image else "/tmp/solution"
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for place in sorted(files):
            archive.add(place, str(place.relative_to(script.parent)), recursive=False)
    text = base64.b64encode(made.getvalue()).decode()
    pieces = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    return [
        f"mkdir -p {home}",
        *(f"printf %s {piece} >> {home}.b64" for piece in pieces),
        f"base64 -d {home}.b64 | tar -xz --no-same-owner -C {home}; rm {home}.b64",
        f"bash {home}/{script.name}; rm -r {home}",
    ]


def _built(name: str, context: Path, allowed: bool, url: str | None) -> None:
    try:
        import docker
        from docker.errors import APIError, BuildError, DockerException, ImageNotFound
    except ImportError as error:
        raise MissingDependency("docker", "docker") from error
    try:
        client = docker.DockerClient(base_url=url) if url else docker.from_env()
        try:
            client.images.get(name)
        except ImageNotFound:
            if not allowed:
                raise UsageError(
                    f"there is no image {name!r}, and the Dockerfile in {context} is somebody's program",
                    hint="give image=… if it is there by another name; or say build=True if you trust it",
                ) from None
            client.images.build(path=str(context), tag=name, rm=True)
        finally:
            client.close()
    except (BuildError, APIError, DockerException) as error:
        raise EnvironmentFailed(
            f"the image {name} cannot be built: {error}", hint="see that the Docker daemon runs"
        ) from error


def _context_hash(context: Path) -> str:
    import hashlib

    made = hashlib.sha256()
    for place in sorted(context.rglob("*")):
        if place.is_file() and not place.is_symlink():
            made.update(str(place.relative_to(context)).encode() + b"\0")
            made.update(hashlib.sha256(place.read_bytes()).digest())
    return made.hexdigest()[:12]


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _score(reward: float, why: str, **more: Any) -> Score:
    told = "The tests have run." if not why else f"It was judged: {why}."
    return Score(reward, reward >= 1.0, told, {"why": why, **more})


def _task(split: str, task: TaskFolder) -> Task:
    facts = {
        "form": task.form,
        **{k: v for k, v in task.metadata.items() if isinstance(v, str | int | float)},
    }
    return Task(task.id, split, task.instruction, facts)
