"""Statistics over seeds: a run is one number, arms are compared seed by seed.

Invariant: intervals are Student's over seeds, not over episodes: episodes of one run share its luck. The
primary figures are the mean of the last three evaluations and the mean of all (the area under the curve);
peaks are reported beside them and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t by degrees of freedom; the normal's beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
      2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
      2.045, 2.042)  # fmt: skip

Curve = Sequence[tuple[int, float]]


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval; without two seeds the interval is unbounded."""

    mean: float
    low: float
    high: float
    seeds: int


def final(curve: Curve) -> float:
    """Mean of the last three evaluations."""
    last = [value for _, value in curve[-3:]]
    return sum(last) / len(last)


def area(curve: Curve) -> float:
    """Mean of all evaluations: the area under the curve over its width."""
    return sum(value for _, value in curve) / len(curve)


def peak(curve: Curve) -> float:
    """The best evaluation."""
    return max(value for _, value in curve)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95 % interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, n)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = (_T[n - 2] if n - 2 < len(_T) else 1.96) * spread / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired(arm: Mapping[int, float], base: Mapping[int, float]) -> Estimate | None:
    """How much better ``arm`` was, seed by seed; ``None`` without a seed that both have."""
    shared = sorted(arm.keys() & base.keys())
    return estimate([arm[seed] - base[seed] for seed in shared]) if shared else None
