"""Intervals, pass@k and paired differences: golden values, properties, and coverage by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import UsageError
from agentgym.evaluation.statistics import (
    Interval,
    cluster_bootstrap,
    mean_pass_at_k,
    paired_difference,
    pass_at_k,
    small_sample_note,
    success_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe (1998), table I, method 3: the score method without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_agrees_with_published_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_ordered_inside_the_unit_interval_and_symmetric(counts: tuple[int, int]) -> None:
    successes, n = counts
    interval = wilson(successes, n)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.high > interval.low
    mirrored = wilson(n - successes, n)
    assert mirrored.low == pytest.approx(1 - interval.high, abs=1e-12)


@pytest.mark.parametrize("counts", [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_counts_that_cannot_be(counts: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        wilson(*counts)


def test_wilson_covers_the_true_rate_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.3, 0.5):
        drawn = rng.binomial(100, rate, size=2000)
        limits = [wilson(int(c), 100) for c in drawn]
        covered = np.mean([i.low <= rate <= i.high for i in limits])
        assert 0.93 <= covered <= 0.98


def test_bootstrap_covers_where_episodes_of_a_task_are_alike_and_wilson_does_not() -> None:
    rng = np.random.default_rng(1)
    tasks = [f"t{i}" for i in range(40) for _ in range(5)]
    clustered = naive = 0
    rounds = 200
    for index in range(rounds):
        # Half of the tasks are always solved, half never: 200 episodes are worth 40.
        verdicts = np.repeat(rng.random(40) < 0.5, 5)
        interval = cluster_bootstrap(verdicts.astype(float).tolist(), tasks, seed=index, resamples=400)
        clustered += interval.low <= 0.5 <= interval.high
        wrong = wilson(int(verdicts.sum()), len(tasks))
        naive += wrong.low <= 0.5 <= wrong.high
    assert clustered / rounds >= 0.9
    assert naive / rounds <= 0.75


def test_bootstrap_is_a_function_of_its_arguments_alone() -> None:
    values, tasks = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b", "c", "c"]
    first = cluster_bootstrap(values, tasks, seed=3)
    assert first == cluster_bootstrap(values, tasks, seed=3)
    uneven, names = [0.1 * i for i in range(30)], [f"t{i}" for i in range(30)]
    assert cluster_bootstrap(uneven, names, seed=3) != cluster_bootstrap(uneven, names, seed=4)
    order = [5, 2, 0, 4, 1, 3]
    assert first == cluster_bootstrap([values[i] for i in order], [tasks[i] for i in order], seed=3)


def test_bootstrap_of_two_clusters_by_hand() -> None:
    # Resampled means are 0, 1/2 and 1 with chances 1/4, 1/2, 1/4: the 95 % limits are the extremes.
    assert cluster_bootstrap([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"]) == Interval(0.5, 0.0, 1.0)


def test_bootstrap_in_chunks_equals_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values, tasks = [0.0, 1.0, 1.0], ["a", "b", "c"]
    whole = cluster_bootstrap(values, tasks, resamples=100)
    monkeypatch.setattr("agentgym.evaluation.statistics._CELLS", 30)
    assert cluster_bootstrap(values, tasks, resamples=100) == whole


def test_one_sample_a_task_gets_wilson_and_several_get_clusters() -> None:
    verdicts, distinct = [True, False, True, False], ["a", "b", "c", "d"]
    assert success_interval(verdicts, distinct) == wilson(2, 4)
    repeated = success_interval(verdicts, ["a", "a", "b", "b"])
    assert repeated == cluster_bootstrap([1.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b"])


@pytest.mark.parametrize("verdict", [True, False])
def test_episodes_that_all_end_alike_are_not_taken_for_certainty(verdict: bool) -> None:
    interval = success_interval([verdict] * 12, ["a", "b", "c"] * 4)
    assert interval == wilson(3 if verdict else 0, 3)
    assert interval.high - interval.low > 0.5


def test_no_episodes_have_no_interval() -> None:
    with pytest.raises(UsageError):
        success_interval([], [])
    with pytest.raises(UsageError):
        cluster_bootstrap([1.0], [])


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (10, 3, 1, 0.3),
        (10, 3, 5, 1 - 21 / 252),
        (5, 0, 3, 0.0),
        (5, 3, 3, 1.0),
        (200, 1, 100, 0.5),
        (4, 4, 1, 1.0),
    ],
)
def test_pass_at_k_golden_values(n: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_the_share_of_all_subsets_that_hold_a_correct_one(
    counts: tuple[int, int, int],
) -> None:
    n, correct, k = counts
    subsets = list(itertools.combinations([i < correct for i in range(n)], k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("counts", [(3, 1, 4), (3, 4, 1), (3, 1, 0)])
def test_pass_at_k_refuses_more_samples_than_were_drawn(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        pass_at_k(*counts)


def test_mean_pass_at_k_leaves_out_tasks_with_too_few_samples() -> None:
    assert mean_pass_at_k([(4, 2), (4, 0), (1, 1)], 2) == pytest.approx((5 / 6 + 0) / 2)
    assert mean_pass_at_k([(1, 1)], 2) is None


def test_paired_difference_sees_what_the_runs_own_intervals_cannot() -> None:
    rng = np.random.default_rng(0)
    hard = {f"t{i}": float(rng.random() < 0.5) for i in range(100)}
    # The second run solves what the first solved, and ten tasks more.
    gained = [t for t, v in hard.items() if not v][:10]
    better = {t: [1.0 if t in gained else v] for t, v in hard.items()}
    difference = paired_difference({t: [v] for t, v in hard.items()}, better)
    assert difference.tasks == 100
    assert difference.mean == pytest.approx(0.1)
    assert 0 < difference.low < difference.mean < difference.high < 0.2
    won = sum(hard.values())
    assert wilson(int(won), 100).high > wilson(int(won) + 10, 100).low


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_equal_gaps_are_no_certainty(before: float, after: float) -> None:
    few, many = (
        paired_difference({f"{i}": [before] for i in range(n)}, {f"{i}": [after] for i in range(n)})
        for n in (10, 1000)
    )
    for difference in (few, many):
        assert difference.mean == after - before
        assert -1 <= difference.low <= difference.mean <= difference.high <= 1
    assert few.high - few.low > 10 * (many.high - many.low) > 0


def test_paired_difference_is_over_shared_tasks_and_changes_sign_when_swapped() -> None:
    first = {"a": [1.0, 0.0], "b": [0.0], "only-first": [1.0]}
    second = {"a": [1.0, 1.0], "b": [0.0], "empty": []}
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there.tasks == 2 and there.mean == pytest.approx(0.25)
    assert back.mean == -there.mean
    with pytest.raises(UsageError, match="share no task"):
        paired_difference({"a": [1.0]}, {"b": [1.0]})


def test_a_small_sample_is_said_and_a_large_one_is_not() -> None:
    note = small_sample_note(wilson(5, 10), 10)
    assert note is not None and "10 tasks" in note and "97 tasks" in note
    assert small_sample_note(wilson(50, 100), 100) is None
    assert small_sample_note(wilson(0, 29), 29) is not None


def test_wanted_number_of_tasks_gives_the_promised_width() -> None:
    interval = wilson(math.ceil(97 / 2), 97)
    assert (interval.high - interval.low) / 2 == pytest.approx(0.1, abs=0.003)
