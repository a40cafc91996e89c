"""The critic's clipped loss."""

from __future__ import annotations

import math

import pytest
import torch

from agentgym.trainers.aggregation import Denominators
from agentgym.trainers.value_loss import value_loss


def loss_of(value: float, old: float, target: float, clip: float | None) -> float:
    row = [torch.tensor([[x, math.nan]], dtype=torch.float64) for x in (value, old, target)]
    mask = torch.tensor([[True, False]])
    return value_loss(*row, mask, denominators=Denominators.of(mask.sum(1)), clip=clip).item()


def test_golden_value_loss():
    assert loss_of(0.9, 0.5, 1.0, clip=0.2) == pytest.approx(0.045)


def test_without_clipping_it_is_half_the_squared_error():
    assert loss_of(0.9, 0.5, 1.0, clip=None) == pytest.approx(0.005)


def test_garbage_off_the_mask_does_not_reach_the_gradient():
    values = torch.tensor([[0.9, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    old, target = torch.tensor([[0.8, math.nan]]), torch.tensor([[1.0, math.nan]])
    loss = value_loss(values, old, target, mask, denominators=Denominators.of(mask.sum(1)))
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.allclose(gradient, torch.tensor([[-0.1, 0.0]]))
