"""Schedules: golden values, ends, and monotony."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym.errors import UsageError
from agentgym.trainers.schedules import cosine_down, cosine_up, epo_beta, epo_release_weight


@pytest.mark.parametrize(
    ("step", "gamma", "mu"), [(0, 0, 1), (50, 0.146447, 0.853553), (100, 0.5, 0.5), (150, 0.853553, 0.146447)]
)
def test_golden_spear_schedules(step, gamma, mu):
    assert cosine_up(step, 200) == pytest.approx(gamma, abs=1e-6)
    assert cosine_down(step, 200) == pytest.approx(mu, abs=1e-6)


def test_golden_spear_alfworld_reward():
    mu = cosine_down(50, 200)
    assert 10 + mu * min(1, 0.1 * 12) == pytest.approx(10.853553, abs=1e-6)
    assert 0 + mu * min(1, 0.1 * 4) == pytest.approx(0.341421, abs=1e-6)


@given(st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_s8_ends_are_exact_and_the_way_is_monotone(length):
    ups = [cosine_up(t, length) for t in range(length + 5)]
    downs = [cosine_down(t, length) for t in range(length + 5)]
    assert ups[0] == 0 and set(ups[length:]) == {1.0}
    assert downs[0] == 1 and set(downs[length:]) == {0.0}
    assert ups == sorted(ups) and downs == sorted(downs, reverse=True)
    assert cosine_up(length / 2, length) == pytest.approx(0.5)
    assert cosine_down(length / 2, length) == pytest.approx(0.5)
    assert all(up + down == pytest.approx(1) for up, down in zip(ups, downs, strict=True))


@pytest.mark.parametrize(("step", "beta"), [(0, 2), (30, 1.60653), (60, 1.36788), (120, 1.13534)])
def test_golden_epo_beta(step, beta):
    assert epo_beta(step, 60, 1.0) == pytest.approx(beta, abs=1e-5)


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 1), (37, 0.874563), (75, 0.827067), (76, 0.768632), (100, 0.294304), (150, 0.03983)],
)
def test_golden_epo_release_weight(step, weight):
    assert epo_release_weight(step, 150) == pytest.approx(weight, abs=1e-6)


@given(st.integers(2, 500))
@settings(max_examples=30, deadline=None)
def test_e11_the_release_s_weights_span_the_run_s_own_length(steps):
    weights = [epo_release_weight(k, steps) for k in range(steps + 1)]
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(0.8 * 2.718281828459045**-3)
    assert weights == sorted(weights, reverse=True)
    betas = [epo_beta(k, 0.6 * steps) for k in range(steps + 1)]
    assert betas[0] == 2 and betas == sorted(betas, reverse=True) and betas[-1] > 1


def test_a_schedule_without_length_is_at_its_end():
    assert cosine_up(0, 0) == 1 and cosine_down(0, 0) == 0


@pytest.mark.parametrize(
    ("schedule", "step", "length"),
    [
        (cosine_up, -1, 5),
        (cosine_down, 1, -5),
        (epo_beta, 1, 0),
        (epo_release_weight, 1, 0),
        (epo_beta, -1, 60),
    ],
)
def test_steps_and_lengths_that_cannot_be_are_refused(schedule, step, length):
    with pytest.raises(UsageError):
        schedule(step, length)
