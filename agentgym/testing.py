"""Tiny real environments for tests and benchmarks.

Invariant: each keeps the whole contract of :class:`agentgym.Env` (``agentgym check`` finds nothing on them,
but :class:`CrashEnv` fails where it is told to) and needs nothing but the core. None has a registered id:
name one by its import path, ``agentgym.testing:EchoEnv``.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import gymnasium
import numpy as np

from agentgym import spaces
from agentgym.env import Env, ForkMode, Transition, Worker
from agentgym.errors import UnknownName, UsageError
from agentgym.messages import Content, ImagePart, TextPart
from agentgym.seeding import derive
from agentgym.task import Task, TaskSet, of_list

WORDS = ("apple", "bread", "chair", "dream", "eagle", "flame", "grape", "house")
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220), "white": (250, 250, 250)}
DISASTERS = ("raise", "hang", "die")


@cache
def _numbered(name: str, split: str, size: int) -> TaskSet:
    ids = [f"{name}-{split}-{i}" for i in range(size)]
    return TaskSet(split, ids, lambda task_id: Task(task_id, split, "Do anything."))


class NoopEnv(Env[str]):
    """Nothing happens for ``turns`` turns, then the reward is 1. For measuring everything around it.

    Args:
        turns: Length of an episode.
        size: Number of tasks in each split.
        render_mode: ``None`` or ``ansi``.
    """

    worker: ClassVar[Worker] = "async"
    fork_mode: ClassVar[ForkMode] = "copy"

    def __init__(self, turns: int = 5, size: int = 10_000, *, render_mode: str | None = None) -> None:
        if turns < 1 or size < 1:
            raise UsageError(f"turns and size are at least 1, not {turns} and {size}")
        self.turns, self.size = turns, size
        self._turn = 0

    def tasks(self, split: str) -> TaskSet:
        """``size`` tasks without content."""
        return _numbered("noop", self.require_split(split), self.size)

    def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """The first of ``turns`` observations."""
        self._turn = 0
        return self._observation(), {"admissible_actions": ["look", "wait"]}

    def act(self, action: str) -> Transition:
        """One turn further; every action is valid."""
        self._turn += 1
        done = self._turn == self.turns
        info = {"success": done, "admissible_actions": [] if done else ["look", "wait"]}
        return Transition(self._observation(), float(done), done, False, info)

    def expert(self, task: Task) -> Sequence[str]:
        """Waiting is enough."""
        return ["wait"] * self.turns

    def copy_state(self) -> NoopEnv:
        """The turn is the whole state."""
        made = self.fresh()
        assert isinstance(made, NoopEnv)
        made._turn = self._turn
        return made

    def _observation(self) -> str:
        return f"Turn {self._turn} of {self.turns}."


class EchoEnv(Env[str]):
    """Say the word that the observation shows; each right word earns ``1 / turns``.

    The smallest task a model can learn. Splits hold 32, 8 and 16 tasks.

    Args:
        turns: Words in an episode.
        words: How many different words there are; 2 to 8.
        render_mode: ``None`` or ``ansi``.
    """

    worker: ClassVar[Worker] = "async"
    sizes: ClassVar[dict[str, int]] = {"train": 32, "valid": 8, "test": 16}

    def __init__(self, turns: int = 1, words: int = len(WORDS), *, render_mode: str | None = None) -> None:
        if turns < 1 or not 2 <= words <= len(WORDS):
            raise UsageError(f"turns is at least 1 and words 2 to {len(WORDS)}, not {turns} and {words}")
        self.turns, self.words = turns, WORDS[:words]
        self._said = 0
        self._right = 0

    def tasks(self, split: str) -> TaskSet:
        """Tasks that differ in their words."""
        ids = [f"echo-{split}-{i}" for i in range(self.sizes[self.require_split(split)])]
        return TaskSet(split, ids, lambda i: Task(i, split, "Repeat the word.", {"turns": self.turns}))

    def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Show the first word."""
        self._said = self._right = 0
        return self._observation(task), {"admissible_actions": list(self.words)}

    def act(self, action: str) -> Transition:
        """Compare with the word shown, then show the next one."""
        said = action.strip()
        right = said == self._word(self.task, self._said)
        self._said += 1
        self._right += right
        done = self._said == self.turns
        info = {
            "valid_action": said in self.words,
            "success": self._right == self.turns,
            "admissible_actions": [] if done else list(self.words),
        }
        verdict = "Right." if right else "Wrong."
        text = verdict if done else f"{verdict} {self._observation(self.task)}"
        return Transition(text, right / self.turns, done, False, info)

    def expert(self, task: Task) -> Sequence[str]:
        """The words."""
        return [self._word(task, turn) for turn in range(self.turns)]

    def _word(self, task: Task, turn: int) -> str:
        return self.words[derive(0, task.id, turn) % len(self.words)]

    def _observation(self, task: Task) -> str:
        return f"Say: {self._word(task, self._said)}"


class AskEnv(Env[str]):
    """Ask for a private digit, then say it: two turns, and a reward only for the right digit at the end.

    A guess without asking is right now and then, and asking pays only for one who has learned to repeat the
    answer. So a policy that gives up exploring early stays at chance: the smallest game that shows it. Each
    split holds 1,000 tasks.

    Args:
        digits: How many different digits there are; 2 to 10.
        must_ask: Whether a guess without asking earns nothing.
        render_mode: ``None`` or ``ansi``.
    """

    worker: ClassVar[Worker] = "async"

    def __init__(self, digits: int = 10, must_ask: bool = False, *, render_mode: str | None = None) -> None:
        if not 2 <= digits <= 10:
            raise UsageError(f"digits is 2 to 10, not {digits}")
        self.digits, self.must_ask = [str(digit) for digit in range(digits)], must_ask
        self._turn, self._asked = 0, False

    def tasks(self, split: str) -> TaskSet:
        """1,000 tasks, each with the private ``digit``."""
        ids = [f"ask-{self.require_split(split)}-{i}" for i in range(1_000)]
        return TaskSet(split, ids, lambda task_id: self._task_of(task_id, split))

    def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Say what can be done."""
        self._turn, self._asked = 0, False
        return "Ask or wait.", {"admissible_actions": self._choices()}

    def act(self, action: str) -> Transition:
        """The first turn tells the digit to one who asks; the second one ends the episode."""
        said, self._turn = action.strip(), self._turn + 1
        digit = self.task.private["digit"]
        info: dict[str, Any] = {"valid_action": said in self._choices()}
        if self._turn == 1:
            self._asked = said == "ask"
            told = f"It is {digit}. Say it." if self._asked else "It is hidden. Say it."
            return Transition(told, info={**info, "admissible_actions": self._choices()})
        right = said == digit and (self._asked or not self.must_ask)
        info |= {"success": right, "asked": self._asked}
        return Transition("Right." if right else "Wrong.", float(right), True, False, info)

    def expert(self, task: Task) -> Sequence[str]:
        """Ask, and say what was told."""
        return ["ask", str(task.private["digit"])]

    def _choices(self) -> list[str]:
        return ["ask", *self.digits]

    def _task_of(self, task_id: str, split: str) -> Task:
        digit = self.digits[derive(0, task_id) % len(self.digits)]
        return Task(task_id, split, "Say the digit.", private={"digit": digit})


class GuessEnv(Env[str]):
    """Find a private number from "higher" and "lower". ``begin`` and ``act`` are coroutines.

    Args:
        delay: Seconds that each call sleeps on the event loop.
        turns: The episode is truncated after so many guesses.
        render_mode: ``None`` or ``ansi``.
    """

    worker: ClassVar[Worker] = "async"
    top: ClassVar[int] = 999_999

    def __init__(self, delay: float = 0.0, turns: int = 30, *, render_mode: str | None = None) -> None:
        self.delay, self.turns = delay, turns
        self._guesses = 0

    def tasks(self, split: str) -> TaskSet:
        """20 tasks a split, each with the private ``answer``."""
        ids = [f"guess-{self.require_split(split)}-{i}" for i in range(20)]
        return TaskSet(split, ids, lambda task_id: self._task_of(task_id, split))

    async def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Ask for a guess."""
        await asyncio.sleep(self.delay)
        self._guesses = 0
        return f"Guess a number from 100000 to {self.top}.", {}

    async def act(self, action: str) -> Transition:
        """Say ``higher``, ``lower`` or ``right``."""
        await asyncio.sleep(self.delay)
        self._guesses += 1
        late = self._guesses >= self.turns
        guess = action.strip()
        if not (guess.isascii() and guess.isdigit() and len(guess) <= 6):
            return Transition("That is no number.", truncated=late, info={"valid_action": False})
        answer = int(self.task.private["answer"])
        if int(guess) == answer:
            return Transition("right", 1.0, True, False, {"success": True})
        return Transition("higher" if answer > int(guess) else "lower", truncated=late)

    def expert(self, task: Task) -> Sequence[str]:
        """The answer."""
        return [str(task.private["answer"])]

    def _task_of(self, task_id: str, split: str) -> Task:
        answer = 100_000 + derive(0, task_id) % (self.top - 100_000)
        return Task(task_id, split, "Find the number.", private={"answer": str(answer)})


class ColourEnv(Env[dict[str, Any]]):
    """Name the colour of a picture: an observation with text and an image.

    Args:
        observe: ``text`` and, if asked for, ``screenshot``.
        render_mode: ``None`` or ``ansi``.
    """

    def __init__(
        self, observe: Sequence[str] = ("text", "screenshot"), *, render_mode: str | None = None
    ) -> None:
        for part in observe:
            if part not in ("text", "screenshot"):
                raise UnknownName("observation part", part, ("text", "screenshot"))
        parts: dict[str, gymnasium.Space[Any]] = {"text": spaces.Text()}
        if "screenshot" in observe:
            parts["screenshot"] = gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(parts)
        self._colour = ""

    def tasks(self, split: str) -> TaskSet:
        """One task a colour."""
        self.require_split(split)
        question = "Which colour is the picture?"
        return of_list(
            split, [Task(f"colour-{split}-{name}", split, question, {"colour": name}) for name in COLOURS]
        )

    def begin(self, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
        """Show the picture."""
        self._colour = task.metadata["colour"]
        return self._observation("Look."), {"admissible_actions": list(COLOURS)}

    def act(self, action: str) -> Transition:
        """One answer ends the episode; an unknown colour may be corrected for ever."""
        named = action.strip()
        if named not in COLOURS:
            info = {"valid_action": False, "admissible_actions": list(COLOURS)}
            return Transition(self._observation(f"Known colours: {', '.join(COLOURS)}."), info=info)
        right = named == self._colour
        return Transition(self._observation("Thank you."), float(right), True, False, {"success": right})

    def expert(self, task: Task) -> Sequence[str]:
        """The colour."""
        return [str(task.metadata["colour"])]

    def content(self, observation: dict[str, Any]) -> Content:
        """The text, then the picture as PNG."""
        text = TextPart(observation["text"])
        if "screenshot" not in observation:
            return (text,)
        return text, ImagePart(_png(observation["screenshot"]))

    def _observation(self, text: str) -> dict[str, Any]:
        observation: dict[str, Any] = {"text": text}
        assert isinstance(self.observation_space, gymnasium.spaces.Dict)
        if "screenshot" in self.observation_space.spaces:
            colour = np.array(COLOURS[self._colour], dtype=np.uint8)
            observation["screenshot"] = np.broadcast_to(colour, (16, 16, 3)).copy()
        return observation


class CrashEnv(Env[str]):
    """Fails on command, for tests of what stands around an environment.

    Actions: ``raise`` (an exception), ``hang``, ``die`` (the process exits with code 13), ``sleep S``
    (seconds), ``stop`` (the episode ends, reward 1); anything else is answered ``ok``. ``close raise``,
    ``close hang`` and ``close die`` strike when the environment is closed. The tasks ``begin-raise``,
    ``begin-hang`` and ``begin-die`` of the split ``begin`` strike in ``reset``.

    Args:
        worker: Where it asks to run.
        hang: How long ``hang`` lasts, in seconds.
        render_mode: ``None`` or ``ansi``.
    """

    worker: ClassVar[Worker] = "process"
    splits: ClassVar[tuple[str, ...]] = ("train", "begin")
    default_split: ClassVar[str] = "train"

    def __init__(
        self, worker: Worker | None = None, hang: float = 3600.0, *, render_mode: str | None = None
    ) -> None:
        if worker is not None:
            self.worker = worker  # type: ignore[misc]
        self.hang = hang
        self._at_close = ""

    def tasks(self, split: str) -> TaskSet:
        """Four calm tasks in ``train``, three disasters in ``begin``."""
        if self.require_split(split) == "begin":
            ids = [f"begin-{disaster}" for disaster in DISASTERS]
        else:
            ids = [f"calm-{i}" for i in range(4)]
        return TaskSet(split, ids, lambda task_id: Task(task_id, split, "Say stop."))

    def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Start, unless the task is a disaster."""
        if task.split == "begin":
            self._strike(task.id.removeprefix("begin-"))
        return "ready", {"admissible_actions": ["ok", "stop"]}

    def act(self, action: str) -> Transition:
        """Obey."""
        command, _, argument = action.partition(" ")
        if action in DISASTERS:
            self._strike(action)
        elif command == "close" and argument in DISASTERS:
            self._at_close = argument
        elif command == "sleep" and argument.replace(".", "", 1).isdecimal():
            time.sleep(min(float(argument), self.hang))
        elif action == "stop":
            return Transition("stopped", 1.0, True, False, {"success": True})
        return Transition("ok", info={"admissible_actions": ["ok", "stop"]})

    def expert(self, task: Task) -> Sequence[str]:
        """Stop at once."""
        return ["stop"]

    def shut(self) -> None:
        """Close, unless a disaster was ordered."""
        if self._at_close:
            self._strike(self._at_close)

    def _strike(self, disaster: str) -> None:
        if disaster == "raise":
            raise RuntimeError("raised on command")
        if disaster == "die":
            os._exit(13)
        time.sleep(self.hang)


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    """``pixels`` (height, width, 3) of uint8 as a PNG file."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\x00" + row.tobytes() for row in pixels)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)
