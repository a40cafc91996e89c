"""What a shell task is made of: a seeded folder, a request in words, a solution, and a check.

Invariants: everything about a variant follows from the task's name and the variant's number, by
:class:`Draw`, whose stream Python promises to keep; a check reads what a policy left as bytes
(:class:`Tree`) and runs none of it, and where the task is a program it is told what that program did in
another sandbox (:class:`Done`).

This module and those of the tasks need nothing but Python's standard library, from 3.10 on: they are sent
into sandboxes as text. On the host only the words, the solution and the runs are asked for.
"""

from __future__ import annotations

import os
import random
import stat
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

MOST_BYTES = 4 << 20
"""Largest file of a policy that a check reads."""

MOST_ENTRIES = 20_000
"""Most files and folders of a policy that a check looks at."""

_WORDS = (
    "amber anchor basil beacon birch bramble candle canyon cedar clover cobalt coral copper crane delta "
    "dune ember falcon fern flint garnet glacier hazel heron indigo iris ivory jasper juniper kelp "
    "lantern larch laurel lichen linen lotus magnet maple marble meadow mint nectar oasis olive onyx opal "
    "orchid otter pebble pepper pine plume poppy prairie quartz quill raven reed ripple saffron sage "
    "slate sorrel sparrow spruce thistle timber topaz tulip umber velvet violet walnut willow wren yarrow "
    "zephyr zinc "
)
WORDS = tuple(_WORDS.split())


class Wrong(Exception):
    """What a policy left is not what was asked for. The message never tells what would have been right."""


class Draw:
    """Seeded choices that are the same for every version of Python.

    Args:
        key: What the stream depends on.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random("|".join(str(part) for part in key))

    def below(self, count: int) -> int:
        """A number from 0 to ``count - 1``."""
        return int(self._random.random() * count)

    def between(self, least: int, most: int) -> int:
        """A number from ``least`` to ``most``, both possible."""
        return least + self.below(most - least + 1)

    def chance(self, part: float) -> bool:
        """``True`` in ``part`` of the cases."""
        return self._random.random() < part

    def one(self, among: Sequence[T]) -> T:
        """One of them."""
        return among[self.below(len(among))]

    def shuffled(self, given: Sequence[T]) -> list[T]:
        """All of them, in a drawn order."""
        left = list(given)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]

    def some(self, among: Sequence[T], count: int) -> list[T]:
        """``count`` different ones, in a drawn order."""
        return self.shuffled(among)[:count]

    def words(self, count: int) -> list[str]:
        """Different words."""
        return self.some(WORDS, count)

    def token(self, length: int = 12) -> str:
        """Hexadecimal digits."""
        return "".join(self.one("0123456789abcdef") for _ in range(length))

    def prose(self, count: int) -> str:
        """Words with blanks between them."""
        return " ".join(self.one(WORDS) for _ in range(count))


@dataclass(frozen=True)
class Run:
    """A run of a program that a policy wrote, in a folder of its own beside the folder ``after``.

    Attributes:
        argv: Its arguments.
        stdin: What it reads.
        files: Files in its folder at the start, by name.
        keep: Files of its folder that the check wants to see afterwards.
        seconds: Its deadline.
    """

    argv: tuple[str, ...]
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    seconds: float = 10.0


@dataclass(frozen=True)
class Done:
    """What a :class:`Run` came to, as the sandbox in which it ran says.

    Attributes:
        code: Its exit status; ``None`` at its deadline.
        stdout: What it wrote.
        files: The kept files that were there.
    """

    code: int | None
    stdout: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Live:
    """What runs beside the policy. Of all that a task is, this alone comes where the policy works.

    Attributes:
        starts: A function of :mod:`agentgym.environments.code.terminal_live`.
        given: Its arguments, as JSON has them.
    """

    starts: str
    given: Mapping[str, Any]


class Chore(ABC):
    """One kind of task; an instance is one variant.

    Class attributes:
        name: Names it within its category.
        difficulty: ``easy``, ``medium`` or ``hard``.
        needs: Programs beyond bash, coreutils, grep, sed, awk, tar, gzip and python3.

    Args:
        variant: Its number.
    """

    name: ClassVar[str]
    difficulty: ClassVar[str] = "medium"
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, variant: int) -> None:
        self.variant = variant
        self.plan(self.draw("plan"))

    def draw(self, purpose: str) -> Draw:
        """A stream of choices for one purpose."""
        return Draw(self.name, self.variant, purpose)

    def plan(self, draw: Draw) -> None:  # noqa: B027 - some have nothing of the kind
        """Draw what the request, the folder and the check have in common."""

    @abstractmethod
    def asked(self) -> str:
        """The request. Paths are relative to the working directory."""

    @abstractmethod
    def lay(self, root: Path) -> None:
        """Make the files of the folder ``root``, which is empty."""

    def live(self) -> Live | None:
        """What runs while the policy works, in its sandbox; most have nothing of the kind."""
        return None

    @abstractmethod
    def oracle(self) -> list[str]:
        """Commands for bash that solve it."""

    def runs(self) -> list[Run]:
        """Runs of the program that was asked for; none where none was."""
        return []

    @abstractmethod
    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        """Compare what is there with what was asked for.

        Args:
            before: The folder as it was made, once more.
            after: What the policy left.
            done: What :meth:`runs` came to.

        Raises:
            Wrong: It is not.
        """


class Tree:
    """A folder that is only read, and no link in it followed.

    Args:
        root: The folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def kind(self, name: str) -> str:
        """``file``, ``folder``, ``link``, ``other`` or ``nothing``."""
        place = self.root
        parts = Path(name).parts
        for depth, part in enumerate(parts):
            if part == "..":
                return "nothing"
            place = place / part
            try:
                mode = os.lstat(place).st_mode
            except (OSError, ValueError):
                return "nothing"
            if depth + 1 < len(parts) and not stat.S_ISDIR(mode):
                return "nothing"
        return _kind(os.lstat(place).st_mode)

    def data(self, name: str) -> bytes:
        """A file's content.

        Raises:
            Wrong: It is missing, no regular file, or too large.
        """
        kind = self.kind(name)
        if kind != "file":
            raise Wrong(f"{name} is missing" if kind == "nothing" else f"{name} is no regular file")
        place = self.root / name
        if place.stat().st_size > MOST_BYTES:
            raise Wrong(f"{name} is too large")
        try:
            return place.read_bytes()
        except OSError as error:
            raise Wrong(f"{name} cannot be read") from error

    def text(self, name: str) -> str:
        """A file's content as UTF-8; raises as :meth:`data`."""
        try:
            return self.data(name).decode()
        except UnicodeDecodeError as error:
            raise Wrong(f"{name} is not UTF-8") from error

    def lines(self, name: str) -> list[str]:
        """A file's lines, whether its last one is ended or not; raises as :meth:`data`."""
        text = self.text(name)
        text = text[:-1] if text.endswith("\n") else text
        return text.split("\n") if text else []

    def mode(self, name: str) -> int:
        """Permission bits of a file or folder that is there."""
        return stat.S_IMODE(os.lstat(self.root / name).st_mode)

    def link(self, name: str) -> str:
        """Where a symbolic link leads.

        Raises:
            Wrong: It is none.
        """
        if self.kind(name) != "link":
            raise Wrong(f"{name} is no symbolic link")
        return os.readlink(self.root / name)

    def entries(self, under: str = "") -> dict[str, str]:
        """Everything in the folder ``under``, in all depths: kinds by name relative to it.

        Raises:
            Wrong: It is no folder, or holds too much.
        """
        if under and self.kind(under) != "folder":
            raise Wrong(f"{under} is no folder")
        found: dict[str, str] = {}
        waiting = [""]
        while waiting:
            inside = waiting.pop()
            for entry in os.scandir(self.root / under / inside):
                name = f"{inside}/{entry.name}" if inside else entry.name
                found[name] = _kind(entry.stat(follow_symlinks=False).st_mode)
                if found[name] == "folder":
                    waiting.append(name)
                if len(found) > MOST_ENTRIES:
                    raise Wrong(f"there are more than {MOST_ENTRIES} files and folders")
        return dict(sorted(found.items()))

    def files(self, under: str = "") -> dict[str, bytes]:
        """Content of every regular file in the folder ``under``; raises as :meth:`entries`."""
        kinds = self.entries(under)
        prefix = f"{under}/" if under else ""
        return {name: self.data(prefix + name) for name, kind in kinds.items() if kind == "file"}


def expect(true: bool, otherwise: str) -> None:
    """Raise :class:`Wrong` with ``otherwise`` unless it is true."""
    if not true:
        raise Wrong(otherwise)


def unchanged(before: Tree, after: Tree, *names: str) -> None:
    """These files and folders are as they were.

    Raises:
        Wrong: One is not.
    """
    for name in names:
        kind = before.kind(name)
        expect(after.kind(name) == kind, f"{name} is not what it was")
        if kind == "folder":
            expect(before.entries(name) == after.entries(name), f"what lies in {name} is not what it was")
            expect(before.files(name) == after.files(name), f"a file in {name} was changed")
        elif kind == "file":
            expect(before.data(name) == after.data(name), f"{name} was changed")
        else:
            expect(before.link(name) == after.link(name), f"{name} was changed")


def folder_is(after: Tree, name: str, wanted: Mapping[str, bytes]) -> None:
    """The folder holds these regular files and no others; empty folders do not count.

    Raises:
        Wrong: It does not.
    """
    kinds = after.entries(name)
    files = {inside for inside, kind in kinds.items() if kind != "folder"}
    if extra := sorted(files - wanted.keys()):
        raise Wrong(f"{name}/{extra[0]} should not be there")
    for inside, data in wanted.items():
        expect(after.data(f"{name}/{inside}") == data, f"{name}/{inside} has another content")


def put(place: Path, data: str | bytes, mode: int = 0o644, when: int | None = None) -> None:
    """Write a file and the folders above it; ``when`` is its time of change, in seconds."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data.encode() if isinstance(data, str) else data)
    place.chmod(mode)
    if when is not None:
        os.utime(place, (when, when))


def words(text: str) -> str:
    """A request as written in a source file: without its indentation."""
    return textwrap.dedent(text).strip()


def judged(chore: Chore, before: str, after: str, done: Sequence[Mapping[str, Any]]) -> str:
    """Empty where all is as asked, else what is not.

    An exception of another kind than :class:`Wrong` comes of what a policy left, too: the same code passes
    on what the solution leaves.
    """
    try:
        runs = [Done(run["code"], run["stdout"], run["files"]) for run in done]
        chore.check(Tree(before), Tree(after), runs)
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return f"what was left cannot be judged ({type(error).__name__})"
    return ""


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "link" if stat.S_ISLNK(mode) else "other"
