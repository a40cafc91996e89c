"""The environment contract: a ``gymnasium.Env`` whose actions are strings.

Invariants: same task, same seed, same actions give the same observations and rewards; an action is never
an exception (a malformed one is answered by an observation, and the turn counts); an observation is never
mutated after it was returned; nothing a task keeps private leaves through ``info``.

A family implements :meth:`Env.tasks`, :meth:`Env.begin` and :meth:`Env.act`, plain or ``async``;
``reset``/``step`` and ``areset``/``astep`` are derived here, so that task selection, order of calls and
``info`` are the same everywhere.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import threading
from abc import abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast

import gymnasium
import numpy as np

from agentgym import spaces
from agentgym.errors import EnvironmentFailed, ForkUnsupported, UnknownName, UsageError
from agentgym.messages import Content, as_content
from agentgym.seeding import derive
from agentgym.task import Task, TaskSet, unknown_split

ObsType = TypeVar("ObsType")
Worker = Literal["async", "thread", "process"]
ForkMode = Literal["copy", "replay", "none"]
T = TypeVar("T")


class Transition(NamedTuple):
    """What :meth:`Env.act` returns.

    Attributes:
        observation: A member of the observation space.
        reward: Reward of this turn.
        terminated: The task's own end was reached.
        truncated: A limit of the environment ended the episode.
        info: ``valid_action``, ``score`` and ``success`` where they differ from the defaults
            (``True``, the return so far, ``False``), ``role`` (``user`` or ``tool``) where it matters to a
            chat template who says the observation, and whatever else the family tells.
    """

    observation: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = {}


class Env(gymnasium.Env[ObsType, str], Generic[ObsType]):
    """Base class of every environment.

    Class attributes:
        worker: Where the engine runs it. ``async``: on the event loop (``begin``/``act`` are coroutines,
            or never block). ``thread``: on a thread of its own, cannot be killed. ``process``: in a worker
            process that is killed when it hangs.
        fork_mode: ``copy`` (the class implements :meth:`copy_state`), ``replay`` (a new instance replays
            the actions) or ``none``.
        splits: Names of the splits, the training split first.
        default_split: The split that evaluation uses when none is named.
        version: Version of the task sets; recorded with every run.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 1}  # type: ignore[misc]
    worker: ClassVar[Worker] = "thread"
    fork_mode: ClassVar[ForkMode] = "replay"
    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "test")
    default_split: ClassVar[str] = "test"
    version: ClassVar[str] = "1"

    action_space: gymnasium.Space[str] = spaces.Text()
    observation_space: gymnasium.Space[Any] = spaces.Text()

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    _split: str | None = None
    _task: Task | None
    _seed: int | None
    _actions: list[str]
    _last: Any
    _score: float
    _live: bool
    _closed: bool
    _loop: _OwnedLoop | None
    _start: np.random.Generator | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Env[ObsType]:
        """Set up the episode state here, so that no subclass has to call ``super().__init__``."""
        self = super().__new__(cls)
        self._arguments = args, kwargs
        # Spaces hold a random generator: every instance has its own.
        self.action_space = copy.deepcopy(cls.action_space)
        self.observation_space = copy.deepcopy(cls.observation_space)
        self._task = None
        self._seed = None
        self._actions = []
        self._last = None
        self._score = 0.0
        self._live = False
        self._closed = False
        self._loop = None
        self._start = None
        self.render_mode = kwargs.get("render_mode")
        return self

    def __init__(self, *, render_mode: str | None = None) -> None:
        """Take what every environment takes; a family's own ``__init__`` takes ``render_mode`` too."""

    # What a family implements ---------------------------------------------------------------

    @abstractmethod
    def tasks(self, split: str) -> TaskSet:
        """The finite, ordered, versioned task set of ``split``. Call :meth:`require_split` first."""

    @abstractmethod
    def begin(self, task: Task) -> Any:
        """Start ``task``; return ``(observation, info)``. ``self.np_random`` is already seeded.

        May be ``async``. ``info`` may hold ``instruction``, ``admissible_actions``, ``tools``.
        """

    @abstractmethod
    def act(self, action: str) -> Any:
        """Take ``action``; return a :class:`Transition`. May be ``async``. Never raises for an action."""

    def expert(self, task: Task) -> Sequence[str] | None:
        """A sequence of actions that solves ``task`` from its start, or ``None`` where none is known."""
        return None

    def nop(self, task: Task) -> Sequence[str]:
        """Actions that do nothing useful, for the policy ``nop``; the last is repeated.

        Override it where an episode ends only when something is handed in: hand in nothing.
        """
        return ("",)

    def content(self, observation: ObsType) -> Content:
        """The ordered text and image parts of ``observation``."""
        if isinstance(observation, Mapping):
            return as_content(str(observation["text"]))
        return as_content(cast(str, observation))

    def copy_state(self) -> Env[ObsType]:
        """For ``fork_mode = "copy"``: an independent environment in the same state.

        Start from :meth:`fresh` and copy the family's own state; the base class copies its own.
        """
        raise ForkUnsupported(f"{type(self).__name__} declares fork_mode 'copy' but has no copy_state")

    def shut(self) -> Any:
        """Release what the family holds. May be ``async``. Called at most once."""

    # What callers use -----------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """The current task.

        Raises:
            UsageError: Before the first ``reset``.
        """
        if self._task is None:
            raise UsageError("no task yet", hint="call reset() first")
        return self._task

    def require_split(self, split: str) -> str:
        """``split`` if this family has it.

        Raises:
            UnknownName: It does not; the known ones are listed.
        """
        if split not in self.splits:
            raise unknown_split(split, self.splits)
        return split

    def find_task(self, task_id: str) -> Task:
        """The task of an id, searched in every split.

        Raises:
            UnknownName: No split has it.
        """
        for split in self.splits:
            if (task := self.tasks(split).get(task_id)) is not None:
                return task
        examples = [self.tasks(s).ids[0] for s in self.splits if len(self.tasks(s))]
        raise UnknownName("task", task_id, examples)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ObsType, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seeds ``np_random``; without a ``task_id`` it also draws the task.
            options: ``task_id`` names the task; ``split`` draws from that split (default: the first).

        Returns:
            The observation, and ``info`` with ``task_id``, ``instruction`` and, where they exist,
            ``admissible_actions`` and ``tools``.

        Raises:
            UnknownName: No such task, split or option.
        """
        task = self._prepare(seed, options)
        return self._begun(task, self._drive(self.begin(task)))

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ObsType, dict[str, Any]]:
        """:meth:`reset` on the running event loop."""
        task = self._prepare(seed, options)
        return self._begun(task, await _settle(self.begin(task)))

    def step(self, action: str) -> tuple[ObsType, float, bool, bool, dict[str, Any]]:
        """Take an action. A malformed or unknown one is data: the observation says what was wrong.

        Raises:
            UsageError: Before ``reset``, after the episode's end, or ``action`` is no ``str``.
        """
        return self._acted(action, self._drive(self.act(self._ready(action))))

    async def astep(self, action: str) -> tuple[ObsType, float, bool, bool, dict[str, Any]]:
        """:meth:`step` on the running event loop."""
        return self._acted(action, await _settle(self.act(self._ready(action))))

    def close(self) -> None:
        """Release everything; a second call does nothing."""
        if not self._closed:
            self._closed, self._live = True, False
            try:
                self._drive(self.shut())
            finally:
                self._stop_loop()
        super().close()

    async def aclose(self) -> None:
        """:meth:`close` on the running event loop."""
        if not self._closed:
            self._closed, self._live = True, False
            try:
                await _settle(self.shut())
            finally:
                self._stop_loop()

    def render(self) -> Any:
        """The last observation's text, for ``render_mode="ansi"``."""
        if self._last is None:
            return ""
        return "\n".join(getattr(part, "text", "[image]") for part in self.content(self._last))

    def fresh(self) -> Env[ObsType]:
        """A new instance built with the same arguments."""
        args, kwargs = self._arguments
        made = type(self)(*args, **kwargs)
        made.spec = self.spec
        return made

    def fork(self) -> Env[ObsType]:
        """An independent environment in the same state. Use :func:`agentgym.fork` for wrapped ones.

        Raises:
            ForkUnsupported: ``fork_mode`` is ``none``.
            EnvironmentFailed: A replay did not reproduce the last observation.
        """
        if self.fork_mode == "none":
            raise ForkUnsupported(
                f"{type(self).__name__} cannot be forked", hint="start a new episode instead"
            )
        if self.fork_mode == "copy":
            made = self.copy_state()
        else:
            made = self.fresh()
            try:
                self._replay_on(made)
            except BaseException:
                made.close()
                raise
        made._np_random = copy.deepcopy(self._np_random)
        made._task, made._seed, made._score = self._task, self._seed, self._score
        made._actions, made._last, made._live = list(self._actions), self._last, self._live
        made._start = self._start
        return made

    # Shared machinery -----------------------------------------------------------------------

    def _prepare(self, seed: int | None, options: dict[str, Any] | None) -> Task:
        if self._closed:
            raise UsageError("this environment is closed", hint="make a new one")
        options = options or {}
        for key in options:
            if key not in ("task_id", "split"):
                raise UnknownName("reset option", str(key), ("task_id", "split"))
        if (task_id := options.get("task_id")) is not None:
            task = self.find_task(str(task_id))
            super().reset(seed=seed)
        else:
            tasks = self.tasks(self.require_split(options.get("split") or self._split or self.splits[0]))
            size = len(tasks)
            if not size:
                raise UsageError(
                    f"split {tasks.split!r} has no tasks", hint=f"splits: {', '.join(self.splits)}"
                )
            super().reset(seed=seed)
            # A seeded draw leaves np_random alone: drawn or named, a task begins in the same state.
            task = tasks[int(self.np_random.integers(size)) if seed is None else derive(seed, "task") % size]
        self._start = copy.deepcopy(self.np_random) if seed is None else None
        self._task, self._seed, self._actions = task, seed, []
        self._last, self._score, self._live = None, 0.0, False
        return task

    def _replay_on(self, made: Env[ObsType]) -> None:
        if self._task is None:
            return
        made._np_random = copy.deepcopy(self._start)
        made.reset(seed=self._seed, options={"task_id": self._task.id})
        for action in self._actions:
            if made._live:
                made.step(action)
        if len(made._actions) < len(self._actions) or not _same(made._last, self._last):
            raise EnvironmentFailed(
                f"replaying {len(self._actions)} actions of {self._task.id!r} did not reproduce it",
                hint="the environment is not deterministic: run `agentgym check` on it",
            )

    def _begun(self, task: Task, started: tuple[Any, Mapping[str, Any]]) -> tuple[ObsType, dict[str, Any]]:
        observation, extra = started
        self._last, self._live = observation, True
        return observation, {"task_id": task.id, "instruction": task.instruction, **extra}

    def _ready(self, action: str) -> str:
        if not isinstance(action, str):
            raise UsageError(
                f"an action is a str, not {type(action).__name__}", hint="pass the action's text to step()"
            )
        if not self._live:
            raise UsageError("step() needs a running episode", hint="call reset() first")
        return action

    def _acted(
        self, action: str, transition: Transition
    ) -> tuple[ObsType, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, extra = transition
        self._actions.append(action)
        self._last = observation
        self._score += float(reward)
        self._live = not (terminated or truncated)
        info = {"valid_action": True, "score": self._score, "success": False, **extra}
        return observation, float(reward), bool(terminated), bool(truncated), info

    def _drive(self, value: Any) -> Any:
        # The question costs a microsecond a turn, and a tuple is never awaited.
        if isinstance(value, tuple) or not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = _OwnedLoop()
        return self._loop.run(value)

    def _stop_loop(self) -> None:
        if self._loop is not None:
            self._loop.stop()
            self._loop = None


class _OwnedLoop:
    """One event loop on a thread of its own, for the sync form of an async environment."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agentgym-env-loop", daemon=True)
        self._thread.start()

    def run(self, awaitable: Awaitable[T]) -> T:
        future = asyncio.run_coroutine_threadsafe(_await(awaitable), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._loop.is_running():
            self._loop.close()


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def _settle(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    equal = left == right
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def fork(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """An independent copy of ``env`` in its present state: the base environment and every wrapper.

    A wrapper's own attributes are deep-copied; one that holds something which cannot be copied
    defines ``fork_wrapper(inner) -> wrapper``.

    Raises:
        ForkUnsupported: The base is no :class:`Env`, or declares ``fork_mode = "none"``.
    """
    if isinstance(env, gymnasium.Wrapper):
        inner = fork(env.env)
        if (own_fork := getattr(env, "fork_wrapper", None)) is not None:
            return cast("gymnasium.Env[Any, Any]", own_fork(inner))
        made = type(env).__new__(type(env))
        own = {k: v for k, v in env.__dict__.items() if k != "env"}
        # A wrapper that refers to what it wraps shall refer to the fork's.
        known = {id(env.spec): env.spec, id(env.env): inner, id(env.unwrapped): inner.unwrapped}
        made.__dict__.update(copy.deepcopy(own, known))
        made.env = inner
        return made
    if isinstance(env, Env):
        return env.fork()
    raise ForkUnsupported(
        f"{type(env).__name__} is no agentgym.Env", hint="subclass agentgym.Env to get fork()"
    )
