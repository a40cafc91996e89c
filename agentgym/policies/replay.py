"""Recorded completions, played again.

Invariant: what was sampled is given back as it was sampled: text, token ids, log-probs and version.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from agentgym.conversation import Renderer
from agentgym.errors import PolicyFailed
from agentgym.policies.base import Completion, FinishReason, Policy, Request, TurnView
from agentgym.trajectory import Trajectory

_log = logging.getLogger(__name__)
_REASONS: dict[str, FinishReason] = {"length": "length", "abort": "abort"}


class ReplayPolicy(Policy):
    """Plays recorded episodes: the one of the same id, else the first recorded of the same task.

    What the record lacks is logged, and ends the episode as a failure of the policy, which has no reward.

    Args:
        run: Folder of the run whose journal to play, or its trajectories by episode id.
        renderer: The template of the policy that was recorded. Give it to get prompts, and thus token
            spans, again; without it the episodes are replayed as text.
    """

    name = "replay"

    def __init__(self, run: Path | str | Mapping[str, Trajectory], renderer: Renderer | None = None) -> None:
        if isinstance(run, Path | str):
            from agentgym.journal import load

            run = load(run)
        self.renderer = renderer
        self._episodes = run
        self._tasks: dict[str, Trajectory] = {}
        for trajectory in run.values():
            self._tasks.setdefault(trajectory.task_id, trajectory)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The recorded completion of each turn.

        Raises:
            PolicyFailed: Neither the episode nor its task was recorded, or the record ends before this turn.
        """
        return [self._recorded(request.turn) for request in requests]

    def _recorded(self, view: TurnView) -> Completion:
        trajectory = self._episodes.get(view.episode) or self._tasks.get(view.task_id)
        turns = () if trajectory is None else trajectory.turns
        if trajectory is None or view.turn >= len(turns):
            raise self._missing(view, len(turns))
        turn = turns[view.turn]
        ids: tuple[int, ...] = ()
        logprobs: tuple[float, ...] = ()
        start, end = turn.span
        if end > start:
            segment = trajectory.segments[turn.segment]
            ids, logprobs = tuple(segment.token_ids[start:end]), tuple(segment.logp_rollout[start:end])
        reason = _REASONS.get(turn.finish_reason, "stop")
        return Completion(turn.completion, ids, logprobs, reason, turn.policy_version)

    def _missing(self, view: TurnView, recorded: int) -> PolicyFailed:
        if recorded:
            message = f"the record of task {view.task_id!r} ends before turn {view.turn}"
            hint = "the environment answers otherwise than when it was recorded: compare its arguments"
        else:
            message = f"neither episode {view.episode!r} nor task {view.task_id!r} was recorded"
            hint = "replay the tasks and the split that were recorded"
        _log.warning("%s", message)
        return PolicyFailed(message, hint=hint)
