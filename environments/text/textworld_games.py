"""TextWorld games on disk: made on demand, kept in the cache, shared by every process.

Invariant: a game's folder is complete or absent. It is filled beside its place and renamed into it, under a
lock, so that many processes that want one game make it once; what it holds is checked against its digest
whenever it is opened, and a torn one is made anew.

Layout: ``<cache>/textworld/<TextWorld version>/<challenge>/<key>/`` with ``game.z8`` (the compiled game),
``game.json`` (TextWorld's description of it) and ``facts.json`` (objective, walkthrough, digest); the key
hashes what the game is made from. A game takes about 0.4 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from agentgym.environments.text import textworld_generator
from agentgym.errors import DeadlineExceeded, EnvironmentFailed, MissingDependency, UsageError
from agentgym.paths import cache_dir
from agentgym.task import Task

FORMAT = 1
"""Part of every key; a change in how games are made or kept is a new number."""

GENERATION_SECONDS = 100.0
"""Deadline of one game, with its process's start. Most take 1 s, a hard treasure hunt 10 s."""

_STALE_SECONDS = 3600.0


@cache
def textworld_version() -> str:
    """The installed version of TextWorld.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        return version("textworld")
    except PackageNotFoundError as error:
        raise MissingDependency("textworld", "text") from error


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a game.

    Attributes:
        challenge: ``coin_collector``, ``treasure_hunter``, ``simple``, ``cooking`` or ``custom``.
        settings: The challenge's own settings.
        seed: Which of its games.
    """

    challenge: str
    settings: Mapping[str, Any] = field(hash=False)
    seed: int

    @property
    def folder(self) -> Path:
        """Where its game is kept."""
        parts = [FORMAT, textworld_version(), self.challenge, dict(self.settings), self.seed]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
        return cache_dir("textworld", textworld_version(), self.challenge) / key


@dataclass(frozen=True)
class Game:
    """A game on disk.

    Attributes:
        path: The compiled game; TextWorld's description lies beside it.
        objective: What the player is asked to do; may be empty.
        walkthrough: Commands that win it.
        max_score: The game's own points for a win.
    """

    path: Path
    objective: str
    walkthrough: tuple[str, ...]
    max_score: int


class Solution(Mapping[str, Any]):
    """A task's private part, ``{"walkthrough": ...}``; the game is made when it is looked up."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __getitem__(self, key: str) -> tuple[str, ...]:
        if key != "walkthrough":
            raise KeyError(key)
        return obtain(self.recipe).walkthrough

    def __iter__(self) -> Iterator[str]:
        return iter(("walkthrough",))

    def __len__(self) -> int:
        return 1


def obtain(recipe: Recipe, pool: GeneratorPool | None = None) -> Game:
    """The game of ``recipe``: from the cache, or made now.

    Args:
        recipe: What to make.
        pool: Generators to use; without it one is started and stopped.

    Raises:
        UsageError: TextWorld has no game for these settings.
        DeadlineExceeded: It was not made within :data:`GENERATION_SECONDS`.
        EnvironmentFailed: The generator died.
    """
    folder = recipe.folder
    if (game := _read(folder)) is not None:
        return game
    locks = cache_dir("textworld", "locks")
    try:
        # A bounded number of lock files: games that share one merely wait for each other.
        with FileLock(locks / f"{folder.name[:2]}.lock", timeout=2 * GENERATION_SECONDS):
            if (game := _read(folder)) is None:
                game = _make(recipe, folder, pool)
            return game
    except Timeout as error:
        raise DeadlineExceeded(
            f"waiting for another process to make {recipe}", 2 * GENERATION_SECONDS
        ) from error


def generate(
    tasks: Iterable[Task], *, processes: int = 2, progress: Callable[[int, int], None] | None = None
) -> int:
    """Make the games of ``tasks`` ahead of time, in parallel.

    Args:
        tasks: Tasks of TextWorld environments.
        processes: Generators at work at once.
        progress: Called with the number of games at hand and the number of all, after each game.

    Returns:
        How many games were made; the others were in the cache.

    Raises:
        UsageError: A task is of another family, or TextWorld has no game for it.
        DeadlineExceeded: A game was not made in time.
    """
    recipes = []
    for task in tasks:
        if not isinstance(task.private, Solution):
            raise UsageError(
                f"task {task.id!r} is no TextWorld task",
                hint="pass tasks of agentgym/TextWorld-* environments",
            )
        recipes.append(task.private.recipe)
    missing = [recipe for recipe in recipes if _read(recipe.folder) is None]
    at_hand = len(recipes) - len(missing)
    if progress is not None:
        progress(at_hand, len(recipes))
    pool = GeneratorPool(processes)
    executor = ThreadPoolExecutor(processes, thread_name_prefix="textworld-generate")
    try:
        for _ in executor.map(lambda recipe: obtain(recipe, pool), missing):
            at_hand += 1
            if progress is not None:
                progress(at_hand, len(recipes))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        pool.close()
        executor.shutdown()
    return len(missing)


def _read(folder: Path) -> Game | None:
    """The game in ``folder``, or ``None`` if it is absent or torn."""
    try:
        kept = json.loads((folder / "facts.json").read_bytes())
        facts = kept["facts"]
        if kept["sha256"] != _digest(folder, facts):
            return None
        return Game(
            folder / "game.z8", facts["objective"], tuple(facts["walkthrough"]), int(facts["max_score"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(folder: Path, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in ("game.z8", "game.json"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _make(recipe: Recipe, folder: Path, pool: GeneratorPool | None) -> Game:
    _sweep(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        own = pool or GeneratorPool(1)
        try:
            facts = own.make(recipe, partial)
        finally:
            if own is not pool:
                own.close()
        (partial / "facts.json").write_text(json.dumps({"facts": facts, "sha256": _digest(partial, facts)}))
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    game = _read(folder)
    if game is None:
        raise EnvironmentFailed(f"{folder} is torn right after it was made", hint="check the disk it lies on")
    return game


def _sweep(parent: Path) -> None:
    """Remove what killed processes left half-made."""
    for partial in parent.glob("partial-*"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


class GeneratorPool:
    """Generator processes, started on demand and reused, at most ``processes`` at work at once.

    Args:
        processes: How many games may be in the making.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self.forget()

    def forget(self) -> None:
        """Start empty. After a fork the pipes are still the parent's, who goes on talking over them."""
        self._slots = threading.BoundedSemaphore(self._processes)
        self._lock = threading.Lock()
        self._all: list[_Generator] = []
        self._idle: list[_Generator] = []
        self._users = 0

    def join(self) -> GeneratorPool:
        """Count one more user; each ends with :meth:`leave`."""
        with self._lock:
            self._users += 1
        return self

    def leave(self) -> None:
        """Count one user less; the last one closes the pool."""
        with self._lock:
            self._users -= 1
            last = self._users <= 0
        if last:
            self.close()

    def make(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        """Make ``recipe``'s ``game.z8`` and ``game.json`` in ``folder``.

        Returns:
            ``objective``, ``walkthrough``, ``max_score``, and the ``attempt`` that had a game.

        Raises:
            UsageError: TextWorld has no such game.
            DeadlineExceeded: It took too long; the generator was killed.
            EnvironmentFailed: The generator died.
        """
        with self._slots:
            generator = self._take()
            while not generator.alive:
                self._drop(generator)
                generator = self._take()
            try:
                facts = generator.make(recipe, folder)
            except UsageError:
                self._give(generator)
                raise
            except BaseException:
                self._drop(generator)
                raise
            self._give(generator)
            return facts

    def close(self) -> None:
        """Kill every generator, at work or not; the pool may be used again."""
        with self._lock:
            generators, self._all, self._idle = self._all, [], []
        for generator in generators:
            generator.stop()

    def _take(self) -> _Generator:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            generator = _Generator()
            self._all.append(generator)
            return generator

    def _give(self, generator: _Generator) -> None:
        with self._lock:
            if generator in self._all:
                self._idle.append(generator)

    def _drop(self, generator: _Generator) -> None:
        with self._lock:
            if generator in self._all:
                self._all.remove(generator)
        generator.stop()


class _Generator:
    """One generator process: see :mod:`agentgym.environments.text.textworld_generator`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            textworld_generator.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=textworld_generator.environment(),
            # A group of its own: it can be killed with its compilers, and Ctrl-C is for us to handle.
            start_new_session=True,
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def make(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        request = {
            "folder": str(folder),
            "seconds": GENERATION_SECONDS,
            "challenge": recipe.challenge,
            "settings": dict(recipe.settings),
            "seed": recipe.seed,
        }
        requests, replies = self._pipes
        try:
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
            if not wait([replies.fileno()], GENERATION_SECONDS):
                late = DeadlineExceeded(f"making {recipe}", GENERATION_SECONDS)
                late.hint = "ask for a smaller world or a shorter quest"
                raise late
            reply = replies.readline()
        except (OSError, ValueError) as error:
            raise self._died(recipe) from error
        if reply == b"0\n":
            facts: dict[str, Any] = json.loads((folder / "made.json").read_text())
            for surplus in ("made.json", "game.ni"):
                (folder / surplus).unlink()
            shutil.rmtree(folder / "scratch")
            return facts
        try:
            reason = (folder / "error.txt").read_text()
        except OSError:
            raise self._died(recipe) from None
        raise UsageError(
            f"TextWorld made no game of {recipe} in {textworld_generator.ATTEMPTS} attempts: {reason}",
            hint="ask for a shorter quest, or for more rooms and objects",
        )

    def stop(self) -> None:
        # Once it was waited for, its number may be another's; the child it left has a limit of its own.
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.close()

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    @staticmethod
    def _died(recipe: Recipe) -> EnvironmentFailed:
        return EnvironmentFailed(
            f"TextWorld's generator died while making {recipe}", hint="is the machine out of memory or disk?"
        )


shared = GeneratorPool(min(4, os.cpu_count() or 1))
"""The pool of this process's environments: it is empty whenever they are all closed."""

os.register_at_fork(after_in_child=shared.forget)
