"""One description of an environment and its wrappers: what a run, a worker and a checkpoint agree on.

Invariant: the same description builds the same stack in every process; it is plain data. From the inside
out the stack is::

    environment
    TruncateObservation   cuts what the environment says, and nothing that the wrappers say
    ActionFormat          reads completions; a malformed one stops here
    ObservationHistory    outside the format: malformed turns are remembered, with the answer they got
    ListActions           outside the history: actions are listed once, for the current turn, after
                          malformed ones too
    TimeLimit             outermost: every turn counts

A wrapper whose option is at its default is left out; the format is always there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import gymnasium

from agentgym import plugins, registry, spaces
from agentgym.actions import Parser, make_parser
from agentgym.env import Worker
from agentgym.errors import ConfigError, MissingDependency, UnknownName
from agentgym.messages import Role
from agentgym.wrappers.format import ActionFormat
from agentgym.wrappers.limits import TimeLimit
from agentgym.wrappers.observations import ListActions, ObservationHistory, TruncateObservation


@dataclass(frozen=True)
class EnvConfig:
    """An environment and its wrappers.

    Attributes:
        id: A registered id, or ``package.module:Class``.
        kwargs: Arguments of the environment; JSON values, where worker processes or saved runs are used.
        worker: Where the engine runs it; ``None``: where its class says.
        parser: Name of the action parser, see :data:`agentgym.actions.PARSERS`.
        parser_options: Its options.
        history: Earlier turns shown in front of every observation.
        history_observations: Whether they are shown with their observations, or their actions alone.
        list_actions: Whether the admissible actions are appended to the text.
        max_turns: Turns after which an episode is truncated.
        max_observation_chars: Characters of text that an observation is cut to.
        invalid_penalty: Subtracted from the reward of a turn whose completion could not be read.

    Raises:
        UsageError: A value out of its range.
        UnknownName: No such parser, parser option or worker.
    """

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    worker: Worker | None = None
    parser: str = "plain"
    parser_options: Mapping[str, Any] = field(default_factory=dict)
    history: int = 0
    history_observations: bool = True
    list_actions: bool = False
    max_turns: int | None = None
    max_observation_chars: int | None = None
    invalid_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.worker is not None and self.worker not in get_args(Worker):
            raise UnknownName("worker", self.worker, get_args(Worker))
        if self.history < 0:
            raise ConfigError(
                f"history is {self.history}", hint="give the number of turns to show, 0 for none"
            )
        # Each wrapper knows its own limits: a wrong one is refused here, not when a worker builds the stack.
        self._wrap(_Blank())

    def build(self) -> gymnasium.Env[Any, Any]:
        """Make the environment and wrap it.

        Raises:
            AgentGymError: As :func:`agentgym.make`.
        """
        return self._wrap(registry.make(self.id, **self.kwargs))

    def resolve_worker(self) -> Worker:
        """Where the engine runs it: :attr:`worker`, or what the class declares, or a thread.

        The environment's module is imported, and nothing is made.

        Raises:
            UnknownName: No such id.
            MissingDependency: The family's packages are not installed.
            UsageError: Nothing can be imported there.
        """
        if self.worker is not None:
            return self.worker
        declared: Worker = getattr(_class_of(self.id), "worker", "thread")
        return declared

    @property
    def observation_role(self) -> Role:
        """Who says an observation that answers an action: a tool, where actions are tool calls."""
        return "tool" if self.parser in ("hermes", "llama") else "user"

    def instructions(self) -> str:
        """How a policy has to answer, for a system message."""
        return self._make_parser().instructions()

    def system_message(self, system: str = "") -> str:
        """What an episode's system message is: ``system``, then how to answer.

        Plain answers need no words, and instructions that ``system`` already holds are not repeated.
        """
        instructions = "" if self.parser == "plain" else self.instructions()
        if instructions in system:
            return system
        return f"{system}\n\n{instructions}" if system else instructions

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values.

        Raises:
            ConfigError: The arguments hold something that JSON cannot.
        """
        default = EnvConfig(self.id)
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data = {k: v for k, v in data.items() if k == "id" or v != getattr(default, k)}
        try:
            return json.loads(json.dumps(data, default=_plain, allow_nan=False))  # type: ignore[no-any-return]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the arguments of {self.id} cannot be saved: {error}",
                hint="use strings, numbers, lists and tables",
            ) from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EnvConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            ConfigError: No ``id``.
            UnknownName: An unknown key.
        """
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise UnknownName("key of an environment's config", key, known)
        if "id" not in data:
            raise ConfigError("an environment's config has no id", hint="add id: a registered id")
        return cls(**data)

    def _make_parser(self) -> Parser:
        return make_parser(self.parser, **self.parser_options)

    def _wrap(self, env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
        if self.max_observation_chars is not None:
            env = TruncateObservation(env, self.max_observation_chars)
        parser = self._make_parser() if self.parser_options else self.parser
        env = ActionFormat(env, parser, self.invalid_penalty)
        if self.history:
            env = ObservationHistory(env, self.history, self.history_observations)
        if self.list_actions:
            env = ListActions(env)
        if self.max_turns is not None:
            env = TimeLimit(env, self.max_turns)
        return env


class _Blank(gymnasium.Env[str, str]):
    observation_space = spaces.Text()
    action_space = spaces.Text()


def _class_of(id: str) -> Any:
    """The class or factory behind an id."""
    if ":" in id and not id.startswith(f"{registry.NAMESPACE}:"):
        return plugins.import_path(id)
    name = registry.resolve(id)
    entry_point = gymnasium.spec(name).entry_point
    if not isinstance(entry_point, str):
        return entry_point
    try:
        return plugins.import_path(entry_point)
    except Exception as error:
        missing = error.__cause__ if isinstance(error.__cause__, ModuleNotFoundError) else None
        family = registry.families().get(name)
        if missing is not None and family is not None and family.extra:
            raise MissingDependency(missing.name or str(missing), family.extra) from error
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
