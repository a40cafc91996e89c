"""Weights for the mismatch between engine and trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName
from agentgym.trainers.correction import (
    CorrectionConfig,
    correction_weights,
    mismatch_metrics,
)

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
    assert weights("truncate")[1] == pytest.approx(math.exp(-0.5))


def test_at_sequence_level_the_product_stands_for_every_token():
    assert weights("truncate", level="sequence") == pytest.approx([math.exp(0.5)] * 2 + [0.0])
    assert weights("mask", high=1.5, level="sequence") == [0, 0, 0]


def test_no_rule_no_weights():
    assert correction_weights(OLD, ROLLOUT, MASK, CorrectionConfig()) is None


def rejecting(reject: str, above: float, level: str = "token", **more: object) -> list[float]:
    config = CorrectionConfig(reject=reject, reject_above=above, reject_level=level, **more)
    made = correction_weights(OLD, ROLLOUT, MASK, config)
    assert made is not None and not made.requires_grad
    return made[0].tolist()


@pytest.mark.parametrize(
    ("reject", "of_first", "of_second"),
    # log w is 1 and -0.5.
    [
        ("ratio", math.e, math.exp(0.5)),
        ("k1", 1.0, 0.5),
        ("k2", 0.5, 0.125),
        ("k3", math.e - 2, math.exp(-0.5) - 0.5),
    ],
)
def test_rejection_drops_tokens_whose_measure_is_above_the_bound(reject, of_first, of_second):
    assert rejecting(reject, of_first + 1e-9) == [1, 1, 0]
    assert rejecting(reject, of_first - 1e-9) == [0, 1, 0]
    assert rejecting(reject, of_second - 1e-9) == [0, 0, 0]


@pytest.mark.parametrize(
    ("reject", "of_row"),
    [
        ("ratio", math.exp(0.25)),
        ("k1", 0.25),
        ("k2", (0.5 + 0.125) / 2),
        ("k3", (math.e - 2 + math.exp(-0.5) - 0.5) / 2),
    ],
)
def test_rejection_of_sequences_goes_by_the_mean_over_their_tokens(reject, of_row):
    assert rejecting(reject, of_row + 1e-9, "sequence") == [1, 1, 0]
    assert rejecting(reject, of_row - 1e-9, "sequence") == [0, 0, 0]


def test_rejection_stands_beside_a_rule():
    both = rejecting("k1", 0.7, rule="truncate", high=2.0)
    assert both == pytest.approx([0.0, math.exp(-0.5), 0.0])


@pytest.mark.parametrize("reject", ["ratio", "k1", "k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_X11_an_engine_that_agrees_is_never_rejected(reject, level):
    config = CorrectionConfig(
        reject=reject, reject_level=level, reject_above=1.0 if reject == "ratio" else 0.0
    )
    made = correction_weights(OLD, OLD.clone(), MASK, config)
    assert made is not None and made.tolist() == [[1, 1, 0]]


def test_a_trainer_that_is_far_off_is_rejected_without_overflow():
    far = torch.tensor([[0.0, -1.0]]), torch.tensor([[-1e9, -1.0]])
    for reject in ("ratio", "k1", "k2", "k3"):
        config = CorrectionConfig(reject=reject, reject_above=5.0)
        made = correction_weights(*far, torch.ones(1, 2, dtype=torch.bool), config)
        assert made is not None and made.tolist() == [[0, 1]]


def test_the_sequence_mask_of_trl():
    assert weights("mask", low=0.0, high=3.0, level="sequence") == pytest.approx([math.exp(0.5)] * 2 + [0.0])
    assert weights("mask", low=0.0, high=1.6, level="sequence") == [0, 0, 0]


@pytest.mark.parametrize(("reject", "above"), [("ratio", 0.9), ("k1", -0.1)])
def test_a_bound_that_rejects_agreement_is_refused(reject, above):
    with pytest.raises(ConfigError, match="reject_above must be at least"):
        CorrectionConfig(reject=reject, reject_above=above)


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
    with pytest.raises(UnknownName, match="k3"):
        CorrectionConfig(reject="k4")  # type: ignore[arg-type]


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
