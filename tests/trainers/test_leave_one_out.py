"""LOOP's advantage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentgym.trainers.advantages import rloo
from agentgym.trainers.leave_one_out import loop


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def group(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.long)


def test_d3_1_golden_leave_one_out():
    advantages = loop(f64(1, 0, 0.5, 0.5, 0, 1), group(6))
    assert advantages.tolist() == pytest.approx([0.6, -0.6, 0, 0, -0.6, 0.6])


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=9), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_d3_1_d3_2_advantages_sum_to_zero_scale_with_the_rewards_and_are_the_definition(rewards, scale):
    values = f64(*rewards) / 8
    advantages = loop(values, group(len(rewards)))
    assert abs(float(advantages.sum())) < 1e-9
    assert torch.allclose(loop(scale * values, group(len(rewards))), scale * advantages, atol=1e-9)
    others = [(values.sum() - own) / (len(rewards) - 1) for own in values]
    assert torch.allclose(advantages, values - torch.stack(others), atol=1e-12)
    assert torch.equal(advantages, rloo(values, group(len(rewards))))


def test_d3_3_a_group_of_one_gets_zero():
    assert loop(f64(3.0), group(1)).tolist() == [0]


def test_d3_4_groups_of_equal_rewards_teach_exactly_nothing():
    rewards, groups = f64(2.4, 2.4, 2.4, 1, 0, 0.5), torch.tensor([0, 0, 0, 1, 1, 1])
    assert loop(rewards, groups).tolist() == [0, 0, 0, 0.75, -0.75, 0]


def test_d3_10_cancelled_members_are_in_no_mean():
    valid = torch.tensor([True, True, False, True])
    advantages = loop(f64(1, 0, math.nan, 0.5), group(4), valid)
    assert advantages.tolist() == pytest.approx([0.75, -0.75, 0, 0])
