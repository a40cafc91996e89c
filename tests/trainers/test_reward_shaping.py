"""DAPO's overlong penalty, and KL in the reward."""

from __future__ import annotations

import math

import pytest
import torch

from agentgym.errors import ConfigError
from agentgym.trainers.kl import kl_estimate
from agentgym.trainers.reward_shaping import kl_penalised, soft_overlong_penalty


def test_golden_overlong():
    lengths = torch.tensor([16384, 18432, 20480, 20481, 10])
    penalty = soft_overlong_penalty(lengths, max_length=20480, cache=4096)
    assert penalty.tolist() == [0, -0.5, -1, -1, 0]


def test_a_ramp_longer_than_the_limit_is_refused():
    with pytest.raises(ConfigError, match="cache"):
        soft_overlong_penalty(torch.tensor([1]), max_length=10, cache=11)


def test_the_kl_penalty_falls_on_sampled_tokens_only_and_carries_no_gradient():
    logp = torch.tensor([[-1.0, math.nan, -2.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    divergence = kl_estimate(logp, torch.tensor([[-1.2, math.nan, -1.0]]), "k1")
    rewards = kl_penalised(torch.tensor([[0.0, 0.0, 1.0]]), divergence, mask, 0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.02, 0.0, 1.1]]))
    assert not rewards.requires_grad
