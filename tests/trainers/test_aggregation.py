"""From token values to one number, in shares that add up."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym.errors import ConfigError, UnknownName, UsageError
from agentgym.trainers.aggregation import AGGREGATION_MODES, Denominators, aggregate

LOSSES = torch.tensor([[1, 3, 0, 0], [2, 2, 2, 2]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False, False], [True] * 4])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 2),
        ("token-sum", 12),
        ("seq-mean-token-sum", 6),
        ("seq-mean-token-mean", 2),
        ("seq-mean-token-sum-norm", 1.5),
    ],
)
def test_golden_aggregation(mode, expected):
    denominators = Denominators.of(MASK.sum(1), length_norm=4)
    assert aggregate(LOSSES, MASK, mode, denominators).item() == expected


def test_golden_aggregation_the_older_sum_norm_had_no_row_mean():
    # What verl computed before it divided by the rows: the step grew with the micro-batch.
    denominators = Denominators.of(MASK.sum(1), length_norm=4)
    assert aggregate(LOSSES, MASK, "token-sum", denominators).item() / 4 == 3
    assert aggregate(LOSSES, MASK, "seq-mean-token-sum-norm", denominators).item() * 2 == 3


def test_the_fixed_factor_must_be_configured():
    with pytest.raises(ConfigError, match="needs a positive length_norm"):
        aggregate(LOSSES, MASK, "seq-mean-token-sum-norm", Denominators.of(MASK.sum(1)))


def test_an_unknown_mode_names_the_near_ones():
    with pytest.raises(UnknownName, match="token-mean"):
        aggregate(LOSSES, MASK, "token-means", Denominators.of(MASK.sum(1)))  # type: ignore[arg-type]


def test_a_mask_in_place_of_lengths_is_refused():
    with pytest.raises(UsageError, match=r"mask\.sum\(1\)"):
        Denominators.of(MASK)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_a_weight_of_two_is_the_row_twice_and_of_zero_the_row_not_there(mode):
    values = torch.tensor([[1, 3, 9], [2, 5, 7], [4, 9, 9]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True] * 3, [True, False, False]])
    weight = torch.tensor([2.0, 1.0, 0.0])
    weighted = aggregate(
        values,
        mask,
        mode,
        Denominators.of(mask.sum(1), row_weight=weight, length_norm=3),
        row_weight=weight,
    )
    rows = torch.tensor([0, 0, 1])
    twice = aggregate(values[rows], mask[rows], mode, Denominators.of(mask[rows].sum(1), length_norm=3))
    assert weighted.item() == pytest.approx(twice.item(), abs=1e-12)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_rows_without_sampled_tokens_do_not_count(mode):
    values = torch.cat([LOSSES, torch.full((2, 4), 99.0)])
    mask = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.bool)])
    without = aggregate(LOSSES, MASK, mode, Denominators.of(MASK.sum(1), length_norm=4))
    assert torch.equal(aggregate(values, mask, mode, Denominators.of(mask.sum(1), length_norm=4)), without)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_an_empty_batch_is_zero_with_a_zero_gradient(mode):
    values = torch.full((2, 3), torch.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = aggregate(values, mask, mode, Denominators.of(mask.sum(1), length_norm=4))
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == 0 and not gradient.any()


def test_a_trajectory_of_several_rows_can_count_once():
    # Rows 0 and 1 are one trajectory with 6 tokens; row 2 is another with 2.
    values = torch.tensor([[1, 3, 0, 0], [2, 2, 2, 2], [5, 7, 0, 0]], dtype=torch.float64)
    lengths = torch.tensor([2, 4, 2])
    mask = torch.arange(4) < lengths[:, None]
    weight = lengths / torch.tensor([6, 6, 2])
    means = aggregate(
        values, mask, "seq-mean-token-mean", Denominators.of(lengths, row_weight=weight), row_weight=weight
    )
    assert means.item() == pytest.approx((12 / 6 + 12 / 2) / 2)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_shares_of_any_split_add_up(data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=9))
    cut = sorted(data.draw(st.sets(st.integers(1, max(1, len(lengths) - 1)))))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    values = torch.arange(mask.numel(), dtype=torch.float64).view(mask.shape).sin()
    for mode in AGGREGATION_MODES:
        denominators = Denominators.of(torch.tensor(lengths), length_norm=6)
        whole = aggregate(values, mask, mode, denominators)
        edges = [0, *[c for c in cut if c < len(lengths)], len(lengths)]
        parts = [aggregate(values[a:b], mask[a:b], mode, denominators) for a, b in itertools.pairwise(edges)]
        assert sum(p.item() for p in parts) == pytest.approx(whole.item(), abs=1e-12)
