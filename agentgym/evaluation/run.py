"""Running an evaluation: draw tasks, run episodes, retry what infrastructure lost, report.

Invariants: the tasks and every seed are fixed by the config alone; each episode has one verdict; a run that
was interrupted and resumed reports on the same episodes as one that was not. In deterministic mode episodes
run in collections of ``concurrency``, and an unfinished one starts again, so even the samples are equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import agentgym
from agentgym import journal as journals
from agentgym.errors import StorageFailed, UsageError
from agentgym.evaluation.report import Report, summarise
from agentgym.journal import Journal
from agentgym.paths import atomic_write
from agentgym.policies.base import Policy, Sampling
from agentgym.redaction import redact
from agentgym.registry import base
from agentgym.rollout.engine import Episode, RolloutConfig, RolloutEngine
from agentgym.trajectory import Trajectory
from agentgym.wrappers.stack import EnvConfig

# What may differ between a run and its resumption: it changes no sample.
_FREE = frozenset({
    "agentgym", "evaluation.attempts", "evaluation.rollout.reset_seconds", "evaluation.rollout.step_seconds",
    "evaluation.rollout.generate_seconds",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """What to evaluate on, and how.

    Attributes:
        split: The split; ``None`` takes the family's default.
        episodes: Number of episodes in all, a multiple of ``samples``.
        samples: Episodes on each drawn task; more than one gives pass@k.
        seed: Draws the tasks and roots the seed tree; it replaces the one in ``rollout``.
        attempts: How often an episode is run until infrastructure lets it end.
        rollout: How episodes are run.
    """

    split: str | None = None
    episodes: int = 100
    samples: int = 1
    seed: int = 0
    attempts: int = 3
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        for name in ("episodes", "samples", "attempts"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise UsageError(f"a seed is not negative, but {self.seed} is")
        if self.episodes % self.samples:
            near = self.episodes - self.episodes % self.samples
            raise UsageError(
                f"{self.episodes} episodes cannot be shared out at {self.samples} a task",
                hint=f"take {near or self.samples} or {near + self.samples} episodes",
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationConfig:
        """The config that a run's header holds.

        Raises:
            UsageError: It was written by a version with other settings.
        """
        try:
            rollout = dict(data["rollout"])
            sampling = dict(rollout["sampling"])
            sampling["stop"] = tuple(sampling["stop"])
            rollout["sampling"] = Sampling(**sampling)
            return cls(**{**data, "rollout": RolloutConfig(**rollout)})
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"the run's config cannot be read: {error}",
                hint="it was written by another version: run it anew",
            ) from error


def evaluate(
    env: EnvConfig,
    policy: Policy,
    config: EvaluationConfig | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    name: str | None = None,
    policy_options: Mapping[str, Any] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Report:
    """:func:`aevaluate` from outside an event loop."""
    return asyncio.run(
        aevaluate(
            env,
            policy,
            config,
            out=out,
            resume=resume,
            name=name,
            policy_options=policy_options,
            on_episode=on_episode,
        )
    )


async def aevaluate(
    env: EnvConfig,
    policy: Policy,
    config: EvaluationConfig | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    name: str | None = None,
    policy_options: Mapping[str, Any] | None = None,
    on_episode: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Report:
    """Run the policy on a seeded sample of tasks.

    Args:
        env: The environment and its wrappers.
        policy: Who acts; it belongs to the caller.
        config: What to run.
        out: Folder of the run: its journal, and the report as ``report.json`` and ``report.md`` at the end.
            Nothing is kept without it.
        resume: Go on with the run in ``out``: ended episodes are read from its journal, unended ones go on,
            lost ones are tried again.
        name: The policy's name in the report; the policy's own by default.
        policy_options: What the policy was made with; saved with the run, secrets masked.
        on_episode: Called with each trajectory that has a verdict, those of the journal included.

    Returns:
        The report.

    Raises:
        UsageError: The environment cannot be evaluated so, or the run in ``out`` was another evaluation.
        JournalError: ``out`` holds a run and ``resume`` is false, or the other way round.
        StorageFailed: The journal could not be written; what was written can be resumed.
    """
    config = config or EvaluationConfig()
    started = time.perf_counter()
    split, version, episodes = _plan(env, config)
    config = replace(config, split=split, rollout=replace(config.rollout, seed=config.seed))
    name = name or policy.name
    journal, latest, notes = None, dict[str, Trajectory](), _notes(config, policy)
    if out is not None:
        header = {
            "kind": "eval",
            "env": env.to_json(),
            "policy": name,
            "policy_options": dict(policy_options or {}),
            "evaluation": dataclasses.asdict(config),
            "tasks": version,
            "agentgym": agentgym.__version__,
        }
        journal, latest = _open(out, header, resume)
        if journal.repaired:
            notes.append(journal.repaired)
            warnings.warn(journal.repaired, stacklevel=2)
    # In deterministic mode who is sampled together is part of the result.
    together = config.rollout.concurrency if config.rollout.deterministic else len(episodes)
    verdicts, unended = _kept(episodes, latest, together, config.rollout.deterministic)
    engine = RolloutEngine(env, policy, config.rollout, journal)
    try:
        for trajectory in verdicts.values():
            on_episode(trajectory)
        for _ in range(config.attempts):
            waiting = [_next(e, latest, unended) for e in episodes if e.id not in verdicts]
            for start in range(0, len(waiting), together):
                stream = engine.stream(waiting[start : start + together], restored=unended)
                # An error here ends the episodes in flight before their journal is closed.
                async with contextlib.aclosing(stream) as ended:
                    async for trajectory in ended:
                        latest[trajectory.id] = trajectory
                        if trajectory.valid:
                            verdicts[trajectory.id] = trajectory
                            on_episode(trajectory)
            unended = {}
    finally:
        await engine.aclose()
        if journal is not None:
            journal.close()
    report = summarise(
        [latest[episode.id] for episode in episodes],
        env=env.id,
        policy=name,
        split=split,
        seed=config.seed,
        samples=config.samples,
        seconds=time.perf_counter() - started,
        run=None if out is None else str(out),
        notes=notes,
    )
    if out is not None:
        _save(out, report)
    return report


def _plan(env: EnvConfig, config: EvaluationConfig) -> tuple[str, str, list[Episode]]:
    """The split, the version of its task set, and the episodes."""
    made = env.build()
    try:
        family = base(made)
        split = config.split or family.default_split
        tasks = family.tasks(family.require_split(split))
        drawn = tasks.sample(config.episodes // config.samples, config.seed)
    finally:
        made.close()
    digits = max(4, len(str(config.episodes - 1)))
    episodes = [
        Episode(f"e{group * config.samples + member:0{digits}d}", task, split, group, member)
        for group, task in enumerate(drawn)
        for member in range(config.samples)
    ]
    return split, tasks.version, episodes


def _open(out: Path, header: Mapping[str, Any], resume: bool) -> tuple[Journal, dict[str, Trajectory]]:
    """The journal to write, and the trajectories it already holds."""
    if not resume:
        return Journal.create(out, header), {}
    journal = Journal.open(out)
    try:
        if journal.header.get("kind") != "eval":
            raise UsageError(f"the run in {out} is no evaluation", hint="name the folder of an evaluation")
        wanted, had = _fixed(redact(json.loads(json.dumps(header)))), _fixed(journal.header)
        for key in sorted(wanted.keys() | had.keys()):
            if wanted.get(key) != had.get(key):
                raise UsageError(
                    f"the run in {out} has {key} = {had.get(key)!r}, not {wanted.get(key)!r}",
                    hint="resume it as it was started, or evaluate into a new folder",
                )
        return journal, journals.load(out)
    except BaseException:
        journal.close()
        raise


def _save(out: Path, report: Report) -> None:
    texts = {"report.json": json.dumps(report.to_json(), indent=1) + "\n", "report.md": report.markdown()}
    try:
        for name, text in texts.items():
            with atomic_write(out / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageFailed(
            f"cannot write the report into {out}: {error.strerror}",
            hint="the episodes are in its journal: make room, then resume the run",
        ) from error


def _fixed(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with its start, by dotted key."""
    flat = _flat(header)
    free = _FREE
    if not flat.get("evaluation.rollout.deterministic", False):
        free = free | {"evaluation.rollout.concurrency"}
    return {key: value for key, value in flat.items() if key not in free}


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _kept(
    episodes: Sequence[Episode], latest: Mapping[str, Trajectory], together: int, whole: bool
) -> tuple[dict[str, Trajectory], dict[str, Trajectory]]:
    """Of an interrupted run: the trajectories with a verdict, and those that can go on."""
    verdicts = {e.id: latest[e.id] for e in episodes if e.id in latest and latest[e.id].valid}
    if not whole:
        return verdicts, {e.id: latest[e.id] for e in episodes if e.id in latest and not latest[e.id].outcome}
    for start in range(0, len(episodes), together):
        ids = [e.id for e in episodes[start : start + together]]
        if not verdicts.keys() >= set(ids):
            verdicts = {i: t for i, t in verdicts.items() if i not in ids}
    return verdicts, {}


def _next(episode: Episode, latest: Mapping[str, Trajectory], unended: Mapping[str, Trajectory]) -> Episode:
    """The episode as its next attempt; one that goes on is the same attempt still."""
    if episode.id in latest and episode.id not in unended:
        return replace(episode, attempt=latest[episode.id].attempt + 1)
    return episode


def _notes(config: EvaluationConfig, policy: Policy) -> list[str]:
    if config.samples > 1 and policy.renderer is not None and config.rollout.sampling.temperature == 0:
        return ["at temperature 0 the samples of a task are alike: pass@k says nothing new"]
    return []
