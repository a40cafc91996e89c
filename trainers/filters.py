"""Filters: rows and groups that are better not learnt from (SPEAR's Dr.BoT, items 5 and 6).

Invariant: a row that is out is in no gradient, the entropy's included, and in no denominator; its trajectory
keeps its place in the group statistics. Groups are kept or dropped whole.

=============  ===========================================================================================
overlong       a completion was cut at its length, or has the most tokens one may have
incomplete     its last completion held no valid action; or it ends a trajectory that a limit on tokens,
               context, time or cost cut off before an answer
repetitive     some 20 token ids in a row occur 10 times or more in one completion
unreadable     a completion's text holds replacement or control characters, or UTF-8 read as Latin-1
=============  ===========================================================================================

An episode that used up its turns is not incomplete: it ran its course and its reward says so. Where the last
turn alone can hold the answer, as in mathematics, add ``turns`` to ``truncations``.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from agentgym.config import Config
from agentgym.errors import ConfigError, UsageError
from agentgym.outcome import TruncationReason
from agentgym.trainers.batch import Row
from agentgym.trainers.refusals import refuse_idle
from agentgym.trajectory import Trajectory

# Replacement characters; controls but tab, line feed, carriage return; surrogates; private use; and the
# openings of UTF-8 read as Latin-1 or Windows-1252: accented letters, typographic marks, emoji, a byte order
# mark.
_UNREADABLE = re.compile(
    "\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff]"
    "|[\u00c2\u00c3][\u00a0-\u00bf]|\u00e2\u20ac|\u00f0\u0178|\u00ef\u00bf\u00bd|\u00ef\u00bb\u00bf"
)


class FilterSection(Config):
    """What is left out of the loss; the defaults are Dr.BoT's."""

    overlong: bool = True
    incomplete: bool = True
    repetitive: bool = True
    unreadable: bool = True
    truncations: tuple[TruncationReason, ...] = Field(
        ("tokens", "context", "time", "cost"), description="ends that make a trajectory's last row incomplete"
    )
    ngram: int = Field(20, ge=1, description="tokens in a row that repetition is looked for in")
    repeats: int = Field(10, ge=2, description="occurrences that make a completion repetitive")
    groups: float = Field(0.75, gt=0, le=1, description="share of groups kept, by reward spread; 1: all")

    @model_validator(mode="after")
    def _acts(self) -> Self:
        for name, own in {"incomplete": ("truncations",), "repetitive": ("ngram", "repeats")}.items():
            if not getattr(self, name):
                because = f"filters.{name} is false"
                refuse_idle(self, *own, section="filters", because=because, hint=f"set filters.{name}=true")
        return self


class FilteredRows(NamedTuple):
    """Which rows are out, and why.

    Attributes:
        out: ``[R]`` bool, in the order of the rows given.
        metrics: ``filter/{overlong,incomplete,repetitive,unreadable}``: rows that each filter took out (a row
            may count in several), and ``filter/rows_out``.
    """

    out: Tensor
    metrics: dict[str, float]


def filter_rows(
    rows: Sequence[Row],
    trajectories: Sequence[Trajectory],
    section: FilterSection,
    *,
    max_tokens: int | None = None,
) -> FilteredRows:
    """Judge every row by its completions.

    Args:
        rows: Of the collection.
        trajectories: The collection's, which the rows point into.
        section: Which filters, and their numbers.
        max_tokens: The most tokens a completion may have, the end of turn included; ``None``: only the finish
            reason tells.
    """
    reasons = {
        "overlong": [section.overlong and overlong(r, trajectories, max_tokens) for r in rows],
        "incomplete": [section.incomplete and incomplete(r, trajectories, section.truncations) for r in rows],
        "repetitive": [section.repetitive and repetitive(r, section.ngram, section.repeats) for r in rows],
        "unreadable": [section.unreadable and unreadable(r, trajectories) for r in rows],
    }
    out = [any(row) for row in zip(*reasons.values(), strict=True)]
    metrics = {f"filter/{name}": float(sum(rows_out)) for name, rows_out in reasons.items()}
    return FilteredRows(torch.tensor(out, dtype=torch.bool), {**metrics, "filter/rows_out": float(sum(out))})


def overlong(row: Row, trajectories: Sequence[Trajectory], max_tokens: int | None = None) -> bool:
    """A completion of the row was cut at its length, or is as long as one may be."""
    turns = trajectories[row.trajectory].turns
    return any(
        turns[index].finish_reason == "length" or (max_tokens is not None and end - start >= max_tokens)
        for index, start, end in row.turns
    )


def incomplete(
    row: Row,
    trajectories: Sequence[Trajectory],
    truncations: Sequence[TruncationReason] = ("tokens", "context", "time", "cost"),
) -> bool:
    """The row's last completion held no valid action, or the row ends a trajectory that was cut off."""
    trajectory = trajectories[row.trajectory]
    last = max(index for index, _, _ in row.turns)
    if not trajectory.turns[last].valid_action:
        return True
    ends = last == len(trajectory.turns) - 1
    outcome = trajectory.outcome
    return ends and outcome is not None and outcome.kind == "truncated" and outcome.reason in truncations


def repetitive(row: Row, ngram: int = 20, repeats: int = 10) -> bool:
    """In a completion, some ``ngram`` tokens in a row occur at ``repeats`` places or more; overlaps count."""
    for _, start, end in row.turns:
        ids = row.segment.token_ids[start:end]
        places = len(ids) - ngram + 1
        if places < repeats:
            continue
        counts = Counter(tuple(ids[i : i + ngram]) for i in range(places))
        if max(counts.values()) >= repeats:
            return True
    return False


def unreadable(row: Row, trajectories: Sequence[Trajectory]) -> bool:
    """A completion's text is garbled: bytes that are no text, or text decoded as what it is not."""
    turns = trajectories[row.trajectory].turns
    return any(_UNREADABLE.search(turns[index].completion) is not None for index, _, _ in row.turns)


def keep_groups(
    rewards: Tensor, groups: Tensor, valid: Tensor | None = None, fraction: float = 0.75
) -> Tensor:
    """The members of the groups whose rewards spread most: whole groups, by unbiased standard deviation.

    ``floor(fraction * groups)`` of the groups with a valid member stay, at least one. All-equal groups go
    first; among equal spreads those of higher id go first. The spread is computed exactly, so the order of a
    group's members decides nothing.

    Args:
        rewards: ``[N]``.
        groups: ``[N]`` integer.
        valid: ``[N]`` bool; ``None``: all are.
        fraction: Share of groups that stay, in (0, 1].

    Returns:
        ``[N]`` bool; true for valid members of the groups that stay.

    Raises:
        UsageError: A fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"cannot keep a share of {fraction} of the groups", hint="give a share in (0, 1]")
    valid = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    members: dict[int, list[float]] = {}
    for group, reward in zip(groups[valid].tolist(), rewards[valid].tolist(), strict=True):
        members.setdefault(group, []).append(float(reward))
    spread = {
        group: statistics.variance(own) if len(own) > 1 else 0.0 for group, own in sorted(members.items())
    }
    # Sorting is stable: equal spreads stay in the groups' order.
    ranked = sorted(spread, key=lambda group: -spread[group])
    kept = ranked[: max(math.floor(fraction * len(ranked) + 1e-9), 1)]
    return torch.isin(groups, torch.tensor(kept, dtype=groups.dtype, device=groups.device)) & valid


def refuse_groups_of_one(section: FilterSection | None, *, all_equal_go: bool) -> None:
    """Refuse to choose among groups of one member by their spread, which none of them has.

    Args:
        section: Which filters; ``None``: none.
        all_equal_go: Groups of equal rewards are dropped while sampling.

    Raises:
        ConfigError: All groups would be dropped, or those of the highest ids.
    """
    if all_equal_go:
        raise ConfigError(
            "filter_groups drops groups of equal rewards, and every group of one is such a group",
            hint="set group_size above 1, or filter_groups=false",
        )
    if section is not None and section.groups < 1:
        raise ConfigError(
            f"filters.groups {section.groups:g} keeps the groups whose rewards spread most, "
            "and groups of one have no spread",
            hint="set filters.groups=1, or group_size above 1",
        )


def group_metrics(kept: Tensor, groups: Tensor) -> dict[str, float]:
    """``filter/groups_kept``: how many groups `keep_groups` left."""
    return {"filter/groups_kept": float(len(torch.unique(groups[kept])))}
