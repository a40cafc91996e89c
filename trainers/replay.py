"""SPEAR's replay: the optimiser steps over what was drawn from the buffer, alone or together with the base's.

Invariant: each row takes part in one optimiser step, with the log-probs of the policy that sampled it; a
replay of its own does not move the learning rate's schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentgym.seeding import derive
from agentgym.trainers.batch import Row, collate
from agentgym.trainers.learner import Loss
from agentgym.trainers.policy_loss import PolicyLossConfig
from agentgym.trainers.self_imitation import Selection, replay_tensors
from agentgym.trainers.update import Seen, make_loss, over_updates, select_tokens, split

if TYPE_CHECKING:
    from agentgym.trainers.policy_gradient import PolicyGradientConfig
    from agentgym.trainers.run import Run


class Replay:
    """One replay.

    Args:
        run: Whose learner takes part.
        config: The run's.
        number: Of the step.
        selection: What was drawn; not empty.
        loss: Clipping and covariance of the replay.
        scale: ``gamma_t c_sil``.
        parts: Optimiser steps that it takes part in.
    """

    def __init__(
        self,
        run: Run,
        config: PolicyGradientConfig,
        number: int,
        selection: Selection,
        loss: PolicyLossConfig,
        scale: float,
        parts: int,
    ) -> None:
        self.run, self.config, self.number, self.scale = run, config, number, scale
        self.loss, self.selection = loss, selection
        rows = [sample.row(i) for i, sample in enumerate(selection.samples)]
        self.tokens, self.old = replay_tensors(selection.samples, selection.advantages)
        self.mask = collate(rows).loss_mask
        self.parts = split(rows, parts, derive(self.config.seed, "spear", number, "minibatches"))
        self._done: list[dict[str, float]] = []
        self._seen: list[tuple[Seen, dict[str, float]]] = []

    def take(self, part: int) -> tuple[Sequence[Row], Loss]:
        """The rows of an optimiser step and their loss, under the present weights."""
        chosen, selected, covariance = self.parts[part], None, dict[str, float]()
        if self.loss.covariance is not None:
            own = derive(self.config.seed, "spear", self.number, "covariance", part)
            known = (self.run, self.mask, self.old, chosen, self.tokens, self.loss, own)
            selected, covariance = select_tokens(*known)
        share, seen = make_loss(
            chosen, self.tokens, loss=self.loss, correction=self.config.correction,
            old=self.old, selected=selected, scale=self.scale,
        )  # fmt: skip
        self._seen.append((seen, covariance))
        return chosen, share

    def update(self) -> None:
        """All parts, in optimiser steps of their own, which do not move the learning rate's schedule."""
        entropy = bool(self.loss.entropy_coef)
        for part in range(len(self.parts)):
            rows, share = self.take(part)
            self._done.append(self.run.learner.step(rows, share, with_entropy=entropy, scheduled=False))

    def metrics(self) -> dict[str, float]:
        """Means over the optimiser steps; a joint one has no gradient norm or time of its own."""
        seen = [told() | covariance for told, covariance in self._seen]
        found = over_updates(seen) | over_updates(self._done)
        ages = [self.number - sample.step for sample in self.selection.samples]
        time = {"time/replay": found["time/update"]} if self._done else {}
        return time | {
            "sil/updates": float(len(seen)),
            "sil/age_mean": sum(ages) / len(ages),
            "sil/age_max": float(max(ages)),
            "sil/adv_mean": sum(self.selection.advantages) / len(ages),
            **{f"sil/{ours}": found[theirs] for ours, theirs in _LOGGED.items() if theirs in found},
        }


_LOGGED = {
    "loss": "loss/pg",
    "grad_norm": "grad_norm",
    "skipped_updates": "skipped_updates",
    "clipfrac": "clipfrac_high",
    "clipfrac_lower": "clipfrac_low",
    "approx_kl": "approx_kl",
    "ratio_mean": "ratio_mean",
    "ratio_max": "ratio_max",
    "cov_mean": "cov_mean",
    "cov_max": "cov_max",
    "cov_masked_frac": "cov_masked_frac",
}
