"""GiGPO: a trajectory's advantage in its group, plus each turn's advantage among turns in the same state.

Source: Feng et al. 2025, Group-in-Group Policy Optimization, eq. 3-8::

    A(i, t) = A_E(i) + omega A_S(i, t)
    A_E     = (R_i - mean of the group) / F
    A_S     = (Q_it - mean of the anchor cluster) / F,   Q_it = sum_{k >= t} gamma^(k-t) r_ik

Invariant: statistics count trajectories (A_E) and turns (A_S), never rows or tokens, and valid ones alone; a
cluster of one, and a cluster of equal returns, get exactly 0. With ``omega = 0`` it is GRPO, or Dr.GRPO where
``norm = "none"``.

Turns are addressed as *units* (`agentgym.trainers.collect.Units`): flat vectors ``[U]``, the turns of the
first trajectory in order, then those of the second. An anchor cluster holds the units of one group that acted
in the same state: equal observations, text and images, or with ``similarity`` alike in text.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from agentgym.config import Config
from agentgym.errors import ConfigError, UsageError
from agentgym.messages import ImagePart, TextPart, text_of
from agentgym.trainers.advantages import dr_grpo, group_statistics, grpo
from agentgym.trainers.credit import accumulate, broadcast
from agentgym.trainers.method import Method, Step
from agentgym.trajectory import Trajectory, Turn

if TYPE_CHECKING:
    from agentgym.trainers.policy_gradient import PolicyGradientConfig

Norm = Literal["std", "none"]

_HISTORY = re.compile(r"Turn (\d+)\. (?:The last \d+ of \d+ earlier turns|Earlier turns):\n")


class GiGPOSection(Config):
    """GiGPO's numbers; the defaults are the paper's."""

    gamma: float = Field(0.95, ge=0, le=1, description="discount from one turn to the next")
    omega: float = Field(1.0, ge=0, description="weight of the step advantages; 0: GRPO")
    norm: Norm = Field("std", description="what advantages are divided by: std, or none as in Dr.GRPO")
    similarity: float | None = Field(
        None, gt=0, le=1, description="join observations from this ratio on (0.95; search 0.9); none: equal"
    )


def similarity_clusters(texts: Sequence[str], threshold: float) -> list[int]:
    """Clusters of texts that are alike, counted from 0; texts of ONE group.

    Greedy over the different texts in their alphabetical order: each joins the first cluster whose first text
    it resembles with a ``difflib.SequenceMatcher`` ratio of at least ``threshold``, or opens one. So the
    clusters do not depend on the order of the texts, nor on how often one occurs.

    The work grows with different texts times clusters times the square of their length.

    Args:
        texts: What is compared, character by character.
        threshold: In (0, 1]; 1 joins equal texts alone.

    Raises:
        UsageError: A threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"a similarity of {threshold}", hint="give a ratio in (0, 1]; 0.95 is usual")
    heads: list[str] = []
    cluster: dict[str, int] = {}
    # The matcher keeps what it learnt of its second text. Without autojunk: frequent characters count too.
    matcher = difflib.SequenceMatcher(None, autojunk=False)
    for text in sorted(set(texts)):
        matcher.set_seq2(text)
        place = len(heads)
        if threshold < 1:
            place = next((i for i, head in enumerate(heads) if _alike(matcher, head, threshold)), place)
        if place == len(heads):
            heads.append(text)
        cluster[text] = place
    return [cluster[text] for text in texts]


def anchor_clusters(trajectories: Sequence[Trajectory], similarity: float | None = None) -> Tensor:
    """The anchor cluster of every unit; two groups never share one.

    What is compared is the observation's text and images, in their order, without the history that
    `agentgym.wrappers.observations.ObservationHistory` puts in front: with it hardly two turns would ever
    stand in the same state.

    Args:
        trajectories: The collection's.
        similarity: Threshold of `similarity_clusters`; ``None``: equal observations alone. Images must be
            equal in either case.

    Returns:
        ``[U]`` integer.
    """
    turns = [(trajectory.group, turn) for trajectory in trajectories for turn in trajectory.turns]
    names: list[tuple[object, ...]]
    if similarity is None:
        names = [(group, _key(turn)) for group, turn in turns]
    else:
        images = [
            (group, *(part.digest for part in turn.observation if isinstance(part, ImagePart)))
            for group, turn in turns
        ]
        texts = [_current(text_of(turn.observation)) for _, turn in turns]
        names = list(images)
        for kind in dict.fromkeys(images):
            members = [u for u, own in enumerate(images) if own == kind]
            for u, cluster in zip(
                members, similarity_clusters([texts[u] for u in members], similarity), strict=True
            ):
                names[u] = (kind, cluster)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)


def step_advantages(
    returns: Tensor, clusters: Tensor, valid: Tensor | None = None, norm: Norm = "std", eps: float = 1e-6
) -> Tensor:
    """Each turn's return against its anchor cluster's (eq. 7).

    Args:
        returns: ``[U]``.
        clusters: ``[U]`` integer.
        valid: ``[U]`` bool; ``None``: all are.
        norm: ``std`` divides by the unbiased standard deviation plus ``eps``.
        eps: As said.

    Returns:
        ``[U]``; exactly 0 for units that are not valid, alone in their cluster, or in a cluster of equal
        returns.
    """
    if norm == "std":
        return grpo(returns, clusters, valid, eps=eps)
    return dr_grpo(returns, clusters, valid)


def anchor_metrics(clusters: Tensor, valid: Tensor) -> dict[str, float]:
    """How much the anchors found to compare.

    Returns:
        ``gigpo/cluster_size``: valid members of a valid unit's cluster, on average; ``gigpo/alone_frac``:
        share of valid units that are alone. Empty without a valid unit.
    """
    if not bool(valid.any()):
        return {}
    size = group_statistics(torch.zeros(len(clusters)), clusters, valid).size[valid]
    return {
        "gigpo/cluster_size": size.double().mean().item(),
        "gigpo/alone_frac": (size == 1).double().mean().item(),
    }


class GiGPO(Method):
    """Adds ``omega A_S`` to the episode advantages of the estimator, turn by turn.

    ``r_ik`` is what the environment gave for the turn, its penalty of an invalid action included. What
    shaping adds (an overlong penalty, SPEAR's bonus) judges an episode as a whole: it is in ``R_i``, and so
    in A_E, and belongs to no turn. Put on the last one it would reach an earlier turn the less, the more
    turns came after it, whatever that turn did. SPEAR's release keeps the two apart in the same way.
    """

    name = "gigpo"

    @classmethod
    def check(cls, config: PolicyGradientConfig) -> None:
        """The episode part is a group's: ``grpo`` or ``dr_grpo``."""
        if config.estimator not in ("grpo", "dr_grpo"):
            raise ConfigError(
                f"gigpo adds to episode advantages within groups, not to estimator {config.estimator!r}",
                hint="estimator='grpo', or 'dr_grpo' without division by the standard deviation",
            )

    def advantages(self, step: Step, tokens: Tensor) -> Tensor:
        """Token advantages with the step part."""
        section = self.config.gigpo
        assert section is not None
        if section.omega == 0:
            return tokens
        collection, units = step.collection, step.collection.units
        clusters = anchor_clusters(collection.trajectories, section.similarity)
        valid = collection.valid[units.trajectory]
        returns = accumulate(units.rewards, units.trajectory, section.gamma)
        own = section.omega * step_advantages(returns, clusters, valid, section.norm)
        step.metrics |= anchor_metrics(clusters, valid)
        step.metrics["gigpo/step_advantage_std"] = float(own[valid].std()) if int(valid.sum()) > 1 else 0.0
        return tokens + broadcast(own.to(tokens.dtype), units.index)


def _key(turn: Turn) -> str:
    digest = hashlib.sha256()
    for part in turn.observation:
        if isinstance(part, TextPart):
            kind, data = b"text", _current(part.text).encode("utf-8", "surrogatepass")
        else:
            kind, data = part.media_type.encode(), part.data
        digest.update(b"%d %s %d " % (len(kind), kind, len(data)))
        digest.update(data)
    return digest.hexdigest()


def _current(text: str) -> str:
    """What the environment said, without the history that a wrapper put in front of it."""
    if (header := _HISTORY.match(text)) is not None:
        return text.partition(f"\n[observation {header[1]}] ")[2] or text
    if text.startswith("Earlier actions: "):
        return text.partition("\n\n")[2] or text
    return text


def _alike(matcher: difflib.SequenceMatcher[str], head: str, threshold: float) -> bool:
    matcher.set_seq1(head)
    # The first two are upper bounds, and cheap.
    return (
        matcher.real_quick_ratio() >= threshold
        and matcher.quick_ratio() >= threshold
        and matcher.ratio() >= threshold
    )
