"""One training run: its folder, journal, learner, policy, checkpoints and metrics.

Invariant: everything a resumed run needs is in its folder; what was finished is neither lost nor done twice.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

import agentgym
from agentgym import config as configuration
from agentgym import journal
from agentgym.errors import UsageError
from agentgym.journal import FILE, Journal, load
from agentgym.policies import models
from agentgym.policies.base import Policy
from agentgym.policies.transformers import TransformersPolicy
from agentgym.registry import base, make
from agentgym.rollout.engine import Episode, RolloutEngine
from agentgym.task import TaskSet
from agentgym.trainers import checkpoint as checkpoints
from agentgym.trainers.collect import collect, environment_metrics
from agentgym.trainers.config import TrainConfig
from agentgym.trainers.learner import Learner
from agentgym.trainers.metrics import Metrics, require
from agentgym.trajectory import Trajectory


class Progress(Protocol):
    """Who watches a run."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def turn(self, trajectory: Trajectory) -> None:
        """A turn was finished."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was finished."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What an algorithm's file offers: its config, and the coroutine that trains.

    Attributes:
        config: A subclass of :class:`TrainConfig`, its defaults the paper's.
        train: ``await train(config, run)``.
        prepare: ``prepare(config, progress)`` before the run is opened; returns the config to run with. It is
            called for a resumed run too, with the config that it returned the first time.
    """

    config: type[TrainConfig]
    train: Callable[[Any, Run], Coroutine[Any, Any, None]]
    prepare: Callable[[Any, Progress], Any] | None = None


class Silent:
    """Nobody watches."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def turn(self, trajectory: Trajectory) -> None:
        """Nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""


class Run:
    """A run that is open. Use it as a context manager.

    Args:
        config: The resolved config.
        folder: The run's folder; made for a new run.
        resume: Go on with a run that the folder holds.
        progress: Who watches.

    Attributes:
        config, folder: As given.
        learner: The model that is trained.
        learners: Further models that are trained and saved with it, by name (a critic).
        policy: The model that acts; it has the learner's weights.
        journal: The record.
        restored: Trajectories that an interrupted run left, by id.
        first_step: Steps that are already done.
        extra: What the algorithm saved with the last checkpoint.

    Raises:
        UsageError: The folder holds a run and ``resume`` is not set, or the other way round.
        JournalError: Another process writes this run.
        ModelUnavailable: The model cannot be had; a new run has left no folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        self.progress: Progress = progress or Silent()
        self._resume = resume
        self._open = ExitStack()
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self._start(opening)
            self._open = opening.pop_all()
        return self

    def _start(self, opening: ExitStack) -> None:
        config, folder = self.config, self.folder
        exists = (folder / "config.toml").exists()
        if self._resume and not (exists or _died_early(folder)):
            raise UsageError(f"{folder} holds no run to resume", hint="name the folder that --out created")
        if exists and not self._resume:
            raise UsageError(
                f"{folder} already holds a run", hint=f"agentgym train --resume {folder}, or another --out"
            )
        # What cannot be had is said before there is a folder: the same --out then works with a better name.
        models.resolve(config.model.name)
        self.tasks()
        if config.evaluation.every:
            self.tasks(config.evaluation.split)
        config.env.stack()
        require(config.trackers)
        header = {
            "kind": "train",
            "config": config.model_dump(mode="json"),
            "agentgym": agentgym.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        if self._resume:
            self.journal = opening.enter_context(Journal.open(folder))
            if self.journal.repaired:
                self.progress.phase(self.journal.repaired)
            self.restored = load(folder)
        else:
            self.journal = opening.enter_context(Journal.create(folder, header))
            self.restored = {}
        if not exists:
            configuration.save(config, folder / "config.toml")
        self.progress.phase(f"loading {config.model.name}")
        torch.manual_seed(config.seed)
        model, self.tokenizer = models.load(config.model.name, dtype=torch.float32)
        self.learner = Learner(
            model,
            config.model,
            config.optimiser,
            temperature=config.rollout.temperature or 1.0,
            planned_updates=config.planned_updates,
            heads=config.learner_heads,
        )
        dtype = None if config.model.rollout_dtype == "auto" else getattr(torch, config.model.rollout_dtype)
        acting, tokenizer = models.load(config.model.name, dtype=dtype)
        self.policy = TransformersPolicy(acting, tokenizer, max_batch=config.rollout.concurrency)
        opening.callback(lambda: asyncio.run(self.policy.aclose()))
        self.first_step, self.extra = 0, dict[str, Any]()
        self.learners = dict[str, Learner]()
        self._saved = saved = checkpoints.latest(folder / "checkpoints") if self._resume else None
        if saved is not None:
            saved.restore(self.learner)
            self.first_step, self.extra = saved.step, dict(saved.extra)
            self.progress.phase(f"resumed after step {saved.step}")
        self.metrics = Metrics(folder, config.trackers, self.journal.header["config"])
        opening.callback(self.metrics.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def add_learner(self, name: str, learner: Learner) -> Learner:
        """Save ``learner`` with every checkpoint from now on; a resumed run's is restored."""
        if self._saved is not None:
            self._saved.restore(learner, name)
        self.learners[name] = learner
        return learner

    def tasks(self, split: str | None = None) -> TaskSet:
        """A split of the environment; by default the one to train on."""
        env = make(self.config.env.id, **self.config.env.kwargs)
        try:
            family = base(env)
            return family.tasks(family.require_split(split or self.config.env.split or family.splits[0]))
        finally:
            env.close()

    def engine(self, policy: Policy | None = None, *, temperature: float | None = None) -> RolloutEngine:
        """An engine for this run and ``policy``, by default the acting one; close it with ``aclose``."""
        return RolloutEngine(
            self.config.env.stack(),
            policy or self.policy,
            self.config.rollout.engine(self.config.seed, temperature=temperature),
            self.journal,
            on_turn=self.progress.turn,
        )

    async def publish(self) -> None:
        """Give the learner's weights to the acting policy; its version is the number of updates in them."""
        await self.policy.update_weights(self.learner.weights())
        self.policy.version = self.learner.updates

    async def evaluate(self, step: int) -> dict[str, float]:
        """Success on the evaluation split, as metrics; failures of infrastructure are left out."""
        section = self.config.evaluation
        self.progress.phase(f"evaluating on {section.split}")
        tasks = self.tasks(section.split)
        seed = self.config.seed if section.seed is None else section.seed
        engine = self.engine(temperature=section.temperature)
        episodes = [
            Episode(f"eval-{step:05d}-{i:05d}", task_id, section.split, group=i)
            for i, task_id in enumerate(tasks.sample(section.episodes, seed))
        ]
        try:
            ended = await collect(
                engine, episodes, self.restored, max_failure_rate=self.config.max_failure_rate
            )
        finally:
            await engine.aclose()
        seen = environment_metrics(ended)
        return {
            "eval/success": seen["success"],
            "eval/episodes": seen["episodes"] - seen["infra_failed"],
            "eval/infra_failed": seen["infra_failed"],
        }

    async def finish_step(
        self, step: int, metrics: Mapping[str, float], extra: Mapping[str, Any], *, last: bool = False
    ) -> None:
        """Record a finished step, and save a checkpoint where one is due, after the ``last`` step always."""
        every = self.config.checkpoint_every
        full = {**metrics, "time/elapsed": time.perf_counter() - self._started}
        self.journal.train(step, None, full)
        self.metrics.log(step, full)
        if last or (every and (step + 1) % every == 0) or step + 1 == self.config.steps:
            self.save(step + 1, extra)
        self.progress.step(step, full)
        await asyncio.sleep(0)  # an interrupt that came during the update is heard here

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Save a checkpoint that says ``step`` steps are done."""
        self.journal.sync()
        checkpoints.save(
            self.folder / "checkpoints",
            step,
            self.learner,
            extra,
            others=self.learners,
            keep=self.config.checkpoint_keep,
        )

    def export(self) -> Path:
        """Write the trained model as a Hugging Face folder, ``model/``; evaluate it by that path."""
        self.progress.phase("saving the model")
        return checkpoints.export(self.learner, self.policy.model, self.tokenizer, self.folder / "model")


def _died_early(folder: Path) -> bool:
    """A run left its journal alone; an evaluation leaves no more either."""
    return (folder / FILE).exists() and journal.header(folder).get("kind") == "train"
