"""The invariants that every trainer's loss and advantages keep; gradients are those of a real tiny model.

Named X1 to X12 after the list in the specification of the baselines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentgym.trainers.advantages import (
    dr_grpo,
    gae,
    grpo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
)
from agentgym.trainers.aggregation import AGGREGATION_MODES, Denominators
from agentgym.trainers.correction import CorrectionConfig, correction_weights
from agentgym.trainers.kl import kl_estimate
from agentgym.trainers.logprobs import token_logprobs
from agentgym.trainers.policy_loss import PolicyLoss, PolicyLossConfig, policy_loss

LENGTHS = [5, 23, 9, 30, 4, 17, 12, 7]
EVERYTHING_ON = {
    "clip_low": 0.1,
    "clip_high": 0.15,
    "clip_dual": 1.3,
    "kl_coef": 0.1,
    "entropy_coef": 0.05,
}


def norm(mode: str) -> dict[str, float]:
    """The fixed length, for the aggregation that has one."""
    return {"length_norm": 16.0} if mode == "seq-mean-token-sum-norm" else {}


@dataclass(frozen=True)
class Rows:
    """Eight rows of uneven length; sampled stretches alternate with observations; row 4 sampled nothing."""

    ids: Tensor
    lengths: Tensor
    mask: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    weights: Tensor

    def take(self, chosen: list[int], padding: int = 0) -> Rows:
        """These rows alone, padded to their own width, or ``padding`` beyond it."""
        width = int(self.lengths[chosen].max())
        cut = {
            name: torch.nn.functional.pad(x[chosen, : width - (name != "ids")], (0, padding))
            for name, x in self.__dict__.items()
            if name != "lengths"
        }
        return Rows(lengths=self.lengths[chosen], **cut)


def forward(model: Any, rows: Rows, *, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies ``[B, T-1]`` of the rows' targets where the mask (or ``positions``) is true."""
    positions = rows.mask if positions is None else positions
    attention = (torch.arange(rows.ids.shape[1]) < rows.lengths[:, None]).long()
    hidden = model.model(input_ids=rows.ids, attention_mask=attention, use_cache=False).last_hidden_state
    logp, entropy = token_logprobs(
        hidden[:, :-1][positions],
        model.lm_head.weight,
        rows.ids[:, 1:][positions],
        with_entropy=True,
        chunk=16,
    )
    assert entropy is not None
    empty = torch.zeros(positions.shape, dtype=logp.dtype)
    return empty.masked_scatter(positions, logp), empty.masked_scatter(positions, entropy)


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Rows]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    width = int(lengths.max())
    ids = torch.randint(3, 300, (len(LENGTHS), width), generator=generator)
    place = torch.arange(1, width)
    mask = (place < lengths[:, None]) & (place % 5 >= 2)
    mask[4] = False

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(mask.shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = Rows(ids, lengths, mask, noise(0), noise(0), noise(1.0), noise(0.2).exp())
    with torch.no_grad():
        logp, _ = forward(model, rows)
    # A policy 0.2 nats a token away from its proximal one: every bound binds somewhere.
    return model, replace(rows, old=logp + noise(0.2), ref=logp + noise(0.1))


@pytest.fixture(scope="module")
def exact(tiny_model: Path) -> tuple[Any, Rows]:
    return load(tiny_model, torch.float64)


@pytest.fixture(scope="module")
def single(tiny_model: Path) -> tuple[Any, Rows]:
    return load(tiny_model, torch.float32)


def loss_of(model: Any, rows: Rows, denominators: Denominators, **config: Any) -> PolicyLoss:
    logp, entropy = forward(model, rows)
    return policy_loss(
        logp,
        rows.old,
        rows.advantages,
        rows.mask,
        config=PolicyLossConfig(**config),
        denominators=denominators,
        weights=rows.weights,
        logp_ref=rows.ref,
        entropy=entropy,
    )


def gradient(
    model: Any, rows: Rows, parts: list[list[int]], *, ranks: int = 1, padding: int = 0, **config: Any
) -> Tensor:
    """The flat gradient of one optimiser step: micro-batches add up on their rank, ranks are averaged."""
    denominators = Denominators.of(rows.mask.sum(1), length_norm=config.get("length_norm"), world_size=ranks)
    mean = torch.zeros(())
    for rank in range(ranks):
        model.zero_grad()
        for part in parts[rank::ranks]:
            loss_of(model, rows.take(part, padding), denominators, **config).loss.backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        mean = mean + torch.cat([g.flatten() for g in own]) / ranks
    return mean


def split(micro_batches: int) -> list[list[int]]:
    """Rows in micro-batches of uneven size: the first ones take one row, the last one the rest."""
    order = [3, 0, 4, 6, 1, 7, 2, 5]
    return [[i] for i in order[: micro_batches - 1]] + [order[micro_batches - 1 :]]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# X1


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_X1_extras_at_zero_give_the_base_loss_and_gradient(exact, mode):
    _, rows = exact
    logp = (rows.old + 0.3 * rows.advantages.sin()).requires_grad_()
    entropy = torch.rand_like(logp).requires_grad_()
    denominators = Denominators.of(rows.mask.sum(1), length_norm=16.0)

    def run(extra_config: dict[str, Any], **tensors: Any) -> tuple[float, Tensor]:
        config = PolicyLossConfig(aggregation=mode, **norm(mode), **extra_config)
        loss = policy_loss(
            logp, rows.old, rows.advantages, rows.mask, config=config, denominators=denominators, **tensors
        ).loss
        return loss.item(), torch.autograd.grad(loss, logp)[0]

    value, base = run({})
    assert base.any()
    ones = torch.ones_like(rows.weights)
    nan = torch.full_like(logp, math.nan)
    for extra_config, tensors in [
        ({"kl_coef": 0.0, "kl": "k2"}, {"logp_ref": nan}),
        ({"entropy_coef": 0.0}, {"entropy": entropy}),
        ({"clip_dual": 1e9}, {}),
        ({}, {"weights": ones}),
        ({}, {"row_weight": ones[:, 0]}),
    ]:
        extended_value, extended = run(extra_config, **tensors)
        assert extended_value == value
        assert torch.equal(extended, base)


def test_X1_gspo_on_rows_of_one_token_is_ppo(exact):
    _, rows = exact
    logp = (rows.old + 0.3 * rows.advantages.sin()).requires_grad_()
    mask = torch.zeros_like(rows.mask)
    mask[:, 3] = True
    denominators = Denominators.of(mask.sum(1))

    def run(ratio: Any) -> Tensor:
        loss = policy_loss(
            logp,
            rows.old,
            rows.advantages,
            mask,
            config=PolicyLossConfig(ratio=ratio),
            denominators=denominators,
        ).loss
        return torch.autograd.grad(loss, logp)[0]

    assert difference(run("sequence"), run("token")) < 1e-15


# X2


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_X2_micro_batch_invariance(exact, mode, ratio):
    model, rows = exact
    config = {**EVERYTHING_ON, **norm(mode), "aggregation": mode, "ratio": ratio}
    whole = gradient(model, rows, split(1), **config)
    assert whole.abs().max() > 1e-3
    for micro_batches in (2, 4, 8):
        for ranks in (1, 2):
            parts = gradient(model, rows, split(micro_batches), ranks=ranks, **config)
            assert difference(parts, whole) < 1e-9, (micro_batches, ranks)


def test_X2_is_tried_where_every_bound_binds_and_every_term_acts(exact):
    model, rows = exact
    metrics = loss_of(model, rows, Denominators.of(rows.mask.sum(1)), **EVERYTHING_ON).metrics
    for name in ("clipfrac_low", "clipfrac_high", "clipfrac_dual", "kl_ref", "entropy_mean"):
        assert metrics[name] > 1e-3, name


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_X2_micro_batch_invariance_in_single_precision(single, mode):
    model, rows = single
    config = {**EVERYTHING_ON, **norm(mode), "aggregation": mode}
    whole = gradient(model, rows, split(1), **config)
    for micro_batches, ranks in ((2, 1), (4, 2), (8, 1)):
        parts = gradient(model, rows, split(micro_batches), ranks=ranks, **config)
        assert difference(parts, whole) < 1e-5 * float(whole.abs().max())


def test_X2_averaging_the_micro_batches_own_means_would_fail(exact):
    # The control: denominators of each micro-batch instead of the step's do change the gradient.
    model, rows = exact
    whole = gradient(model, rows, split(1), aggregation="token-mean")
    model.zero_grad()
    for part in split(2):
        own = rows.take(part)
        (loss_of(model, own, Denominators.of(own.mask.sum(1))).loss / 2).backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert difference(naive, whole) > 1e-3 * float(whole.abs().max())


# X3


def test_X3_on_policy_identity(exact):
    model, rows = exact
    denominators = Denominators.of(rows.mask.sum(1))
    logp, _ = forward(model, rows)
    result = policy_loss(
        logp,
        logp.detach(),
        rows.advantages,
        rows.mask,
        config=PolicyLossConfig(clip_dual=3.0),
        denominators=denominators,
    )
    metrics = {name: value.item() for name, value in result.metrics.items()}
    assert metrics["ratio_max"] == metrics["ratio_min"] == 1
    assert metrics["clipfrac_low"] == metrics["clipfrac_high"] == metrics["clipfrac_dual"] == 0
    assert metrics["approx_kl"] == 0
    model.zero_grad()
    result.loss.backward()
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    (-(rows.advantages * forward(model, rows)[0])[rows.mask].mean()).backward()
    reinforce = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert difference(clipped, reinforce) < 1e-12


# X4 to X6

MEMBERS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(-20, 20), st.integers(1, 9)), min_size=1, max_size=18
)


def batch_of(members: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    groups, rewards, tokens = zip(*members, strict=True)
    return torch.tensor(rewards).double() / 4, torch.tensor(groups), torch.tensor(tokens)


@given(MEMBERS, st.integers(-50, 50))
@settings(max_examples=50, deadline=None)
def test_X4_a_shift_of_all_rewards_changes_no_group_advantage(members, shift):
    rewards, groups, tokens = batch_of(members)
    for method in (grpo, dr_grpo, rloo):
        assert difference(method(rewards + shift, groups), method(rewards, groups)) < 1e-9
    baseline = reinforce_plus_plus_baseline(rewards, groups, tokens)
    assert difference(reinforce_plus_plus_baseline(rewards + shift, groups, tokens), baseline) < 1e-6


@given(MEMBERS, st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_X4_a_scale_cancels_where_std_divides_and_passes_elsewhere(members, scale):
    rewards, groups, _ = batch_of(members)
    assert difference(grpo(scale * rewards, groups, eps=1e-12), grpo(rewards, groups, eps=1e-12)) < 1e-9
    for method in (dr_grpo, rloo):
        assert difference(method(scale * rewards, groups), scale * method(rewards, groups)) < 1e-9


@given(st.floats(-1e6, 1e6), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_X5_equal_rewards_give_exactly_zero(reward, members):
    rewards = torch.full((members,), reward, dtype=torch.float64)
    groups = torch.zeros(members, dtype=torch.long)
    tokens = torch.arange(1, members + 1)
    for advantages in (
        grpo(rewards, groups),
        dr_grpo(rewards, groups),
        rloo(rewards, groups),
        reinforce_plus_plus_baseline(rewards, groups, tokens),
        reinforce_plus_plus(rewards[:, None], torch.ones(members, 1, dtype=torch.bool)),
    ):
        assert advantages.abs().max() == 0


@given(MEMBERS)
@settings(max_examples=50, deadline=None)
def test_X6_rloo_is_dr_grpo_times_g_over_g_minus_1(members):
    rewards, groups, _ = batch_of(members)
    size = (groups[:, None] == groups).sum(1)
    factor = torch.where(size > 1, size / (size - 1).clamp(min=1), 1.0)
    assert difference(rloo(rewards, groups), dr_grpo(rewards, groups) * factor) < 1e-12


# X7 and X8


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("shape", [{}, {"ratio": "sequence"}, {"objective": "cispo"}])
def test_X7_garbage_off_the_mask_alters_neither_loss_nor_gradient(exact, mode, garbage, shape):
    _, rows = exact
    entropy = torch.rand_like(rows.old)
    everything = {**EVERYTHING_ON, **norm(mode), **shape}
    if everything.get("objective") == "cispo":  # it has no dual clip
        del everything["clip_dual"]
    config = PolicyLossConfig(aggregation=mode, **everything)

    def run(fill: float) -> tuple[dict[str, float], Tensor, Tensor]:
        def soiled(x: Tensor) -> Tensor:
            return torch.where(rows.mask, x, fill).requires_grad_()

        logp, h = soiled(rows.old + 0.3 * rows.advantages.sin()), soiled(entropy)
        result = policy_loss(
            logp,
            soiled(rows.old),
            soiled(rows.advantages),
            rows.mask,
            config=config,
            denominators=Denominators.of(rows.mask.sum(1), length_norm=16.0),
            weights=soiled(rows.weights),
            logp_ref=soiled(rows.ref),
            entropy=h,
        )
        metrics = {name: value.item() for name, value in result.metrics.items()}
        return metrics, *torch.autograd.grad(result.loss, (logp, h))

    clean, soiled = run(0.0), run(garbage)
    assert soiled[0] == clean[0]
    assert torch.equal(soiled[1], clean[1]) and torch.equal(soiled[2], clean[2])
    assert not soiled[1][~rows.mask].any()


def test_X7_hidden_states_off_the_mask_are_never_read(exact):
    model, rows = exact
    hidden = torch.randn(*rows.ids.shape, 64, dtype=torch.float64)[:, :-1]
    soiled = torch.where(rows.mask[..., None], hidden, math.nan).requires_grad_()
    weight = model.lm_head.weight
    logp, _ = token_logprobs(soiled[rows.mask], weight, rows.ids[:, 1:][rows.mask])
    to_hidden, to_weight = torch.autograd.grad(logp.sum(), (soiled, weight))
    assert bool(to_hidden.isfinite().all()) and bool(to_weight.isfinite().all())


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_X8_right_padding_changes_nothing(exact, mode):
    model, rows = exact
    config = {**EVERYTHING_ON, **norm(mode), "aggregation": mode}
    narrow = gradient(model, rows, split(2), **config)
    wide = gradient(model, rows, split(2), padding=9, **config)
    assert difference(narrow, wide) < 1e-9


# X9


def test_X9_gae_without_critic_and_discount_is_the_terminal_reward_on_every_token():
    mask = torch.tensor([[False, True, True, False, True, False], [True, True, False, False, False, False]])
    rewards = torch.zeros(2, 6)
    rewards[0, 4], rewards[1, 1] = 3.0, -2.0
    estimate = gae(rewards, torch.zeros(2, 6), mask)
    assert estimate.advantages.tolist() == [[0, 3, 3, 0, 3, 0], [-2, -2, 0, 0, 0, 0]]


@given(st.lists(st.booleans(), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_X9_inserting_environment_tokens_leaves_sampled_tokens_alone(pattern):
    mask = torch.tensor([pattern])
    count = sum(pattern)
    own = torch.sin(torch.arange(count).double()), torch.cos(torch.arange(count).double())
    rewards, values = (torch.full(mask.shape, math.nan).double() for _ in range(2))
    rewards[mask], values[mask] = own
    dense = gae(own[0][None], own[1][None], torch.ones(1, count, dtype=torch.bool), gamma=0.9, lam=0.8)
    spread = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    assert torch.equal(spread.advantages[mask], dense.advantages[0])
    assert torch.equal(spread.returns[mask], dense.returns[0])


# X10


@given(st.floats(-60, 0), st.floats(-60, 0))
@settings(max_examples=200, deadline=None)
def test_X10_k3_is_never_negative(logp, ref):
    for dtype in (torch.float32, torch.float64):
        assert kl_estimate(torch.tensor(logp, dtype=dtype), torch.tensor(ref, dtype=dtype), "k3") >= 0


def test_X10_k1_and_k3_estimate_the_same_divergence():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(20, generator=generator).double().log_softmax(0)
    reference = (policy + 0.3 * torch.randn(20, generator=generator).double()).log_softmax(0)
    sampled = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    divergence = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(policy[sampled], reference[sampled], estimator)
        error = 4 * float(estimates.std()) / len(sampled) ** 0.5
        assert abs(float(estimates.mean()) - divergence) < error


def test_X10_the_gradient_of_k3_plus_is_that_of_k2(exact):
    _, rows = exact
    logp = (rows.old + 0.3).requires_grad_()
    gradients = [
        torch.autograd.grad(kl_estimate(logp, rows.ref, kind)[rows.mask].sum(), logp)[0]
        for kind in ("k3+", "k2")
    ]
    assert torch.equal(*gradients)


# X11


def test_X11_the_weight_of_equal_engines_is_one_and_detached(exact):
    _, rows = exact
    logp = rows.old.clone().requires_grad_()
    for rule in ("truncate", "mask"):
        for level in ("token", "sequence"):
            config = CorrectionConfig(rule, level, 0.5, math.inf)
            weights = correction_weights(logp, logp.detach(), rows.mask, config)
            assert weights is not None and not weights.requires_grad
            assert torch.equal(weights, rows.mask.to(weights.dtype))


def test_X11_no_correction_is_a_correction_by_one(exact):
    _, rows = exact
    logp = (rows.old + 0.3 * rows.advantages.sin()).requires_grad_()

    def run(rule: Any) -> Tensor:
        weights = correction_weights(rows.old, rows.old, rows.mask, CorrectionConfig(rule))
        loss = policy_loss(
            logp,
            rows.old,
            rows.advantages,
            rows.mask,
            config=PolicyLossConfig(),
            denominators=Denominators.of(rows.mask.sum(1)),
            weights=weights,
        ).loss
        return torch.autograd.grad(loss, logp)[0]

    assert torch.equal(run("none"), run("truncate"))


# X12


@given(st.floats(-3, 3), st.floats(0.01, 30), st.floats(1.01, 12))
@settings(max_examples=200, deadline=None)
def test_X12_the_dual_clip_binds_only_for_negative_advantages_beyond_its_bound(advantage, ratio, bound):
    def loss(clip_dual: float | None) -> PolicyLoss:
        one = torch.ones(1, 1, dtype=torch.float64)
        return policy_loss(
            one * math.log(ratio),
            one * 0,
            one * advantage,
            one.bool(),
            config=PolicyLossConfig(clip_dual=clip_dual),
            denominators=Denominators(1, 1),
        )

    single, dual = loss(None).loss.item(), loss(bound)
    binds = advantage < 0 and ratio > max(bound, 1.0) * (1 + 1e-9)
    if binds:
        assert dual.loss.item() == pytest.approx(-advantage * bound)
        assert dual.metrics["clipfrac_dual"] == 1
    elif not (advantage < 0 and ratio > bound * (1 - 1e-9)):
        assert dual.loss.item() == single
        assert dual.metrics["clipfrac_dual"] == 0
