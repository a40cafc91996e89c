"""SPEAR: imitate one's own better episodes later, explore with a bonus early (Qin et al. 2025, 2509.22601).

::

    R_i   = outcome_i + mu_t bonus_i                       mu_t    = (1 + cos(pi t / T_d)) / 2, then 0
    A~_i  = R_i - P50(mean rewards of recent groups)
    J     = J_on + gamma_t c_sil J_sil                     gamma_t = (1 - cos(pi t / T_w)) / 2, then 1

J_sil is the clipped objective over stored rows with ``A > 0`` and ``A~ > 0``, against the log-probs they were
sampled with; a few tokens of high covariance are left out. The release gives it optimiser steps of its own,
after the base's; ``replay = "joint"`` adds the two gradients, as the equation does.

Invariant: where ``gamma_t c_sil`` is 0 there is no replay step at all, so the weights are the base's bit for
bit: an optimiser step with a zero gradient would still move them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from agentgym.config import Config
from agentgym.seeding import derive
from agentgym.tools.turn import read_turn
from agentgym.trainers.batch import Row
from agentgym.trainers.collect import Collection
from agentgym.trainers.covariance import CovarianceConfig
from agentgym.trainers.learner import Loss
from agentgym.trainers.method import Method, Step
from agentgym.trainers.policy_loss import PolicyLossConfig
from agentgym.trainers.refusals import refuse_idle
from agentgym.trainers.replay import Replay
from agentgym.trainers.schedules import cosine_down, cosine_up
from agentgym.trainers.self_imitation import (
    BaselineFIFO,
    Earned,
    Sample,
    SampleBuffer,
    better,
    earnings,
)
from agentgym.trajectory import Trajectory

if TYPE_CHECKING:
    from agentgym.trainers.policy_gradient import PolicyGradientConfig
    from agentgym.trainers.run import Run


class SpearSection(Config):
    """SPEAR's numbers; the defaults are those of the authors' scripts, where a success earns 10."""

    c_sil: float = Field(1.0, ge=0, description="weight of self-imitation; 0: none")
    warmup: int = Field(200, ge=0, description="T_w, steps over which self-imitation comes in")
    intrinsic: Literal["none", "tool_calls", "turns"] = Field("none", description="what earns the bonus")
    intrinsic_coef: float = Field(1.0, ge=0, description="the largest bonus")
    intrinsic_each: float = Field(0.1, ge=0, description="share of it that each turn earns, up to all of it")
    decay: int = Field(200, ge=0, description="T_d, steps over which the bonus goes")
    bonus_at_replay: Literal["present", "stored"] = Field(
        "present", description="weigh stored bonuses by the present mu, or as they were (the release)"
    )
    baseline_size: int = Field(10240, ge=1, description="group means in the baseline; fewer follow faster")
    norm: Literal["none", "std"] = Field("none", description="divide A~ by the median of the groups' spreads")
    buffer_size: int = Field(2048, ge=1, description="rows of one replay")
    trigger: float = Field(1.5, ge=0, description="replay with more than so many buffer_size rows above P50")
    tolerate_steps: int = Field(5, ge=0, description="steps that a row may be older than the newest")
    require_success: bool = Field(False, description="store rows of successful episodes alone")
    power_of_two: bool = Field(False, description="replay a power of two of rows")
    replay: Literal["own", "joint"] = Field(
        "own", description="optimiser steps of its own, after the base's; or together with the base's"
    )
    minibatches: int = Field(1, ge=1, description="optimiser steps of a replay of its own")
    clip_low: float = Field(0.2, ge=0)
    clip_high: float = Field(0.28, ge=0)
    covariance_fraction: float = Field(0.02, ge=0, le=1, description="share of tokens left out; 0: none")
    covariance_low: float = Field(2.0, description="of tokens whose covariance is above this; see covariance")
    covariance_high: float = Field(60.0, description="and below this; rescale both with the rewards")

    def bonus(self, trajectory: Trajectory) -> float:
        """``coef min(1, each n)`` with n turns, or turns that called a tool in a way that was understood."""
        if self.intrinsic == "none":
            return 0.0
        count = tool_turns(trajectory) if self.intrinsic == "tool_calls" else len(trajectory.turns)
        return self.intrinsic_coef * min(1.0, self.intrinsic_each * count)

    def replay_loss(self, loss: PolicyLossConfig) -> PolicyLossConfig:
        """The run's loss as replay uses it: own clipping, no KL, no dual clip (A~ is positive)."""
        covariance = None
        if self.covariance_fraction:
            covariance = CovarianceConfig(
                fraction=self.covariance_fraction, low=self.covariance_low, high=self.covariance_high
            )
        return replace(
            loss,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            clip_dual=None,
            kl_coef=0.0,
            covariance=covariance,
        )


def tool_turns(trajectory: Trajectory) -> int:
    """Turns with a call of a tool that the environment understood; several calls of a turn count once."""
    return sum(turn.valid_action and isinstance(read_turn(turn.action), tuple) for turn in trajectory.turns)


class Spear(Method):
    """Self-imitation after the base's update, and a bonus that fades."""

    name = "spear"
    refuses: ClassVar[Mapping[str, str]] = {
        "ppo": "its advantages come from a critic, and the median of group means that replay compares "
        "rewards with is no baseline of theirs"
    }

    def __init__(self, config: PolicyGradientConfig, run: Run) -> None:
        super().__init__(config, run)
        assert config.spear is not None
        self.section = config.spear
        self.baseline = BaselineFIFO(self.section.baseline_size)
        self.buffer = SampleBuffer(self.section.buffer_size)
        self._shaped = self._plain = torch.zeros(0)
        self._bonuses: list[float] = []
        self._new: list[Sample] = []
        self._earned: list[Earned] = []
        self._replay: Replay | None = None

    @classmethod
    def check(cls, config: PolicyGradientConfig) -> None:
        """The replay's loss can be made.

        Raises:
            ConfigError: Of the covariance's bounds, or of ``minibatches`` in a joint replay.
        """
        assert config.spear is not None
        config.spear.replay_loss(config.loss)
        if config.spear.replay == "joint":
            because = "a joint replay is part of the base's optimiser steps"
            refuse_idle(
                config.spear, "minibatches", section="spear", because=because, hint="set spear.replay='own'"
            )

    def shape(self, number: int, collection: Collection, rewards: Tensor) -> Tensor:
        """Add ``mu_t`` times the bonus; where that is nothing, the very rewards."""
        section, mu = self.section, cosine_down(number, self.section.decay)
        self._bonuses = [section.bonus(t) if t.valid else 0.0 for t in collection.trajectories]
        added = torch.tensor(self._bonuses, dtype=rewards.dtype)
        self._plain = rewards
        self._shaped = rewards + mu * added if mu and bool(added.any()) else rewards
        return self._shaped

    def before(self, step: Step, tokens: Tensor) -> None:
        """Copy what is worth imitating, with log-probs from before the update."""
        collection, section = step.collection, self.section
        # What other methods added after this one belongs to the outcome.
        outcomes = self._plain.double() + (step.rewards - self._shaped).double()
        bonuses = torch.tensor(self._bonuses, dtype=torch.float64)
        good = collection.valid
        step.metrics["intrinsic/mu"] = cosine_down(step.number, section.decay)
        step.metrics["intrinsic/bonus_mean"] = float(bonuses[good].mean())
        counts = [tool_turns(t) for t in collection.trajectories if t.valid]
        step.metrics["intrinsic/tool_calls_mean"] = sum(counts) / len(counts)
        if section.bonus_at_replay == "stored":
            outcomes, bonuses = step.rewards.double(), torch.zeros_like(bonuses)
        self._earned = earnings(step.rewards, outcomes, bonuses, collection.groups, good)

        chosen = [row for row in step.rows if better(row, tokens[row.index])]
        if section.require_success:
            chosen = [row for row in chosen if collection.trajectories[row.trajectory].success]
        logp = step.old
        if logp is None and chosen:
            logp = self.run.learner.score(chosen)
        self._new = [
            Sample.of(
                row,
                tokens[row.index],
                logp[row.index],
                trajectory_id=collection.trajectories[row.trajectory].id,
                step=step.number,
                outcome=float(outcomes[row.trajectory]),
                bonus=float(bonuses[row.trajectory]),
                success=collection.trajectories[row.trajectory].success,
            )
            for row in chosen
            if logp is not None
        ]
        self._draw(step)

    def beside(self, step: Step, epoch: int, part: int) -> tuple[Sequence[Row], Loss] | None:
        """The part of a joint replay that belongs to an optimiser step of the first pass."""
        replay = self._replay
        if replay is None or self.section.replay == "own" or epoch or part >= len(replay.parts):
            return None
        return replay.take(part)

    def _draw(self, step: Step) -> None:
        """Draw a replay if there is enough; the buffer is empty then."""
        section, mu = self.section, cosine_down(step.number, self.section.decay)
        gamma = cosine_up(step.number, section.warmup)
        p50, spread = self.baseline.median(mu), self.baseline.median_std()
        above = 0 if p50 is None else self.buffer.above(p50, mu)
        triggered = p50 is not None and above > section.trigger * section.buffer_size
        self._replay = None
        metrics = step.metrics
        metrics |= {
            "sil/buffer_rows": float(len(self.buffer)),
            "sil/buffer_rows_above_p50": float(above),
            "sil/triggered": float(triggered),
            "sil/gamma": gamma,
            "sil/updates": 0.0,
            "baseline/fifo_size": float(len(self.baseline)),
        }
        if p50 is None or spread is None:
            return
        metrics |= {"baseline/p50": p50, "baseline/p50_std": spread}
        if triggered:
            selection = self.buffer.take(
                p50, mu, derive(self.config.seed, "spear", step.number),
                std=spread if section.norm == "std" else None, power_of_two=section.power_of_two,
            )  # fmt: skip
            metrics |= {
                "sil/n_eligible": float(selection.eligible),
                "sil/n_selected": float(len(selection.samples)),
                "sil/n_discarded": float(selection.eligible - len(selection.samples)),
                "sil/n_dropped_nonpositive": float(selection.dropped),
            }
            if selection.samples and gamma * section.c_sil:
                loss = section.replay_loss(self.config.loss)
                parts = section.minibatches if section.replay == "own" else self.config.minibatches
                self._replay = Replay(
                    self.run, self.config, step.number, selection, loss, gamma * section.c_sil, parts
                )

    def finish(self, step: Step, tokens: Tensor) -> None:
        """Replay, then let the old go and the new in; the baseline moves last."""
        if self._replay is not None:
            if self.section.replay == "own":
                self._replay.update()
            step.metrics |= self._replay.metrics()
        self._replay = None
        self.buffer.evict(self.section.tolerate_steps)
        self.buffer.insert(self._new)
        self.baseline.push(self._earned)
        self._new, self._earned = [], []

    def state(self) -> dict[str, Any]:
        """Both buffers."""
        return {
            "baseline": [[list(group) for group in step] for step in self.baseline.steps],
            "samples": [sample.state() for sample in self.buffer.samples],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Both buffers."""
        steps: Sequence[Sequence[Sequence[float]]] = state["baseline"]
        self.baseline.steps.clear()
        self.baseline.steps.extend([Earned(*group) for group in step] for step in steps)
        self.buffer.samples = [Sample.load(sample) for sample in state["samples"]]
