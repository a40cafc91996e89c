"""The policy loss on single tokens and small rows: golden values, clipping, weights, terms, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName, UsageError
from agentgym.trainers.aggregation import Denominators
from agentgym.trainers.policy_loss import PolicyLoss, PolicyLossConfig, combine_metrics, policy_loss

TENSORS = ("weights", "logp_ref", "entropy", "row_weight", "turn")


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def of(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor | None = None, **more: Any
) -> PolicyLoss:
    """The loss of one whole batch; config fields and tensors by name."""
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    tensors = {k: more.pop(k) for k in TENSORS if k in more}
    config = PolicyLossConfig(**more)
    denominators = Denominators.of(mask.sum(1), length_norm=config.length_norm)
    return policy_loss(logp, logp_old, advantages, mask, config=config, denominators=denominators, **tensors)


def one_token(advantage: float, ratio: float, **more: Any) -> PolicyLoss:
    return of(f64([math.log(ratio)]), f64([0.0]), f64([advantage]), clip_low=0.2, clip_high=0.28, **more)


@pytest.mark.parametrize(
    ("advantage", "ratio", "dual", "expected"),
    [
        (1, 1.5, None, -1.28),
        (1, 0.5, None, -0.5),
        (-1, 1.5, None, 1.5),
        (-1, 0.5, None, 0.8),
        (-1, 20, 3, 3.0),
        (-1, 20, 10, 10.0),
    ],
)
def test_golden_clips(advantage, ratio, dual, expected):
    assert one_token(advantage, ratio, clip_dual=dual).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("advantage", "ratio", "binds"),
    [(1, 1.5, "high"), (1, 0.5, None), (-1, 0.5, "low"), (-1, 1.5, None), (-1, 20, "dual"), (0, 9, None)],
)
def test_each_clip_fraction_counts_where_its_bound_binds(advantage, ratio, binds):
    metrics = one_token(advantage, ratio, clip_dual=3).metrics
    counted = {name for name in ("low", "high", "dual") if metrics[f"clipfrac_{name}"] == 1}
    assert counted == ({binds} if binds else set())


def test_golden_gspo_ratio():
    logp, old = f64([-0.9, -1.7, -0.6]), f64([-1.0, -2.0, -0.5])
    sequence = of(logp, old, torch.ones_like(logp), ratio="sequence", clip_high=9).metrics
    assert sequence["ratio_max"].item() == pytest.approx(1.105171, abs=1e-6)
    assert sequence["ratio_min"].item() == pytest.approx(1.105171, abs=1e-6)
    token = of(logp, old, torch.ones_like(logp), clip_high=9).metrics
    assert token["ratio_max"].item() == pytest.approx(1.349859, abs=1e-6)
    assert token["ratio_min"].item() == pytest.approx(0.904837, abs=1e-6)


def test_gspo_s_gradient_is_that_of_its_sequence_objective():
    logp = f64([-0.9, -1.7, -0.6, 0.0], [-2.0, -1.0, 0.0, 0.0]).requires_grad_()
    old = f64([-1.0, -2.0, -0.5, 0.0], [-1.8, -1.1, 0.0, 0.0])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    advantages = f64([2.0], [-1.0])
    loss = of(
        logp,
        old,
        advantages.expand(2, 4),
        mask,
        ratio="sequence",
        clip_low=0.5,
        clip_high=0.5,
        aggregation="seq-mean-token-mean",
    ).loss
    log_ratio = ((logp - old) * mask).sum(1) / mask.sum(1)
    paper = -(log_ratio.exp() * advantages[:, 0]).mean()
    assert loss.item() == pytest.approx(paper.item(), abs=1e-12)
    ours, theirs = torch.autograd.grad(loss, logp)[0], torch.autograd.grad(paper, logp)[0]
    assert torch.allclose(ours, theirs, atol=1e-15)


LOOP_LOGP, LOOP_OLD = f64([-0.9, -1.7, -0.6], [-2.0, -1.0, 0.0]), f64([-1.0, -2.0, -0.5], [-1.8, -1.1, 0.0])
LOOP_MASK = torch.tensor([[True, True, True], [True, True, False]])
LOOP_TURN = torch.tensor([[3, 3, 4], [7, 9, -1]])


def loop_ratios(ratio: str, logp: Tensor = LOOP_LOGP, **more: Any) -> Tensor:
    """The ratio of every token, read off the loss with an advantage there alone."""
    rows = []
    for place in range(logp.numel()):
        advantages = torch.zeros(logp.numel()).double()
        advantages[place] = 1
        loss = of(logp, LOOP_OLD, advantages.view(2, 3), LOOP_MASK, ratio=ratio, clip_high=9, **more).loss
        rows.append(-loss.item() * int(LOOP_MASK.sum()))
    return torch.tensor(rows).double().view(2, 3)


def test_golden_gspo_the_product_of_the_token_ratios():
    row = of(LOOP_LOGP[:1], LOOP_OLD[:1], f64([1, 1, 1]), ratio="trajectory", clip_high=9).metrics
    assert row["ratio_max"].item() == row["ratio_min"].item() == pytest.approx(1.349859, abs=1e-6)


def test_d3_5_bandit_and_turn_ratios_are_products_of_token_ratios():
    token = loop_ratios("token")
    assert torch.allclose(token, torch.where(LOOP_MASK, (LOOP_LOGP - LOOP_OLD).exp(), 0.0))
    whole = torch.where(LOOP_MASK, token, 1.0).prod(1, keepdim=True).expand(2, 3)
    assert torch.allclose(loop_ratios("trajectory"), torch.where(LOOP_MASK, whole, 0.0))
    turns = loop_ratios("turn", turn=LOOP_TURN)
    expected = f64([token[0, 0] * token[0, 1]] * 2 + [token[0, 2]], [token[1, 0], token[1, 1], 0.0])
    assert torch.allclose(turns, expected)


@pytest.mark.parametrize("ratio", ["token", "turn", "trajectory"])
def test_d3_5_every_ratio_is_one_on_policy(ratio):
    metrics = of(LOOP_OLD, LOOP_OLD, torch.ones(2, 3), LOOP_MASK, ratio=ratio, turn=LOOP_TURN).metrics
    assert metrics["ratio_max"] == metrics["ratio_min"] == 1


def test_d3_5_one_turn_a_token_is_the_token_ratio_and_one_turn_a_row_the_trajectory_s():
    each = torch.arange(3).expand(2, 3)
    assert torch.allclose(loop_ratios("turn", turn=each), loop_ratios("token"))
    assert torch.allclose(loop_ratios("turn", turn=each * 0 + 5), loop_ratios("trajectory"))


def test_d3_5_the_bandit_gradient_is_that_of_its_objective():
    logp = LOOP_LOGP.clone().requires_grad_()
    advantages = f64([2.0], [-1.0])
    loss = of(
        logp,
        LOOP_OLD,
        advantages.expand(2, 3),
        LOOP_MASK,
        ratio="trajectory",
        clip_low=0.9,
        clip_high=9,
        aggregation="seq-mean-token-mean",
    ).loss
    objective = -(((logp - LOOP_OLD) * LOOP_MASK).sum(1).exp() * advantages[:, 0]).mean()
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)
    ours, theirs = (torch.autograd.grad(x, logp)[0] for x in (loss, objective))
    assert torch.allclose(ours, theirs, atol=1e-14)


@pytest.mark.parametrize("ratio", ["turn", "trajectory"])
def test_X2_X7_product_ratios_do_not_depend_on_other_rows_padding_or_garbage(ratio):
    advantages = f64([2.0, 2.0, 1.0], [-1.0, 0.5, math.nan])
    denominators = Denominators.of(LOOP_MASK.sum(1))

    def gradient(rows: list[int], padding: int, fill: float) -> Tensor:
        logp = torch.where(LOOP_MASK, LOOP_LOGP, fill)[rows].requires_grad_()

        def wide(x: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(x, (padding, padding), value=value)

        loss = policy_loss(
            wide(logp, fill),
            wide(LOOP_OLD[rows], fill),
            wide(advantages[rows], fill),
            wide(LOOP_MASK[rows], False),
            config=PolicyLossConfig(ratio=ratio, clip_high=9),
            denominators=denominators,
            turn=wide(LOOP_TURN[rows], -77),
        ).loss
        return torch.autograd.grad(loss, logp)[0]

    whole = gradient([0, 1], 0, 0.0)
    assert whole[LOOP_MASK].all()
    assert torch.equal(gradient([0, 1], 3, math.nan), whole)
    assert torch.equal(torch.cat([gradient([0], 1, math.inf), gradient([1], 0, math.nan)]), whole)
    assert torch.equal(gradient([1, 0], 0, 0.0).flip(0), whole)


def test_a_step_without_a_token_has_no_turn_either():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert of(LOOP_LOGP, LOOP_OLD, LOOP_OLD, nothing, ratio="turn", turn=LOOP_TURN).loss == 0


@pytest.mark.parametrize("eps", [0.1, 0.28, 3.0])
def test_d3_6_in_log_space_the_bounds_multiply_to_one(eps):
    low, high = PolicyLossConfig(clip_low=eps, clip_high=eps, clip_space="log").clip_bounds
    assert low * high == pytest.approx(1) and high == 1 + eps


def test_d3_6_the_lower_bound_binds_at_its_inverse():
    config = {"clip_low": 0.25, "clip_high": 0.25, "clip_space": "log"}
    for ratio, binds in ((0.79, 1), (0.81, 0)):
        result = of(f64([math.log(ratio)]), f64([0.0]), f64([-1.0]), **config)
        assert result.metrics["clipfrac_low"] == binds
        assert result.loss.item() == pytest.approx(max(ratio, 0.8))
    linear = of(f64([math.log(0.79)]), f64([0.0]), f64([-1.0]), clip_low=0.25, clip_high=0.25)
    assert linear.loss.item() == pytest.approx(0.79)


def test_X1_log_space_leaves_the_upper_bound_and_the_unclipped_loss_alone():
    for advantage, ratio in ((1.0, 1.5), (1.0, 0.9), (-1.0, 1.1)):
        losses = {one_token(advantage, ratio, clip_space=space).loss.item() for space in ("linear", "log")}
        assert len(losses) == 1


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    logp = f64([math.log(3.0)]).requires_grad_()
    clipped = of(logp, f64([0.0]), f64([2.0]), clip_high=0.28).loss
    assert torch.autograd.grad(clipped, logp)[0].item() == 0
    cispo = of(logp, f64([0.0]), f64([2.0]), clip_high=0.28, objective="cispo")
    assert torch.autograd.grad(cispo.loss, logp)[0].item() == pytest.approx(-1.28 * 2.0)
    assert cispo.metrics["clipfrac_high"] == 1


def test_the_log_ratio_is_clamped_before_it_is_exponentiated():
    metrics = of(f64([0.0, -900.0]), f64([-900.0, 0.0]), f64([1.0, 1.0])).metrics
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(20))
    assert metrics["ratio_min"].item() == pytest.approx(math.exp(-20))


def test_weights_scale_the_policy_term_and_leave_the_denominators():
    logp = f64([-1.0, -1.0])
    whole = of(logp, logp, f64([1.0, 1.0])).loss.item()
    dropped = of(logp, logp, f64([1.0, 1.0]), weights=f64([0.0, 1.0])).loss.item()
    assert (whole, dropped) == (-1.0, -0.5)


def test_terms_add_up():
    logp, ref = f64([-1.0]).requires_grad_(), f64([-1.2])
    entropy = f64([0.7]).requires_grad_()
    result = of(
        logp,
        logp.detach(),
        f64([2.0]),
        logp_ref=ref,
        entropy=entropy,
        kl="k1",
        kl_coef=0.1,
        entropy_coef=0.01,
    )
    assert result.loss.item() == pytest.approx(-2.0 + 0.1 * 0.2 - 0.01 * 0.7)
    gradient = torch.autograd.grad(result.loss, [logp, entropy])
    assert gradient[0].item() == pytest.approx(-2.0 + 0.1)
    assert gradient[1].item() == pytest.approx(-0.01)
    metrics = {name: value.item() for name, value in result.metrics.items()}
    assert metrics["loss/total"] == pytest.approx(
        metrics["loss/pg"] + metrics["loss/kl"] + metrics["loss/entropy"]
    )
    assert metrics["kl_ref"] == pytest.approx(0.2) and metrics["entropy_mean"] == pytest.approx(0.7)


def test_metrics_of_micro_batches_combine_to_those_of_the_batch():
    torch.manual_seed(0)
    logp, old, advantages = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    entropy, weights = torch.rand(2, 6, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 0, 2, 4])[:, None]
    denominators = Denominators.of(mask.sum(1))
    config = PolicyLossConfig(clip_dual=3.0)

    def metrics(*rows: int) -> dict[str, Tensor]:
        i = list(rows)
        return policy_loss(
            logp[i],
            old[i],
            advantages[i],
            mask[i],
            config=config,
            denominators=denominators,
            weights=weights[i],
            logp_ref=old[i],
            entropy=entropy[i],
        ).metrics

    whole = combine_metrics([metrics(*range(6))])
    parts = combine_metrics([metrics(0, 1), metrics(3), metrics(2, 4, 5)])
    assert parts == pytest.approx(whole, abs=1e-12)
    assert whole["tokens_in_loss"] == 15 and whole["rows_in_loss"] == 5
    assert whole["approx_kl"] == pytest.approx((old - logp)[mask].mean().item())
    assert whole["ratio_max"] == pytest.approx((logp - old)[mask].max().exp().item())


def test_metrics_do_not_depend_on_the_number_of_ranks():
    logp, old = f64([-1.0, -2.0], [-0.5, -1.5]), f64([-1.2, -2.0], [-0.5, -1.0])
    advantages, mask = f64([1.0, -1.0], [0.5, 2.0]), torch.ones(2, 2, dtype=torch.bool)
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1)

    def combined(parts: list[list[int]], world_size: int) -> dict[str, float]:
        denominators = Denominators.of(mask.sum(1), world_size=world_size)
        return combine_metrics(
            [
                policy_loss(
                    logp[i],
                    old[i],
                    advantages[i],
                    mask[i],
                    config=config,
                    denominators=denominators,
                    logp_ref=old[i],
                    entropy=-logp[i],
                ).metrics
                for i in parts
            ]
        )

    assert combined([[0], [1]], world_size=2) == pytest.approx(combined([[0, 1]], world_size=1))


def test_only_log_probs_and_entropies_receive_gradients():
    logp, old, advantages, weights, ref, entropy = (
        torch.full((1, 2), x, requires_grad=True) for x in (-1.0, -1.1, 2.0, 0.9, -1.3, 0.7)
    )
    loss = of(
        logp, old, advantages, weights=weights, logp_ref=ref, entropy=entropy, kl_coef=0.1, entropy_coef=0.1
    ).loss
    loss.backward()
    assert all(x.grad is not None for x in (logp, entropy))
    assert all(x.grad is None for x in (old, advantages, weights, ref))


def test_an_empty_step_has_no_extremes_and_no_loss():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    logp = torch.full((2, 3), math.nan, requires_grad=True)
    result = of(logp, logp.detach(), logp.detach(), nothing)
    assert result.loss.item() == 0
    assert not torch.autograd.grad(result.loss, logp)[0].any()
    assert {name for name in combine_metrics([result.metrics]) if name.startswith("ratio")} == {"ratio_mean"}


def test_half_precision_log_probs_are_taken_to_float32():
    logp = torch.tensor([[-1.0]], dtype=torch.bfloat16, requires_grad=True)
    result = of(logp, logp.detach(), torch.ones(1, 1))
    assert result.loss.dtype == torch.float32
    assert torch.autograd.grad(result.loss, logp)[0].item() == -1


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"clip_dual": 1.0}, ConfigError, "clip_dual must be above 1"),
        ({"clip_low": -0.1}, ConfigError, "must not be negative"),
        ({"kl_coef": -0.1}, ConfigError, "kl_coef must not be negative"),
        ({"aggregation": "seq-mean-token-sum-norm"}, ConfigError, "length_norm"),
        ({"aggregation": "token_mean"}, UnknownName, "did you mean 'token-mean'"),
        ({"objective": "ppo"}, UnknownName, "known: cispo, clip"),
        ({"ratio": "sequences"}, UnknownName, "did you mean 'sequence'"),
        ({"clip_space": "logs"}, UnknownName, "did you mean 'log'"),
        ({"kl": "low_var_kl"}, UnknownName, "k3"),
    ],
)
def test_a_config_that_cannot_be_is_refused_at_once(fields, error, message):
    with pytest.raises(error, match=message):
        PolicyLossConfig(**fields)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kl_coef": 0.1}, "no logp_ref was passed"),
        ({"entropy_coef": 0.1}, "no entropy was passed"),
        ({"weights": torch.ones(1, 1)}, "weights has shape"),
        ({"ratio": "turn"}, "no turn was passed"),
        ({"turn": torch.ones(2)}, "turn has shape"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
    ],
)
def test_a_missing_or_misshapen_tensor_says_what_to_pass(more, message):
    logp = torch.zeros(2, 3)
    with pytest.raises(UsageError, match=message):
        of(logp, logp, logp, **more)


def test_one_advantage_a_trajectory_is_refused_with_the_way_to_broadcast():
    logp = torch.zeros(2, 3)
    with pytest.raises(UsageError, match=r"credit\.broadcast"):
        of(logp, logp, torch.zeros(2))
