"""Advantages: golden vectors, and statistics over valid trajectories only."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentgym.errors import UsageError
from agentgym.trainers.advantages import (
    dr_grpo,
    gae,
    group_statistics,
    grpo,
    informative,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    reward_metrics,
    rloo,
    whiten,
)

ONE_GROUP = torch.zeros(4, dtype=torch.long)
GROUP_METHODS = [grpo, dr_grpo, rloo]


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, *expected: float) -> bool:
    return torch.allclose(actual.double(), f64(*expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("method", "rewards", "expected"),
    [
        (grpo, (1, 0, 0, 1), (0.866024, -0.866024, -0.866024, 0.866024)),
        (grpo, (1, 0, 0, 0), (1.499997, -0.499999, -0.499999, -0.499999)),
        (dr_grpo, (1, 0, 0, 1), (0.5, -0.5, -0.5, 0.5)),
        (rloo, (1, 0, 0, 1), (0.666667, -0.666667, -0.666667, 0.666667)),
        (rloo, (1, 0, 0, 0), (1, -0.333333, -0.333333, -0.333333)),
    ],
)
def test_golden_group_methods(method, rewards, expected):
    assert close(method(f64(*rewards), ONE_GROUP), *expected)


def test_golden_reinforce_plus_plus_baseline():
    advantages = reinforce_plus_plus_baseline(
        f64(1, 0, 1, 1), torch.tensor([0, 0, 1, 1]), torch.tensor([2, 1, 1, 2])
    )
    assert close(advantages, 1.107019, -1.549826, -0.221404, -0.221404)


def test_golden_reinforce_plus_plus():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = torch.tensor([[0, 1.0, 0], [0, 0, -1.0]], dtype=torch.float64)
    advantages = reinforce_plus_plus(rewards, mask)
    assert close(advantages[mask], 1.095445, 1.095445, -0.730297, -0.730297, -0.730297)
    assert advantages[~mask].tolist() == [0]


def test_golden_gae():
    everything = torch.ones(1, 3, dtype=torch.bool)
    estimate = gae(f64(0, 0, 1)[None], f64(0.2, 0.4, 0.6)[None], everything, gamma=1.0, lam=0.95)
    assert close(estimate.advantages[0], 0.751, 0.58, 0.4)
    assert close(estimate.returns[0], 0.951, 0.98, 1.0)


def test_golden_gae_environment_tokens_in_between_change_nothing():
    mask = torch.tensor([[True, False, True, True]])
    rewards, values = f64(0, math.nan, 0, 1)[None], f64(0.2, math.nan, 0.4, 0.6)[None]
    estimate = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert close(estimate.advantages[mask], 0.751, 0.58, 0.4)
    assert estimate.advantages[~mask].tolist() == [0]


def test_a_trajectory_in_two_rows_is_one_sequence_for_gae_and_returns():
    one = torch.ones(1, 3, dtype=torch.bool)
    rewards, values = f64(0, 0, 1), f64(0.2, 0.4, 0.6)
    whole = gae(rewards[None], values[None], one, gamma=0.9, lam=0.95).advantages[0]
    two = torch.tensor([[True, True], [True, False]])
    split = gae(
        torch.stack([rewards[:2], rewards[2:].repeat(2)]),
        torch.stack([values[:2], values[2:].repeat(2)]),
        two,
        torch.tensor([4, 4]),
        gamma=0.9,
        lam=0.95,
    ).advantages[two]
    assert torch.equal(split, whole)


def test_reinforce_plus_plus_discounts_from_one_sampled_token_to_the_next():
    mask = torch.tensor([[True, False, True, True]])
    rewards = f64(0, math.nan, 0, 1)[None]
    discounted = whiten(f64(0.81, 0.9, 1.0), torch.ones(3))
    assert torch.allclose(reinforce_plus_plus(rewards, mask, gamma=0.9)[mask], discounted)


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_a_failed_member_is_left_out_of_the_statistics_and_gets_zero(method):
    valid = torch.tensor([True, True, True, False, True, True])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    advantages = method(f64(1, 0, 0, math.nan, 1, 0), groups, valid)
    assert advantages[3] == 0
    assert torch.equal(advantages[:3], method(f64(1, 0, 0), groups[:3]))
    assert torch.equal(advantages[4:], method(f64(1, 0), groups[4:]))


def test_a_failed_trajectory_s_tokens_do_not_enter_the_whitening():
    valid = torch.tensor([True, True, False])
    groups, tokens = torch.tensor([0, 0, 0]), torch.tensor([2, 1, 500])
    advantages = reinforce_plus_plus_baseline(f64(1, 0, math.nan), groups, tokens, valid)
    assert advantages[2] == 0
    assert torch.equal(
        advantages[:2], reinforce_plus_plus_baseline(f64(1, 0), groups[:2], torch.tensor([2, 1]))
    )


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_a_group_of_one_gets_zero(method):
    groups = torch.tensor([0, 1, 1, 1])
    valid = torch.tensor([True, True, False, False])
    assert method(f64(3, 5, 1, 1), groups, valid).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("method", GROUP_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_whose_mean_rounds_give_exactly_zero(method, dtype):
    # 49 times 2.4 does not average to 2.4 in floating point: the case where a test on std > 0 fails.
    rewards = torch.full((49,), 2.4, dtype=dtype)
    advantages = method(rewards, torch.zeros(49, dtype=torch.long))
    assert advantages.dtype == dtype
    assert not advantages.any()
    assert not group_statistics(rewards, torch.zeros(49, dtype=torch.long)).std.any()


@pytest.mark.parametrize("method", GROUP_METHODS)
@pytest.mark.parametrize("members", [6, 8, 16, 32])
def test_trl_s_counter_example_equal_rewards_of_2_4_whose_std_is_2_5e_7(method, members):
    rewards = torch.full((members,), 2.4)
    naive = rewards.std()
    assert 2.4e-7 < naive.item() < 2.7e-7
    # Divided by that, a rounding error of the mean would be an advantage of order one.
    assert ((rewards - rewards.mean()) / (naive + 1e-10)).abs().max() > 0.5
    advantages = method(rewards, torch.zeros(members, dtype=torch.long))
    assert not advantages.any()
    assert not informative(rewards, torch.zeros(members, dtype=torch.long)).any()


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.3, 2.4, -7.7, 1e8]), st.booleans()), max_size=24
    )
)
@settings(max_examples=60, deadline=None)
def test_any_batch_gives_finite_advantages_that_sum_to_zero_in_every_group(members):
    groups = torch.tensor([g for g, _, _ in members], dtype=torch.long)
    rewards = torch.tensor([r for _, r, _ in members], dtype=torch.float64)
    valid = torch.tensor([v for _, _, v in members], dtype=torch.bool)
    for method in GROUP_METHODS:
        advantages = method(rewards, groups, valid)
        assert bool(advantages.isfinite().all())
        assert not advantages[~valid].any()
        for group in set(groups.tolist()):
            own = rewards[valid & (groups == group)]
            inside = advantages[groups == group]
            if len(own) == 0 or own.max() == own.min():
                assert not inside.any()
            else:
                assert abs(float(inside.sum())) <= 1e-9 * max(1.0, float(own.abs().max()))


def test_statistics_say_their_convention():
    unbiased = group_statistics(f64(1, 0, 0, 1), ONE_GROUP)
    population = group_statistics(f64(1, 0, 0, 1), ONE_GROUP, ddof=0)
    assert unbiased.std[0] == pytest.approx((1 / 3) ** 0.5)
    assert population.std[0] == pytest.approx(0.5)
    assert unbiased.size.tolist() == [4, 4, 4, 4]


def test_group_ids_need_not_be_small_or_sorted():
    groups = torch.tensor([900, -3, 900, -3])
    assert close(dr_grpo(f64(1, 5, 0, 7), groups), 0.5, -1, -0.5, 1)


def test_integer_rewards_are_welcome():
    assert close(dr_grpo(torch.tensor([1, 0, 0, 1]), ONE_GROUP), 0.5, -0.5, -0.5, 0.5)


def test_dynamic_sampling_keeps_groups_that_teach():
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    valid = torch.tensor([True, True, False, True, True, True, False, True])
    rewards = f64(1, 0, 1, 1, 1, 1, 0, 1)
    assert informative(rewards, groups, valid).tolist() == [True, True] + [False] * 6
    assert informative(rewards, groups).tolist() == [True, True, True, False, False, True, True, False]


def test_whitening_of_equal_values_of_one_value_and_of_nothing_is_zero():
    assert whiten(torch.full((49,), 2.4), torch.ones(49)).any().item() is False
    assert whiten(f64(3.0), torch.ones(1)).tolist() == [0]
    assert whiten(f64(3.0, 4.0), torch.zeros(2)).tolist() == [0, 0]


def test_a_valid_reward_that_is_not_finite_is_refused():
    with pytest.raises(UsageError, match="1 valid trajectories have a reward that is not finite"):
        grpo(f64(1, math.nan, 0, 1), ONE_GROUP)


def test_rows_instead_of_trajectories_are_refused():
    with pytest.raises(UsageError, match="vectors of one length"):
        grpo(torch.zeros(4, 7), ONE_GROUP)


def test_reward_metrics_count_groups_not_members():
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    valid = torch.tensor([True] * 6 + [False])
    metrics = reward_metrics(f64(1, 1, 0, 0, 0, 0, math.nan), groups, valid)
    assert metrics["groups_all_equal_frac"] == 0.5
    assert metrics["groups_all_zero_frac"] == 0.5
    assert metrics["group_std_mean"] == pytest.approx(0.5 * (1 / 3) ** 0.5)
    assert metrics["score/mean"] == pytest.approx(1 / 3)
    assert (metrics["score/max"], metrics["score/min"]) == (1, 0)


def test_reward_metrics_of_nothing_are_empty():
    assert reward_metrics(f64(1), torch.tensor([0]), torch.tensor([False])) == {}
