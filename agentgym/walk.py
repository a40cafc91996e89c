"""Recorded walks through an environment, and where two of them part.

Invariant: a walk depends on the task and the seed alone, and its record is frozen when each call returns,
so later changes of what was returned can be seen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from agentgym.seeding import derive
from agentgym.task import Task

TURNS = 12
"""Longest walk of an item through an episode, in turns."""


@dataclass(frozen=True)
class Seen:
    """What one call returned, frozen at that moment, beside the live objects."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    frozen: Any

    @classmethod
    def of(
        cls, observation: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]
    ) -> Seen:
        """Record what ``step`` returned."""
        frozen = freeze((observation, reward, terminated, truncated, info))
        return cls(observation, reward, terminated, truncated, info, frozen)

    @property
    def done(self) -> bool:
        """Whether the episode ended here."""
        return self.terminated or self.truncated


def freeze(value: Any) -> Any:
    """An independent copy of ``value`` that compares by content, arrays too."""
    if isinstance(value, np.ndarray):
        return ("array", value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, Mapping):
        return ("mapping", tuple(sorted(((repr(k), freeze(v)) for k, v in value.items()), key=repr)))
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in value)
    return copy.deepcopy(value)


def reset(env: gymnasium.Env[Any, Any], task: Task, seed: int) -> Seen:
    """Start ``task``."""
    observation, info = env.reset(seed=seed, options={"task_id": task.id})
    return Seen.of(observation, 0.0, False, False, info)


def step(env: gymnasium.Env[Any, Any], action: str) -> Seen:
    """Take one action."""
    observation, reward, terminated, truncated, info = env.step(action)
    return Seen.of(observation, float(reward), terminated, truncated, info)


def play(env: gymnasium.Env[Any, Any], actions: Sequence[str]) -> list[Seen]:
    """Take ``actions`` until the episode ends."""
    turns: list[Seen] = []
    for action in actions:
        turns.append(step(env, action))
        if turns[-1].done:
            break
    return turns


def wander(
    env: gymnasium.Env[Any, Any], task: Task, seed: int, turns: int = TURNS
) -> tuple[list[str], list[Seen]]:
    """A seeded walk: mostly admissible actions, now and then nonsense. Returns actions and all turns."""
    draw = np.random.default_rng(derive(seed, "wander", task.id))
    seen, actions = [reset(env, task, seed)], list[str]()
    choices = ["look", "help", "1", "yes"]
    while len(actions) < turns and not seen[-1].done:
        choices = list(seen[-1].info.get("admissible_actions") or choices)
        action = "xyzzy" if draw.random() < 0.15 else str(choices[int(draw.integers(len(choices)))])
        actions.append(action)
        seen.append(step(env, action))
    return actions, seen


def first_difference(left: Sequence[Seen], right: Sequence[Seen]) -> str:
    """Where two walks part, or an empty string."""
    for turn, (a, b) in enumerate(zip(left, right, strict=False)):
        if a.frozen != b.frozen:
            names = ("observation", "reward", "terminated", "truncated", "info")
            part = next(i for i in range(5) if a.frozen[i] != b.frozen[i])
            shown = f"{short(repr(a.frozen[part]), 80)} and {short(repr(b.frozen[part]), 80)}"
            return f"{names[part]} of turn {turn} differs: {shown}"
    return "" if len(left) == len(right) else f"{len(left)} turns and {len(right)} turns"


def short(text: str, length: int = 200) -> str:
    """``text`` on one line, cut to ``length`` characters."""
    # Lone surrogates cannot be written to a terminal or a file.
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= length else text[: length - 1] + "…"
