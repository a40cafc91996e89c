"""Covariance of advantage and log-prob: golden vector, S10, and a draw that hangs on tokens alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName, UsageError
from agentgym.trainers.aggregation import Denominators
from agentgym.trainers.covariance import CovarianceConfig, covariance_metrics, covariances, select
from agentgym.trainers.policy_loss import PolicyLoss, PolicyLossConfig, policy_loss

WIDE = CovarianceConfig("clip", 1.0, -1e9, 1e9)


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def everywhere(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def chosen(
    advantages: Tensor, logp: Tensor, config: CovarianceConfig, old: Tensor | None = None, **more: Any
) -> Tensor:
    mask = more.pop("mask", everywhere(logp))
    return select(advantages, logp, logp if old is None else old, mask, config, 0.2, 0.28, 7, **more)


GOLDEN = f64([2, 2, -1, -1]), f64([-0.1, -3, -0.1, -3])


def test_golden_clip_cov():
    advantages, logp = GOLDEN
    values = covariances(advantages, logp, everywhere(logp))
    assert values.tolist() == [pytest.approx([2.175, -2.175, -2.175, 2.175])]
    all_eligible = chosen(advantages, logp, CovarianceConfig("clip", 1.0, 2, 60))
    assert all_eligible.tolist() == [[True, False, False, True]]


def test_s10_a_fraction_near_zero_still_takes_one_token_if_any_is_eligible():
    advantages, logp = GOLDEN
    one = chosen(advantages, logp, CovarianceConfig("clip", 0.0, 2, 60))
    assert int(one.sum()) == 1 and bool((one & torch.tensor([True, False, False, True])).any())
    assert not chosen(advantages, logp, CovarianceConfig("clip", 0.0, 3, 60)).any()
    assert not chosen(advantages, logp, CovarianceConfig("clip", 0.0, 1, 2)).any()


def test_s10_clipped_tokens_are_never_taken():
    advantages, logp = GOLDEN
    # Token 0 gains and rose beyond 1.28; token 3 loses and fell below 0.8.
    old = logp - f64([math.log(1.3), 0, 0, math.log(0.79)])
    assert not chosen(advantages, logp, CovarianceConfig("clip", 1.0, 2, 60), old).any()
    # The bounds that bind are those of the sign: the other ways round both stay eligible.
    old = logp - f64([math.log(0.5), 0, 0, math.log(2.0)])
    assert int(chosen(advantages, logp, CovarianceConfig("clip", 1.0, 2, 60), old).sum()) == 2


@pytest.mark.parametrize("value", [0.0, 2.4, -1e-3])
def test_s10_equal_advantages_have_no_covariance_and_select_nothing(value):
    advantages = torch.full((1, 49), value)
    logp = -torch.rand(1, 49, generator=torch.Generator().manual_seed(0))
    assert not covariances(advantages, logp, everywhere(logp)).any()
    assert not chosen(advantages, logp, CovarianceConfig("clip", 0.5, 0.0, 60)).any()
    assert not chosen(advantages, logp, CovarianceConfig("kl", 0.5)).any()


def random_step(seed: int = 0, rows: int = 9, width: int = 14) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    advantages, logp = torch.randn(2, rows, width, generator=generator).double()
    old = logp + 0.2 * torch.randn(rows, width, generator=generator).double()
    return advantages, logp, old, torch.rand(rows, width, generator=generator) < 0.6


def loss_of(logp: Tensor, config: PolicyLossConfig, step: Any, selected: Tensor | None = None) -> PolicyLoss:
    advantages, _, old, mask = step
    return policy_loss(
        logp,
        old,
        advantages,
        mask,
        config=config,
        denominators=Denominators.of(mask.sum(1)),
        selected=selected,
    )


def test_s10_the_gradient_at_removed_tokens_is_exactly_zero_and_the_rest_is_untouched():
    step = random_step()
    advantages, logp, old, mask = step
    logp.requires_grad_()
    config = CovarianceConfig("clip", 0.2, 0.1, 60)
    selected = select(advantages, logp, old, mask, config, 0.2, 0.2, 3)
    assert 0 < int(selected.sum()) < int(mask.sum())
    with_cov = loss_of(logp, PolicyLossConfig(covariance=config), step, selected)
    gradient = torch.autograd.grad(with_cov.loss, logp)[0]
    base = torch.autograd.grad(loss_of(logp, PolicyLossConfig(), step).loss, logp)[0]
    assert not gradient[selected].any() and bool(base[selected].any())
    assert torch.equal(gradient[~selected], base[~selected])


def test_removed_tokens_stay_in_the_denominators_and_in_the_other_terms():
    step = random_step()
    advantages, logp, old, mask = step
    logp.requires_grad_()
    entropy = torch.rand_like(logp).requires_grad_()
    config = PolicyLossConfig(covariance=WIDE, entropy_coef=0.1, kl_coef=0.1)
    result = policy_loss(
        logp,
        old,
        advantages,
        mask,
        config=config,
        denominators=Denominators.of(mask.sum(1)),
        entropy=entropy,
        logp_ref=old,
        selected=mask,
    )
    assert result.metrics["loss/pg"] == 0
    to_logp, to_entropy = torch.autograd.grad(result.loss, (logp, entropy))
    assert bool((to_logp[mask] != 0).all())
    assert torch.allclose(to_entropy[mask], torch.tensor(-0.1 / int(mask.sum())).double())


def test_kl_cov_adds_the_penalty_to_the_tokens_of_largest_covariance():
    step = random_step()
    advantages, logp, old, mask = step
    logp.requires_grad_()
    config = CovarianceConfig("kl", 0.1, coef=0.7)
    selected = select(advantages, logp, old, mask, config, 0.2, 0.2, 3)
    values = covariances(advantages, logp, mask)
    count = int(0.1 * int(mask.sum()))
    assert int(selected.sum()) == count
    assert values[selected].min() >= values[mask & ~selected].max()
    with_cov = loss_of(logp, PolicyLossConfig(covariance=config), step, selected).loss
    base = loss_of(logp, PolicyLossConfig(), step).loss
    penalty = 0.7 * ((logp - old).abs() * selected).sum() / mask.sum()
    assert with_cov.item() == pytest.approx((base + penalty).item(), abs=1e-14)
    ours, theirs = (torch.autograd.grad(x, logp)[0] for x in (with_cov, base + penalty))
    assert torch.allclose(ours, theirs, atol=1e-15)


def test_x1_nothing_selected_is_the_base_loss_bit_for_bit():
    step = random_step()
    logp = step[1].requires_grad_()

    def run(config: PolicyLossConfig, selected: Tensor | None = None) -> list[Tensor]:
        loss = loss_of(logp, config, step, selected).loss
        return [loss, torch.autograd.grad(loss, logp)[0]]

    base, nothing = run(PolicyLossConfig()), torch.zeros_like(step[3])
    for config, selected in [
        (WIDE, nothing),
        (CovarianceConfig("kl"), nothing),
        (CovarianceConfig("kl", coef=0.0), step[3]),
    ]:
        same = run(PolicyLossConfig(covariance=config), selected)
        assert all(torch.equal(x, y) for x, y in zip(same, base, strict=True))


@pytest.mark.parametrize("kind", ["clip", "kl"])
@given(st.permutations(range(9)), st.integers(0, 6), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_s15_the_selection_does_not_depend_on_row_order_padding_or_what_is_off_the_mask(
    kind, order, padding, seed
):
    advantages, logp, old, mask = random_step(seed)
    config = CovarianceConfig("clip", 0.1, 0.05, 60) if kind == "clip" else CovarianceConfig("kl", 0.1)
    rows = torch.arange(100, 109)
    whole = select(advantages, logp, old, mask, config, 0.2, 0.2, seed, rows=rows)
    assert whole.any()

    def moved(x: Tensor) -> Tensor:
        fill = False if x.dtype == torch.bool else math.nan
        soiled = x if x.dtype == torch.bool else torch.where(mask, x, math.nan)
        return torch.nn.functional.pad(soiled[order], (padding, padding), value=fill)

    other = select(
        *(moved(x) for x in (advantages, logp, old, mask)), config, 0.2, 0.2, seed, rows=rows[order]
    )
    assert torch.equal(other, moved(whole))
    assert not other[~moved(mask)].any()


def test_s15_the_draw_is_the_seed_s_and_uniform():
    width = 40
    advantages, logp = f64([1.0] * width + [-1.0] * width), f64([0.0] * width + [-9.0] * width)
    config = CovarianceConfig("clip", 0.1, 0, 60)
    draws = [select(advantages, logp, logp, everywhere(logp), config, 0.2, 0.2, seed) for seed in range(200)]
    assert torch.equal(draws[0], select(advantages, logp, logp, everywhere(logp), config, 0.2, 0.2, 0))
    counts = torch.stack(draws).sum(0).double()
    # 200 draws of 8 of 80 tokens: 20 each; a spread of 4.2 is expected of a fair draw.
    assert counts.mean() == 20 and 3 < counts.std() < 5.5 and counts.min() > 4 and counts.max() < 38


@given(st.integers(0, 60), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_number_of_tokens_is_the_fraction_rounded_down_at_least_one(tokens, fraction):
    mask = torch.arange(60)[None] < tokens
    advantages, logp, *_ = random_step(1, 1, 60)
    selected = select(
        advantages, logp, logp, mask, CovarianceConfig("clip", fraction, -1e9, 1e9), 0.2, 0.2, 0
    )
    assert int(selected.sum()) == (
        min(max(math.floor(fraction * tokens + 1e-9), 1), tokens) if tokens > 1 else tokens
    )


def test_metrics():
    advantages, logp = GOLDEN
    values = covariances(advantages, logp, everywhere(logp))
    metrics = covariance_metrics(values, torch.tensor([[True, False, False, False]]), everywhere(logp))
    assert metrics == pytest.approx({"cov_mean": 0.0, "cov_max": 2.175, "cov_masked_frac": 0.25})
    assert covariance_metrics(values, everywhere(logp), ~everywhere(logp)) == {}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"kind": "clips"}, UnknownName),
        ({"fraction": 1.5}, ConfigError),
        ({"low": 5.0, "high": 5.0}, ConfigError),
        ({"coef": -1.0}, ConfigError),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, error):
    with pytest.raises(error):
        CovarianceConfig(**fields)


def test_shapes_that_differ_and_masks_that_are_numbers_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(UsageError, match="must be bool"):
        covariances(x, x, torch.ones(2, 3))
    with pytest.raises(UsageError, match="logp has shape"):
        covariances(x, x[:1], everywhere(x))


def test_the_loss_refuses_a_dual_clip_and_a_config_without_tokens_or_tokens_without_config():
    with pytest.raises(ConfigError, match="no dual clip"):
        PolicyLossConfig(clip_dual=10.0, covariance=WIDE)
    step = random_step()
    with pytest.raises(UsageError, match="no tokens were passed"):
        loss_of(step[1], PolicyLossConfig(covariance=WIDE), step)
    with pytest.raises(UsageError, match="no covariance is configured"):
        loss_of(step[1], PolicyLossConfig(), step, step[3])
