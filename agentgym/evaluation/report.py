"""What an evaluation found, as a table, JSON and Markdown.

Invariant: every figure is a function of the trajectories; an infrastructure failure enters none of the means
and is counted beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentgym.evaluation.statistics import (
    Difference,
    Interval,
    mean_pass_at_k,
    paired_difference,
    small_sample_note,
    success_interval,
)
from agentgym.trajectory import Trajectory

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Report:
    """One policy on one split of one environment.

    Attributes:
        env: The environment's id.
        policy: The policy's name.
        split: The split.
        seed: The run's seed: it drew the tasks.
        episodes: Episodes that were run, failed ones included.
        tasks: Distinct tasks among them.
        samples: Episodes asked for on each drawn task.
        success: Rate over valid episodes with its 95 % interval; ``None`` if every episode failed.
        reward: Mean return of valid episodes.
        turns: Mean number of turns of valid episodes.
        tokens: Sampled tokens of valid episodes; 0 for a text-speaking policy.
        invalid_actions: Share of the turns whose action the environment did not understand.
        pass_at_k: Unbiased pass@k by ``k``.
        outcomes: Number of episodes by how they ended.
        infra_failed: Episodes lost to infrastructure after all attempts.
        doubtful: Those of them that the policy's own actions may have caused.
        success_if_failures_lost: The success rate if every lost episode had been a failure.
        seconds: Wall time of this evaluation; a resumed one counts from its resumption.
        run: Folder of the run's journal, if it has one.
        notes: Sentences a reader should know before quoting a figure.
    """

    env: str
    policy: str
    split: str
    seed: int
    episodes: int
    tasks: int
    samples: int
    success: Interval | None
    reward: float | None
    turns: float | None
    tokens: int
    invalid_actions: float | None
    pass_at_k: dict[int, float]
    outcomes: dict[str, int]
    infra_failed: int
    doubtful: int
    success_if_failures_lost: float
    seconds: float
    run: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def failure_rate(self) -> float:
        """Share of the episodes lost to infrastructure."""
        return self.infra_failed / self.episodes if self.episodes else 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; means of nothing are ``null``."""
        success = self.success
        valid = self.episodes - self.infra_failed
        return {
            "env": self.env,
            "policy": self.policy,
            "split": self.split,
            "seed": self.seed,
            "episodes": self.episodes,
            "tasks": self.tasks,
            "samples": self.samples,
            "success": {
                "mean": success.mean if success else None,
                "ci95": [success.low, success.high] if success else None,
            },
            "success_if_failures_lost": self.success_if_failures_lost,
            "reward": {"mean": self.reward},
            "turns": {"mean": self.turns},
            "tokens": {"mean": self.tokens / valid if valid else None, "total": self.tokens},
            "invalid_actions": self.invalid_actions,
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "outcomes": self.outcomes,
            "infra_failed": self.infra_failed,
            "infra_failure_rate": self.failure_rate,
            "doubtful": self.doubtful,
            "seconds": round(self.seconds, 3),
            "run": self.run,
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, str]]:
        """The figures as ``(name, value)`` for a person."""
        valid = self.episodes - self.infra_failed
        of_tasks = f"{self.episodes} on {self.tasks} task{'' if self.tasks == 1 else 's'}"
        rows = [
            ("environment", f"{self.env}, split {self.split}, seed {self.seed}"),
            ("policy", self.policy),
            ("episodes", of_tasks + (f", {self.samples} samples each" if self.samples > 1 else "")),
            ("success", _percent(self.success)),
            ("reward", _number(self.reward)),
            ("turns", _number(self.turns)),
        ]
        if self.tokens:
            rows.append(("tokens", f"{self.tokens / valid:.1f} an episode, {self.tokens} in all"))
        if self.invalid_actions:
            rows.append(("invalid actions", f"{100 * self.invalid_actions:.1f} % of the turns"))
        rows += [(f"pass@{k}", f"{100 * value:.1f} %") for k, value in self.pass_at_k.items() if k > 1]
        rows.append(("outcomes", ", ".join(f"{count} {name}" for name, count in self.outcomes.items())))
        if self.infra_failed:
            lost = f"{self.infra_failed} lost ({100 * self.failure_rate:.1f} %)"
            if self.doubtful:
                lost += f", {self.doubtful} of them doubtful"
            rows.append(("infrastructure", lost))
            rows.append(("success if lost", f"{100 * self.success_if_failures_lost:.1f} %"))
        rows.append(("time", f"{self.seconds:.1f} s"))
        if self.run:
            rows.append(("episodes in", self.run))
        return rows

    def table(self) -> Table:
        """The report for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, value in self.rows():
            table.add_row(name, Text(value))
        for note in self.notes:
            table.add_row("note", Text(note, style="yellow"))
        return table

    def markdown(self) -> str:
        """The report as a Markdown table, notes below it."""
        lines = ["| figure | value |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in self.rows()]
        lines += [f"\n> {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def summarise(
    trajectories: Sequence[Trajectory],
    *,
    env: str,
    policy: str,
    split: str,
    seed: int,
    samples: int = 1,
    seconds: float = 0.0,
    run: str | None = None,
    notes: Iterable[str] = (),
) -> Report:
    """The :class:`Report` of ended trajectories.

    Args:
        trajectories: All episodes of the run, in any order.
        env: The environment's id.
        policy: The policy's name.
        split: The split.
        seed: The run's seed.
        samples: Episodes asked for on each drawn task.
        seconds: Wall time.
        run: Folder of the journal.
        notes: Said before the notes that the figures themselves call for.
    """
    valid = sorted((t for t in trajectories if t.valid), key=lambda t: t.id)
    lost = [t.outcome for t in trajectories if t.outcome is not None and not t.valid]
    tasks = [t.task_id for t in valid]
    verdicts = [t.success for t in valid]
    turns = [turn for t in valid for turn in t.turns]
    drawn, won = (
        Counter(tasks),
        Counter(task for task, verdict in zip(tasks, verdicts, strict=True) if verdict),
    )
    counts = [(drawn[task], won[task]) for task in sorted(drawn)]
    most = max(drawn.values(), default=0)
    candidates = sorted({*(2**i for i in range(most.bit_length()) if 2**i <= samples), min(samples, most)})
    passes = {k: value for k in candidates if k and (value := mean_pass_at_k(counts, k)) is not None}
    success = success_interval(verdicts, tasks, seed=seed) if valid else None
    all_notes = list(notes)
    if silent := [t for t in valid if not t.turns]:
        why = f" ({silent[0].outcome.detail})" if silent[0].outcome and silent[0].outcome.detail else ""
        all_notes.append(f"episodes that ended before their first turn: {len(silent)}{why}")
    if success is None:
        all_notes.append("every episode was lost to infrastructure: there is nothing to average")
    elif (note := small_sample_note(success, len(drawn))) is not None:
        all_notes.append(note)
    return Report(
        env=env,
        policy=policy,
        split=split,
        seed=seed,
        episodes=len(trajectories),
        tasks=len({t.task_id for t in trajectories}),
        samples=samples,
        success=success,
        reward=_mean([t.reward for t in valid]),
        turns=_mean([len(t.turns) for t in valid]),
        tokens=sum(t.sampled_tokens for t in valid),
        invalid_actions=_mean([not turn.valid_action for turn in turns]),
        pass_at_k=passes,
        outcomes=dict(sorted(Counter(str(t.outcome) for t in trajectories).items())),
        infra_failed=len(lost),
        doubtful=sum(outcome.doubtful for outcome in lost),
        success_if_failures_lost=sum(verdicts) / len(trajectories) if trajectories else 0.0,
        seconds=seconds,
        run=run,
        notes=tuple(all_notes),
    )


def compare(first: Iterable[Trajectory], second: Iterable[Trajectory], *, seed: int = 0) -> Difference:
    """The success of ``second`` minus that of ``first``, paired by task, with a 95 % interval.

    Raises:
        UsageError: The two share no task.
    """
    return paired_difference(_by_task(first), _by_task(second), seed=seed)


def _by_task(trajectories: Iterable[Trajectory]) -> dict[str, list[float]]:
    verdicts: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.valid:
            verdicts.setdefault(trajectory.task_id, []).append(float(trajectory.success))
    return verdicts


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("\\", "\\\\").replace("|", "\\|")
