"""What the code environments have in common: a sandbox for the policy, tools in it, and honest scoring.

Invariants: the policy's sandbox is closed before anything is scored; :meth:`CodeEnv.scoring` sees the
artifact that was handed in and nothing else of the episode, and works in sandboxes that the policy never
entered. A sandbox that the policy's own actions ended is scored; a failure of the machinery around it is
raised, and so is a step whose environment was closed or reset meanwhile.

``worker`` is ``async``: every wait is for a sandbox and has a deadline. Forks replay the actions.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from agentgym.actions import Malformed, write_calls
from agentgym.arguments import step_limit
from agentgym.env import Env, Transition
from agentgym.environments.code.backends import Lease, lease
from agentgym.errors import EnvironmentFailed, SandboxFailed, UnknownName, UsageError
from agentgym.messages import ToolCall
from agentgym.sandboxes import Sandbox, SandboxEnded, SandboxSpec
from agentgym.task import Task
from agentgym.tools import Tool, Toolbox, read_turn

CALLS = 16
"""Most tool calls in one turn."""

SECONDS = 30.0
"""Deadline of one command of the policy where ``limits`` says nothing else."""

LIMITS = ("cpus", "memory", "pids", "disk", "inodes")
"""What ``limits`` may hold beside ``seconds``: the fields of a :class:`~agentgym.sandboxes.SandboxSpec`."""

WHOLE = ("memory", "pids", "disk", "inodes")
"""Those of them that are whole numbers."""


@dataclass(frozen=True, slots=True)
class Score:
    """What an artifact is worth.

    Attributes:
        reward: Of the episode.
        success: Whether the task is solved.
        told: The last observation; it tells nothing of what is hidden.
        info: What else is said of it in ``info``.
    """

    reward: float
    success: bool
    told: str = "The answer was taken."
    info: Mapping[str, Any] = field(default_factory=dict)


class CodeEnv(Env[str]):
    """Base class: a family says what the sandbox is, which tools are in it, and how an artifact is scored.

    Args:
        sandbox: Name or import path of the sandbox backend, see :func:`agentgym.sandboxes.make_backend`.
        sandbox_options: Its options.
        limits: Other limits than the family's own, of :data:`LIMITS`, for every sandbox of an episode, and
            ``seconds``, the deadline of one command.
        max_steps: Truncate after so many turns; ``None`` never does.
        render_mode: ``ansi`` or ``None``.

    Attributes:
        sandbox: The policy's, while an episode runs.
        seconds: Deadline of one command of the policy.
    """

    worker = "async"
    fork_mode = "replay"

    sandbox: Sandbox
    seconds: float

    def __init__(
        self,
        *,
        sandbox: str = "bubblewrap",
        sandbox_options: Mapping[str, Any] | None = None,
        limits: Mapping[str, float] | None = None,
        max_steps: int | None = 30,
        render_mode: str | None = None,
    ) -> None:
        self._backend, self._options = sandbox, named("sandbox_options", sandbox_options)
        self._limits = named("limits", limits)
        for name, value in self._limits.items():
            if name not in (*LIMITS, "seconds"):
                raise UnknownName("limit", name, (*LIMITS, "seconds"))
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UsageError(f"the limit {name} is {value!r}", hint="give a number")
            if name in WHOLE and value != int(value):
                raise UsageError(f"the limit {name} is {value!r}", hint="give a whole number")
        self.seconds = float(self._limits.pop("seconds", SECONDS))
        if not 0 < self.seconds <= 3_600:
            raise UsageError(f"the limit of seconds is {self.seconds:g}", hint="give 0 to 3600")
        self._spec_of(SandboxSpec())
        self._max_steps = step_limit(max_steps)
        self._lease: Lease | None = None
        self._open: list[Sandbox] = []
        self._toolbox = Toolbox(())
        self._handed: tuple[Any] | None = None
        self._turns = 0
        self._episode: object = None

    # What a family adds ---------------------------------------------------------------------

    def sandbox_spec(self, task: Task) -> SandboxSpec:
        """What the policy's sandbox is made of; ``limits`` are laid over it."""
        return SandboxSpec()

    @abstractmethod
    async def opening(self, task: Task) -> str:
        """Prepare :attr:`sandbox`, which has just started; return the first observation."""

    @abstractmethod
    def tools(self, task: Task) -> Sequence[Tool]:
        """The tools of an episode. One of them calls :meth:`hand_in`."""

    @abstractmethod
    async def scoring(self, task: Task, artifact: Any) -> Score:
        """What ``artifact`` is worth. Work in :meth:`fresh_sandbox` sandboxes: the policy's is closed.

        Raises:
            SandboxEnded: The artifact ended a sandbox: it scores 0.
            InfrastructureError: It cannot be scored.
        """

    async def said(self, text: str) -> str:
        """Answer a turn without a tool call; may :meth:`hand_in`. By default it is refused."""
        raise Refused("That is no tool call. " + self._ways())

    async def unsubmitted(self) -> Any:
        """The artifact of an episode that runs into ``max_steps``; ``None``: there is none, it scores 0."""
        return None

    async def restart(self, why: str) -> str | None:
        """Answer the end of the policy's sandbox.

        By default ``None``: the episode ends and scores 0. A family that keeps nothing of worth in the
        sandbox starts another one (:meth:`renew`) and returns the observation.
        """
        return None

    def nop(self, task: Task) -> Sequence[str]:
        """Submit at once what is there."""
        return [write_calls([ToolCall("submit", {})])]

    @property
    def tier(self) -> str:
        """How well the backend isolates, see :class:`~agentgym.sandboxes.Backend`; empty before ``reset``."""
        return "" if self._lease is None else self._lease.backend.tier

    # What a family uses ---------------------------------------------------------------------

    def hand_in(self, artifact: Any) -> None:
        """End the episode after this call, with ``artifact`` to be scored."""
        self._handed = (artifact,)

    async def renew(self) -> None:
        """Start the policy's sandbox anew, with its tools."""
        await self._close_sandboxes()
        self.sandbox = await self._start_sandbox(self.sandbox_spec(self.task), "policy")
        self._toolbox = Toolbox(self.tools(self.task))

    async def shed(self) -> None:
        """Give the policy another sandbox with the files of this one: no process and no memory comes along.

        For :meth:`opening`, before there are tools.
        """
        old = self.sandbox
        self.sandbox = await old.fork()
        self._open.append(self.sandbox)
        await old.close()
        self._drop(old)

    @asynccontextmanager
    async def fresh_sandbox(self, spec: SandboxSpec | None = None) -> AsyncIterator[Sandbox]:
        """A sandbox that the policy never entered, closed at the end."""
        async with self.fresh_sandboxes(spec or SandboxSpec()) as (made,):
            yield made

    @asynccontextmanager
    async def fresh_sandboxes(self, *specs: SandboxSpec) -> AsyncIterator[list[Sandbox]]:
        """Several of them, which start at the same time and end at the same time."""
        made: dict[int, Sandbox] = {}

        async def start(place: int, spec: SandboxSpec) -> None:
            made[place] = await self._start_sandbox(spec, "scoring")

        try:
            await asyncio.gather(*(start(place, spec) for place, spec in enumerate(specs)))
            yield [made[place] for place in range(len(specs))]
        finally:
            await asyncio.gather(*(sandbox.close() for sandbox in made.values()))
            for sandbox in made.values():
                self._drop(sandbox)

    # The environment contract ---------------------------------------------------------------

    async def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Start the policy's sandbox and tell the task."""
        if self._lease is not None and self._lease.loop is not asyncio.get_running_loop():
            await self._give_up()
        await self._close_sandboxes()
        self._turns, self._handed, self._episode = 0, None, object()
        self.sandbox = await self._start_sandbox(self.sandbox_spec(task), "policy")
        try:
            text = await self.opening(task)
        except SandboxEnded as ended:
            raise SandboxFailed(
                f"the sandbox of {task.id!r} ended before its policy began: {ended.why}"
            ) from ended
        self._toolbox = Toolbox(self.tools(task))
        return text, {"tools": self._toolbox.schemas}

    async def act(self, action: str) -> Transition:
        """Run the calls of a turn; score what was handed in.

        Raises:
            EnvironmentFailed: The episode was broken off: there is no score of it.
        """
        if self._handed is not None:
            # Its sandbox is closed, and its artifact may be gone: that would be a score of nothing.
            raise EnvironmentFailed("the scoring of this episode was broken off", hint="start another one")
        episode = self._episode
        made = await self._turn(action)
        if self._over(episode):
            # Its sandboxes ended by the caller's doing, and not by the policy's.
            raise EnvironmentFailed(
                "the environment was closed or reset in the middle of a step",
                hint="wait for a step's end before that; the episode has no score",
            )
        return made

    def shut(self) -> Any:
        """Close what is open, and give the backend up."""
        return None if self._lease is None else self._give_up()

    # Its parts ------------------------------------------------------------------------------

    async def _turn(self, action: str) -> Transition:
        self._turns += 1
        role, valid = "tool", True
        turn = read_turn(action)
        try:
            if isinstance(turn, Malformed):
                raise Refused(turn.message)
            if isinstance(turn, str):
                role = "user"
                text = await self.said(turn)
            else:
                text, valid = await self._calls(turn)
        except Refused as refused:
            role, valid, text = "user", False, str(refused)
        except SandboxEnded as ended:
            text = str(ended.message)
        if self._handed is not None:
            return await self._scored(self._handed[0], valid)
        if why := self.sandbox.ended:
            if (told := await self.restart(why)) is None:
                await self._close_sandboxes()
                told = f"{text}\n\nThe sandbox has ended ({why}), and the task with it."
                return Transition(told, 0.0, terminated=True, info=_info(valid, role, ended=why))
            text = f"{text}\n\n{told}"
        if self._max_steps is not None and self._turns >= self._max_steps:
            artifact = await self._last_artifact()
            if artifact is not None:
                return (await self._scored(artifact, valid))._replace(
                    observation=text, terminated=False, truncated=True
                )
            await self._close_sandboxes()
            return Transition(text, truncated=True, info=_info(valid, role))
        return Transition(text, info=_info(valid, role))

    async def _calls(self, calls: Sequence[ToolCall]) -> tuple[str, bool]:
        """Results of the calls up to the one that hands in, and whether all were taken."""
        if len(calls) > CALLS:
            raise Refused(f"A turn holds at most {CALLS} calls; none of these {len(calls)} was run.")
        told, valid = [], True
        for call in calls:
            result = await self._toolbox.acall(call)
            told.append(result.content)
            valid &= result.ok
            if self._handed is not None or self.sandbox.ended:
                break
        return "\n\n".join(told), valid

    async def _last_artifact(self) -> Any:
        with contextlib.suppress(SandboxEnded):
            return await self.unsubmitted()
        return None

    async def _scored(self, artifact: Any, valid: bool) -> Transition:
        # First: whatever it left running shall not run beside the scoring.
        await self._close_sandboxes()
        try:
            score = await self.scoring(self.task, artifact)
        except SandboxEnded as ended:
            score = Score(0.0, False, info={"ended": ended.why})
        info = {**_info(valid, "tool"), **score.info, "score": score.reward, "success": score.success}
        return Transition(score.told, score.reward, terminated=True, info=info)

    def _ways(self) -> str:
        return f"The tools are {', '.join(tool.name for tool in self._toolbox)}."

    def _spec_of(self, spec: SandboxSpec) -> SandboxSpec:
        whole: dict[str, Any] = {
            name: value if name == "cpus" else int(value) for name, value in self._limits.items()
        }
        return replace(spec, **whole)

    async def _start_sandbox(self, spec: SandboxSpec, what: str) -> Sandbox:
        episode = self._episode
        if self._over(episode):
            raise EnvironmentFailed("the environment is closed: no sandbox starts in it")
        if self._lease is None:
            self._lease = lease(self._backend, self._options)
        owner = f"{type(self).__name__} {what}"
        made = await self._lease.start(self._spec_of(spec), owner)
        self._open.append(made)
        if self._over(episode):
            await made.close()
            self._drop(made)
            raise EnvironmentFailed("the environment was closed or reset while a sandbox of it started")
        return made

    def _over(self, episode: object) -> bool:
        """Whether the environment was closed, or plays another episode by now."""
        return self._closed or self._episode is not episode

    async def _close_sandboxes(self) -> None:
        # A step that is under way may close them at the same time.
        while self._open:
            last = self._open[-1]
            await last.close()
            self._drop(last)

    def _drop(self, sandbox: Sandbox) -> None:
        with contextlib.suppress(ValueError):
            self._open.remove(sandbox)

    async def _give_up(self) -> None:
        """Close every sandbox and the lease, on the loop that they belong to."""
        held, self._lease = self._lease, None
        if held is None:
            return

        async def close() -> None:
            try:
                await self._close_sandboxes()
            finally:
                await held.release()

        if held.loop is asyncio.get_running_loop():
            await close()
        elif held.loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(close(), held.loop))
        else:
            self._open.clear()
            await asyncio.to_thread(held.abandon)


class Refused(Exception):
    """A turn that was not taken; its message says why."""


def named(what: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of an argument that holds values by name; empty where there is none.

    Raises:
        UsageError: It is something else.
    """
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(n, str) for n in given)):
        raise UsageError(f"{what} is {given!r}", hint=f'give names with values, like {what}={{"name": 1}}')
    return dict(given or {})


def _info(valid: bool, role: str, **more: Any) -> dict[str, Any]:
    return {"valid_action": valid, "role": role, "score": 0.0, "success": False, **more}
