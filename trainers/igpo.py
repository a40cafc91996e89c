"""IGPO: a tool turn's reward is what its result adds to the log-prob of the gold answer.

Source: Information Gain-based Policy Optimization (arXiv 2510.14967, second version)::

    s_t     = mean log-prob of the gold answer's tokens after turn t      (`agentgym.trainers.answer_scoring`)
    r_t     = s_t - s_(t-1)  for the tool turns t = 1 .. T-1;   r_T = the outcome
    z       = (r - mean) / (std + 1e-6)  in a pool of the group,  std = sqrt(population variance + 1e-8)
    A_t     = sum_{k >= t} gamma^(k-t) z_k

Invariant: turns are explicit units, ``[U]`` by trajectory and then time; no number, 0 included, tells
where a turn begins. Rewards are normalised first and accumulated afterwards. Statistics are of valid
members; a pool of one, or of equal rewards, gives exactly 0. The last turn of a trajectory has the outcome
and no gain, whether it answered or not.

The gains' weight and bound act *after* normalisation, which would undo a weight before it. With weight 0,
separate pools and gamma 1, and where all trajectories have one turn, the advantage is GRPO's but for the
standard deviation: the population's here, the unbiased one in `agentgym.trainers.advantages.grpo`. Returns
favour short trajectories while the mean gain is positive, and long ones while it is negative: each further
tool turn takes mean/std (``igpo/length_bias``) off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from agentgym.config import Config
from agentgym.errors import ConfigError, UsageError
from agentgym.task import TaskSet
from agentgym.trainers.advantages import group_statistics
from agentgym.trainers.answer_scoring import (
    Form,
    Query,
    WrappedAnswer,
    score_answers,
    turn_contexts,
    wrap_answer,
)
from agentgym.trainers.credit import accumulate, broadcast
from agentgym.trainers.igpo_metrics import answering_metrics, igpo_metrics, is_malformed, tool_metrics
from agentgym.trainers.method import Method, Step
from agentgym.trajectory import Trajectory

if TYPE_CHECKING:
    from agentgym.trainers.policy_gradient import PolicyGradientConfig
    from agentgym.trainers.run import Run


class IGPOSection(Config):
    """IGPO's numbers; the defaults are the paper's."""

    info_gain: Literal["log_prob", "prob"] = Field(
        "log_prob", description="prob: differences of exp(s), the first version's"
    )
    norm: Literal["separate", "joint"] = Field(
        "separate", description="gains and outcomes in a pool each, or in one"
    )
    gamma: float = Field(1.0, ge=0, le=1, description="discount from one turn to the next")
    weight: float = Field(1.0, ge=0, description="of the normalised gains")
    clip: float | None = Field(
        None, gt=0, description="bound on |z| of the gains (5 curbs noise); none: no bound"
    )
    std_floor: float = Field(0.0, ge=0, description="least standard deviation that gains are divided by")
    scorer: Form = "masked"
    alias: Literal["best", "first"] = Field(
        "best",
        description="of several gold answers, the likeliest after the prompt, for all turns; or the first",
    )
    prefix: str = Field(
        "<answer>", description="what opens the gold answer; a closing thought may stand before"
    )
    suffix: str = Field("</answer>", description="what closes it")
    malformed: Literal["keep", "drop"] = Field(
        "keep", description="the gains of a trajectory that ended without an answer; dropped ones count as 0"
    )


class Shares(NamedTuple):
    """What a collection's turns earned.

    Attributes:
        advantages: ``[U]`` float64.
        gains: ``[U]`` float64; 0 on last turns, NaN where a score is missing.
        last: ``[U]`` bool; the turn is its trajectory's last.
        counted: ``[U]`` bool; the gain is in a pool.
        z_gain: ``[U]`` float64; bounded, not weighted; 0 where not counted.
        z_outcome: ``[N]`` float64; 0 where not valid.
        bias: ``[U]`` float64; mean over standard deviation of the turn's pool of gains.
    """

    advantages: Tensor
    gains: Tensor
    last: Tensor
    counted: Tensor
    z_gain: Tensor
    z_outcome: Tensor
    bias: Tensor


def last_turns(turn_trajectory: Tensor) -> Tensor:
    """``[U]`` bool: the unit is its trajectory's last."""
    last = torch.ones_like(turn_trajectory, dtype=torch.bool)
    last[:-1] = turn_trajectory[1:] != turn_trajectory[:-1]
    return last


def info_gains(
    scores: Tensor, turn_trajectory: Tensor, kind: Literal["log_prob", "prob"] = "log_prob"
) -> Tensor:
    """What each tool turn's result added to the gold answer's score.

    Args:
        scores: ``[U]``; of the context that each turn's completion was sampled on.
        turn_trajectory: ``[U]`` integer, ascending.
        kind: ``log_prob``: of s itself; ``prob``: of exp(s).

    Returns:
        ``[U]`` float64; 0 on last turns, NaN where one of the two scores is not finite.

    Raises:
        UsageError: There is not one score a turn, or the units are out of order.
    """
    if scores.shape != turn_trajectory.shape or bool((turn_trajectory.diff() < 0).any()):
        raise UsageError(
            f"{len(scores)} scores for {len(turn_trajectory)} turns, which must stand by trajectory",
            hint="score the context of every turn, the last one's too: it holds the result of the one before",
        )
    s = torch.where(scores.isfinite(), scores.double(), float("nan"))
    s = s.exp() if kind == "prob" else s
    gains = torch.zeros_like(s)
    gains[:-1] = s.diff()
    return torch.where(last_turns(turn_trajectory), 0.0, gains)


def turn_rewards(gains: Tensor, outcomes: Tensor, turn_trajectory: Tensor) -> Tensor:
    """``[U]``: the outcome ``[N]`` on last turns, the gain ``[U]`` on those before."""
    return torch.where(last_turns(turn_trajectory), outcomes[turn_trajectory], gains)


def turn_advantages(
    scores: Tensor,
    outcomes: Tensor,
    turn_trajectory: Tensor,
    groups: Tensor,
    valid: Tensor,
    section: IGPOSection,
    malformed: Tensor | None = None,
) -> Shares:
    """IGPO's advantage of every turn.

    Args:
        scores: ``[U]``; not read in trajectories that are not valid. One that is not finite takes the gains
            at both of its sides out of the pool; they count as 0, and no other turn moves.
        outcomes: ``[N]`` rewards of trajectories; not read where not valid.
        turn_trajectory: ``[U]`` integer, ascending.
        groups: ``[N]`` integer.
        valid: ``[N]`` bool.
        section: The numbers.
        malformed: ``[N]`` bool; their gains are dropped with ``malformed = "drop"``.
    """
    gains = info_gains(scores, turn_trajectory, section.info_gain)
    counted = valid[turn_trajectory] & ~last_turns(turn_trajectory) & gains.isfinite()
    if malformed is not None and section.malformed == "drop":
        counted &= ~malformed[turn_trajectory]
    outcomes = outcomes.double()
    # Gains alone have a floor, in one pool with the outcomes too: those are divided by what the pool spreads.
    of_gains = gains, groups[turn_trajectory], counted, torch.full_like(gains, section.std_floor)
    of_outcomes = outcomes, groups, valid, torch.zeros_like(outcomes)
    if section.norm == "joint":
        z, bias = _z_scores(*map(torch.cat, zip(of_gains, of_outcomes, strict=True)))
        z_gain, z_outcome, bias = z[: len(gains)], z[len(gains) :], bias[: len(gains)]
    else:
        (z_gain, bias), (z_outcome, _) = _z_scores(*of_gains), _z_scores(*of_outcomes)
    if section.clip is not None:
        z_gain = z_gain.clamp(-section.clip, section.clip)
    rewards = turn_rewards(section.weight * z_gain, z_outcome, turn_trajectory)
    advantages = accumulate(rewards, turn_trajectory, section.gamma)
    advantages = torch.where(valid[turn_trajectory], advantages, 0.0)
    return Shares(advantages, gains, last_turns(turn_trajectory), counted, z_gain, z_outcome, bias)


def _z_scores(values: Tensor, groups: Tensor, counted: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    pool = group_statistics(values, groups, counted, ddof=0)
    std = (pool.std**2 + 1e-8).sqrt().clamp(min=floor)
    z = torch.where(counted, (values - pool.mean) / (std + 1e-6), 0.0)
    return z, torch.where(pool.equal, 0.0, pool.mean / (std + 1e-6))


class IGPO(Method):
    """Takes the place of the group advantage; needs tasks that keep ``answers`` (SearchQA's do).

    Scores are taken at the rollouts' temperature, as all of the learner's log-probs are, but never in half
    precision: its noise would be a good part of the gains.
    """

    name: ClassVar[str] = "igpo"
    refuses: ClassVar[Mapping[str, str]] = {
        "gigpo": "both give every turn an advantage of its own",
        "ppo": "a critic's advantages would be replaced",
    }

    def __init__(self, config: PolicyGradientConfig, run: Run) -> None:
        super().__init__(config, run)
        assert config.igpo is not None
        self.section = config.igpo
        self._tasks: dict[str, TaskSet] = {}
        self._wrapped: dict[tuple[str, str], list[WrappedAnswer]] = {}
        self._require_scorable()

    @classmethod
    def check(cls, config: PolicyGradientConfig) -> None:
        """Its pools are GRPO's, and groups of equal outcomes teach too."""
        if config.estimator != "grpo":
            raise ConfigError(
                f"igpo takes the place of the group advantage, and estimator {config.estimator!r} was chosen",
                hint="leave out estimator, or [igpo]",
            )
        if config.filter_groups or (config.filters is not None and config.filters.groups < 1):
            raise ConfigError(
                "filter_groups and filters.groups drop equal groups, and igpo learns from these too",
                hint="leave out filter_groups, and set filters.groups=1.0",
            )
        if config.rollout.layout == "turn":
            raise ConfigError(
                "igpo scores the answer behind all that was read, and rollout.layout='turn' forgets it",
                hint="rollout.layout='chat'",
            )

    def advantages(self, step: Step, tokens: Tensor) -> Tensor:
        """Score, normalise, accumulate; see `turn_advantages`."""
        collection, started = step.collection, time.perf_counter()
        units = collection.units
        scores = self.scores(collection.trajectories)
        step.metrics["time/igpo_score"] = time.perf_counter() - started
        known = (scores, step.rewards, units.trajectory, collection.groups, collection.valid)
        malformed = torch.tensor([is_malformed(t) for t in collection.trajectories], dtype=torch.bool)
        shares = turn_advantages(*known, self.section, malformed)
        step.metrics |= igpo_metrics(shares, *known)
        step.metrics |= answering_metrics(collection.trajectories) | tool_metrics(collection.trajectories)
        return broadcast(shares.advantages.to(tokens.dtype), units.index)

    def scores(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """``[U]`` float64: of the gold answer before each turn; NaN in trajectories that are not valid."""
        valid = [t for t in trajectories if t.valid and t.turns]
        contexts = {t.id: turn_contexts(t) for t in valid}
        chosen: dict[tuple[str, str, int], WrappedAnswer] = {}
        for t in valid:
            place, answers = (t.split, t.task_id, t.group), self.answers(t)
            if place not in chosen:
                # Fixed before the first turn: another alias later would break the gains' telescoping sum.
                first = [Query(contexts[t.id][0], a) for a in answers]
                likely = self._score(first) if len(first) > 1 else torch.zeros(1)
                chosen[place] = answers[int(likely.nan_to_num(-torch.inf).argmax())]
        queries = [Query(c, chosen[t.split, t.task_id, t.group]) for t in valid for c in contexts[t.id]]
        counted = torch.tensor([t.valid for t in trajectories for _ in t.turns], dtype=torch.bool)
        scores = torch.full(counted.shape, torch.nan, dtype=torch.float64)
        return scores.masked_scatter(counted, self._score(queries)) if queries else scores

    def answers(self, trajectory: Trajectory) -> list[WrappedAnswer]:
        """The task's gold answers, tokenised once; ConfigError where it keeps none."""
        return self._answers(trajectory.split, trajectory.task_id)

    def _require_scorable(self) -> None:
        """Refuse tasks, a tokenizer or a model that scores could not be had with, before any is sampled."""
        tasks = self.run.tasks()
        self._tasks[tasks.split] = tasks
        for id in tasks.ids[:1]:
            self._answers(tasks.split, id)
        self._score([])

    def _answers(self, split: str, id: str) -> list[WrappedAnswer]:
        if (split, id) not in self._wrapped:
            if split not in self._tasks:
                self._tasks[split] = self.run.tasks(split or None)
            task = self._tasks[split].get(id)
            answers = () if task is None else task.private.get("answers", ())
            if not answers:
                raise ConfigError(
                    f"igpo needs gold answers, and task {id!r} of {self.config.env.id} keeps none",
                    hint="train on one with answers, such as agentgym/SearchQA-v0, or leave out [igpo]",
                )
            wrapper = {"prefix": self.section.prefix, "suffix": self.section.suffix}
            taken = answers[:1] if self.section.alias == "first" else tuple(dict.fromkeys(answers))
            self._wrapped[split, id] = [wrap_answer(self.run.tokenizer, a, **wrapper) for a in taken]
        return self._wrapped[split, id]

    def _score(self, queries: Sequence[Query]) -> Tensor:
        return score_answers(
            self.run.learner.model,
            queries,
            form=self.section.scorer,
            temperature=self.run.learner.temperature,
            token_budget=self.config.optimiser.micro_batch_tokens,
        )
