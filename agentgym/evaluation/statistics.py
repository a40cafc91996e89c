"""How sure a mean is.

Invariant: the independent unit is the task, never the episode. One sample a task is a binomial count and
gets Wilson's interval; several samples of a task are one cluster, and whole clusters are resampled. Every
result is a function of its arguments alone: the bootstrap is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from agentgym.errors import UsageError

RESAMPLES = 10_000
FEW_TASKS = 30
_CELLS = 4_000_000  # resampled indices held at once: 32 MB


class Interval(NamedTuple):
    """A mean and its two-sided confidence interval.

    Attributes:
        mean: The point estimate.
        low: Lower limit.
        high: Upper limit.
    """

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference of two runs on the tasks they share.

    Attributes:
        mean: Mean over tasks of (second minus first).
        low: Lower limit.
        high: Upper limit.
        tasks: Number of shared tasks.
    """

    mean: float
    low: float
    high: float
    tasks: int


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial proportion, without continuity correction (Wilson 1927).

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and ``n`` successes.

    Args:
        successes: Between 0 and ``n``.
        n: Number of independent trials, at least 1.
        confidence: Two-sided level.

    Raises:
        UsageError: The counts cannot be.
    """
    if not 0 <= successes <= n or n < 1:
        raise UsageError(f"{successes} successes of {n} trials cannot be")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push the limits past the estimate where they meet it.
    return Interval(p, max(0.0, min(p, (centre - half) / scale)), min(1.0, max(p, (centre + half) / scale)))


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of a mean, whole clusters drawn with replacement.

    Args:
        values: One value an episode.
        clusters: The task of each episode; same length.
        seed: Of the resampling.
        resamples: Number of bootstrap means.
        confidence: Two-sided level.

    Raises:
        UsageError: No values, or not one cluster a value.
    """
    if not values or len(values) != len(clusters):
        raise UsageError(f"{len(values)} values in {len(clusters)} clusters cannot be bootstrapped")
    # Sorted by name: the interval must not depend on the order in which episodes finished.
    names, member = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = np.bincount(member, weights=np.asarray(values, dtype=float))
    sizes = np.bincount(member).astype(float)
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, _CELLS // len(names))
    for start in range(0, resamples, chunk):
        drawn = rng.integers(len(names), size=(min(chunk, resamples - start), len(names)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    mean = float(sums.sum() / sizes.sum())
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def success_interval(successes: Sequence[bool], tasks: Sequence[str], *, seed: int = 0) -> Interval:
    """The 95 % interval of a success rate: Wilson for one sample a task, clustered bootstrap for several.

    Where every episode ended alike a bootstrap sees no variance and would claim certainty; Wilson's interval
    over the number of *tasks* stands in for it.

    Args:
        successes: One verdict an episode.
        tasks: The task of each episode; same length.
        seed: Of the bootstrap.

    Raises:
        UsageError: No episodes, or not one task a verdict.
    """
    if not successes or len(successes) != len(tasks):
        raise UsageError(f"{len(successes)} verdicts of {len(tasks)} tasks have no interval")
    distinct, won = len(set(tasks)), sum(successes)
    if distinct == len(tasks):
        return wilson(won, len(tasks))
    if won in (0, len(successes)):
        return wilson(distinct if won else 0, distinct)
    return cluster_bootstrap([float(s) for s in successes], tasks, seed=seed)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` samples is correct.

    ``1 - C(n - c, k) / C(n, k)``, computed in exact integers (Chen et al. 2021, equation 1).

    Args:
        n: Samples drawn for the task.
        correct: How many of them were correct.
        k: Between 1 and ``n``.

    Raises:
        UsageError: The counts cannot be.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise UsageError(f"pass@{k} needs at least {k} samples; got {correct} correct of {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def mean_pass_at_k(counts: Iterable[tuple[int, int]], k: int) -> float | None:
    """:func:`pass_at_k` averaged over the tasks that have ``k`` samples; the others say nothing.

    Args:
        counts: ``(samples, correct)`` of each task.
        k: At least 1.

    Returns:
        The mean, or ``None`` if no task has ``k`` samples.
    """
    values = [pass_at_k(n, correct, k) for n, correct in counts if n >= k]
    return math.fsum(values) / len(values) if values else None


def paired_difference(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], *, seed: int = 0
) -> Difference:
    """How much better ``second`` did than ``first`` on the tasks that both have, with a 95 % interval.

    Pairing by task removes the spread of the tasks' difficulty, so two runs on the same sample can be told
    apart long before their own intervals part. Tasks are resampled; each counts once. Where all gaps are
    equal a bootstrap would claim certainty: Wilson's limit for the share of tasks with another gap, none of
    which was seen, stands in for it.

    Args:
        first: The first run's values by task, in [0, 1].
        second: The second run's values by task, in [0, 1].
        seed: Of the bootstrap.

    Raises:
        UsageError: The runs share no task.
    """
    shared = sorted(task for task in first.keys() & second.keys() if len(first[task]) and len(second[task]))
    if not shared:
        raise UsageError("the two runs share no task", hint="evaluate both with the same split and seed")
    gaps = [math.fsum(second[t]) / len(second[t]) - math.fsum(first[t]) / len(first[t]) for t in shared]
    if min(gaps) == max(gaps):
        gap, unseen = gaps[0], wilson(0, len(gaps)).high
        return Difference(gap, max(-1.0, gap - unseen), min(1.0, gap + unseen), len(shared))
    return Difference(*cluster_bootstrap(gaps, shared, seed=seed), len(shared))


def small_sample_note(interval: Interval, tasks: int, *, half_width: float = 0.1) -> str | None:
    """A sentence for a result that rests on too few tasks to be told from its neighbours, else ``None``.

    Args:
        interval: Of the success rate.
        tasks: Number of distinct tasks behind it.
        half_width: The half width that counts as good enough.
    """
    reached = (interval.high - interval.low) / 2
    if tasks >= FEW_TASKS and reached <= half_width:
        return None
    z = NormalDist().inv_cdf(0.975)
    # p = 1/2 is the worst case: nobody knows the rate before the run.
    wanted = math.ceil(z * z / 4 / half_width**2)
    few = "1 task leaves" if tasks == 1 else f"{tasks} tasks leave"
    return (
        f"n is small: {few} the success rate uncertain by ±{100 * reached:.0f} points; "
        f"about {wanted} tasks give ±{100 * half_width:.0f}"
    )
