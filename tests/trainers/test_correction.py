"""Weights for the mismatch between engine and trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName
from agentgym.trainers.correction import CorrectionConfig, correction_weights, mismatch_metrics

OLD = torch.tensor([[-1.0, -1.0, math.nan]], dtype=torch.float64)
ROLLOUT = torch.tensor([[-2.0, -0.5, math.nan]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False]])


def weights(rule: str, low: float = 0.5, high: float = 2.0, level: str = "token") -> list[float]:
    made = correction_weights(OLD, ROLLOUT, MASK, CorrectionConfig(rule, level, low, high))
    assert isinstance(made, Tensor)
    return made[0].tolist()


def test_golden_truncated_importance_sampling():
    assert weights("truncate", high=2.0) == pytest.approx([2.0, math.exp(-0.5), 0.0])


@pytest.mark.parametrize(("high", "expected"), [(5.0, 2.718282), (2.0, 0.0)])
def test_golden_icepop(high, expected):
    assert weights("mask", 0.5, high)[0] == pytest.approx(expected, abs=1e-6)


def test_a_token_below_the_lower_bound_is_masked_not_truncated():
    assert weights("mask", low=0.7)[1] == 0
    assert weights("truncate", low=0.7)[1] == pytest.approx(math.exp(-0.5))


def test_at_sequence_level_the_product_stands_for_every_token():
    assert weights("truncate", level="sequence") == pytest.approx([math.exp(0.5)] * 2 + [0.0])
    assert weights("mask", high=1.5, level="sequence") == [0, 0, 0]


def test_no_rule_no_weights():
    assert correction_weights(OLD, ROLLOUT, MASK, CorrectionConfig()) is None


def test_a_hopeless_engine_does_not_overflow():
    far = torch.tensor([[0.0]]), torch.tensor([[-1e9]])
    made = correction_weights(*far, torch.tensor([[True]]), CorrectionConfig("truncate", high=math.inf))
    assert made is not None and made.item() == pytest.approx(math.exp(20))


@pytest.mark.parametrize("bounds", [(0.5, 0.9), (1.1, 2.0), (-1.0, 2.0)])
def test_bounds_that_exclude_agreement_are_refused(bounds):
    with pytest.raises(ConfigError, match="low <= 1 <= high"):
        CorrectionConfig("mask", "token", *bounds)


def test_unknown_rules_and_levels_are_named():
    with pytest.raises(UnknownName, match="truncate"):
        CorrectionConfig("truncated")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="sequence"):
        CorrectionConfig("mask", "row")  # type: ignore[arg-type]


def test_an_engine_that_agrees_shows_no_mismatch():
    metrics = mismatch_metrics(OLD, OLD.clone(), MASK)
    assert metrics["rollout_train/ess"] == metrics["rollout_train/ratio_max"] == 1
    assert metrics["rollout_train/kl"] == metrics["rollout_train/k3"] == metrics["rollout_train/ppl_gap"] == 0


def test_mismatch_metrics_of_a_mismatch():
    metrics = mismatch_metrics(OLD, ROLLOUT, MASK)
    w = torch.tensor([math.e, math.exp(-0.5)])
    assert metrics["rollout_train/kl"] == pytest.approx(-0.25)
    assert metrics["rollout_train/k3"] == pytest.approx(((w - 1 - w.log()).mean()).item())
    assert metrics["rollout_train/ess"] == pytest.approx((w.sum() ** 2 / (2 * (w**2).sum())).item())
    assert metrics["rollout_train/ppl_gap"] == pytest.approx(math.exp(1.0) - math.exp(1.25))
    assert mismatch_metrics(OLD, ROLLOUT, torch.zeros_like(MASK)) == {}
