"""What is logged of IGPO: the gains, their pools, and how the trajectories answered.

Invariant: means are over valid trajectories and counted gains alone, and a mean over nothing is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentgym.messages import text_of
from agentgym.tools.turn import read_turn
from agentgym.trainers.advantages import group_statistics
from agentgym.trajectory import Trajectory

if TYPE_CHECKING:
    from agentgym.trainers.igpo import Shares

_ERROR = re.compile(r"\AError: ")
_ERRORS = re.compile(r"^Result \d+, [^\n]*:\nError: ", re.MULTILINE)


def is_malformed(trajectory: Trajectory) -> bool:
    """It ended without an answer: its last turn could not be read, or a limit ended it."""
    completed = trajectory.outcome is not None and trajectory.outcome.kind == "completed"
    return not (completed and trajectory.turns and trajectory.turns[-1].valid_action)


def igpo_metrics(
    shares: Shares,
    scores: Tensor,
    outcomes: Tensor,
    turn_trajectory: Tensor,
    groups: Tensor,
    valid: Tensor,
) -> dict[str, float]:
    """``igpo/…`` of a collection; arguments as in `turn_advantages`. A mean over nothing is left out."""
    acts = valid[turn_trajectory]
    last = shares.last
    first = last.roll(1)
    missing = acts & ~last & ~shares.gains.isfinite()
    finite = acts & scores.isfinite()
    gains = shares.gains[shares.counted]
    metrics = {
        "igpo/nan_scores": float((acts & ~scores.isfinite()).sum()),
        "igpo/mismatch_fallbacks": float(len(torch.unique(turn_trajectory[missing]))),
    }

    def mean(name: str, values: Tensor) -> None:
        if len(values):
            metrics[f"igpo/{name}"] = float(values.double().mean())

    mean("s0_mean", scores[finite & first])
    mean("s_last_mean", scores[finite & last])
    mean("ig_mean", gains)
    if len(gains):
        metrics["igpo/ig_std"] = float(gains.std(correction=0))
        metrics["igpo/pool_size"] = len(gains) / len(torch.unique(groups[turn_trajectory[shares.counted]]))
    mean("ig_frac_positive", gains > 0)
    place = torch.arange(len(last)) - torch.where(first, torch.arange(len(last)), 0).cummax(0).values
    for turn in torch.unique(place[shares.counted]).tolist():
        mean(f"ig_by_turn_{turn + 1}", shares.gains[shares.counted & (place == turn)])
    mean("z_ig_abs_mean", shares.z_gain[shares.counted].abs())
    mean("z_out_abs_mean", shares.z_outcome[valid].abs())
    mean("length_bias", shares.bias[shares.counted])
    totals = torch.zeros(len(groups), dtype=torch.float64)
    totals.index_add_(0, turn_trajectory[shares.counted], gains)
    whose = torch.unique(turn_trajectory[shares.counted])
    pairs = torch.stack([totals[whose], outcomes[whose].double()])
    if len(whose) > 1 and bool((pairs.amax(1) > pairs.amin(1)).all()):
        metrics["igpo/ig_outcome_corr"] = float(torch.corrcoef(pairs)[0, 1])
    if bool(valid.any()):
        pool = group_statistics(outcomes, groups, valid)
        vote = 1.0 / pool.size[valid]
        metrics["igpo/groups_equal_outcome_frac"] = float((vote * pool.equal[valid]).sum() / vote.sum())
    return metrics


def answering_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """``env/…``: how the valid ``trajectories`` went, by what was recorded of their turns."""
    good = [t for t in trajectories if t.valid]
    turns = [turn for t in good for turn in t.turns]
    if not turns:
        return {}
    truncated = [t.outcome is not None and t.outcome.kind == "truncated" for t in good]
    return {
        "env/turns_mean": len(turns) / len(good),
        "env/answered_frac": sum(not is_malformed(t) for t in good) / len(good),
        "env/format_error_frac": sum(not turn.valid_action for turn in turns) / len(turns),
        "env/tool_calls_mean": sum(_calls(turn.action) for turn in turns) / len(good),
        "env/truncated_frac": sum(truncated) / len(good),
    }


def tool_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """``env/tool_error_frac``: the share of calls that valid ``trajectories`` were told an error of.

    An error is known by its words, ``Error: …``, as `agentgym.tools` and the families with tools say it; of
    several calls in a turn each result stands under a line ``Result N, TOOL:``.
    """
    calls = errors = 0
    for trajectory in trajectories:
        # One more than turns where the context was full before the first.
        read = [*(turn.observation for turn in trajectory.turns[1:]), trajectory.final_observation]
        for turn, result in zip(trajectory.turns, read, strict=False) if trajectory.valid else ():
            if count := _calls(turn.action):
                pattern = _ERROR if count == 1 else _ERRORS
                calls += count
                errors += min(len(pattern.findall(text_of(result))), count)
    return {"env/tool_error_frac": errors / calls} if calls else {}


def _calls(action: str) -> int:
    read = read_turn(action.rpartition("</think>")[2].strip())
    return len(read) if isinstance(read, tuple) else 0
