"""KL estimators and the adaptive coefficient."""

from __future__ import annotations

import pytest
import torch

from agentgym.errors import UnknownName
from agentgym.trainers.kl import KL_ESTIMATORS, kl_estimate


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", 0.2), ("k2", 0.02), ("k3", 0.018731), ("abs", 0.2)]
)
def test_golden_kl(estimator, expected):
    value = kl_estimate(torch.tensor([-1.0]).double(), torch.tensor([-1.2]).double(), estimator)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3", "abs"])
def test_plus_forms_have_their_own_value_and_the_gradient_of_k2(estimator):
    logp, ref = torch.tensor([-1.0, -3.0, -0.2], requires_grad=True), torch.tensor([-1.2, -0.5, -0.2])
    plus = kl_estimate(logp, ref, estimator + "+")
    assert torch.equal(plus.detach(), kl_estimate(logp, ref, estimator).detach())
    (gradient,) = torch.autograd.grad(plus.sum(), logp)
    assert torch.equal(gradient, (logp - ref).detach())


def test_far_tokens_neither_overflow_nor_turn_nan():
    logp = torch.tensor([-1e4, 0.0], requires_grad=True)
    for estimator in KL_ESTIMATORS:
        value = kl_estimate(logp, torch.tensor([0.0, -1e4]), estimator)
        (gradient,) = torch.autograd.grad(value.sum(), logp)
        assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())
    assert kl_estimate(logp, torch.tensor([0.0, -1e4]), "k3").max() == 10


def test_k3_does_not_dip_below_zero_where_the_policies_nearly_agree():
    d = torch.linspace(-1e-3, 1e-3, 2001)
    assert float(kl_estimate(d, torch.zeros_like(d), "k3").min()) >= 0


def test_the_reference_never_receives_a_gradient():
    ref = torch.tensor([-1.0], requires_grad=True)
    logp = torch.tensor([-2.0], requires_grad=True)
    for estimator in KL_ESTIMATORS:
        assert torch.autograd.grad(kl_estimate(logp, ref, estimator).sum(), ref, allow_unused=True) == (None,)


def test_an_unknown_estimator_names_the_near_ones():
    with pytest.raises(UnknownName, match="k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k33")  # type: ignore[arg-type]
