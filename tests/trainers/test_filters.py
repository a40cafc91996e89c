"""Which rows and groups are not learnt from: S12, S13 and each filter on its own."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym.errors import UsageError
from agentgym.outcome import Outcome
from agentgym.trainers.aggregation import Denominators
from agentgym.trainers.batch import collate, rows
from agentgym.trainers.filters import (
    FilterSection,
    filter_rows,
    group_metrics,
    incomplete,
    keep_groups,
    overlong,
    repetitive,
    unreadable,
)
from agentgym.trainers.policy_loss import PolicyLossConfig, policy_loss
from agentgym.trajectory import Segment, Trajectory, Turn


def chat(ids=(5, 6, 7), completion="go north", outcome=None, **last) -> Trajectory:
    """Two turns in one segment; the second one is described by the arguments."""
    segment = Segment()
    segment.append_context([1, 2])
    first = segment.append_sampled([3, 4], [-1.0, -1.0])
    segment.append_context([1])
    second = segment.append_sampled(list(ids), [-1.0] * len(ids))
    turns = [
        Turn(0, 0, first, (), "look", "look", 0.0),
        Turn(1, 0, second, (), completion, completion, 1.0, **last),
    ]
    return Trajectory("x", "e", "t", segments=[segment], turns=turns, outcome=outcome or Outcome.completed())


def judged(trajectory: Trajectory, **section) -> dict[str, float]:
    result = filter_rows(rows([trajectory]), [trajectory], FilterSection(**section))
    return {name.removeprefix("filter/"): n for name, n in result.metrics.items() if n}


def test_an_ordinary_row_stays():
    assert judged(chat()) == {}


def test_overlong_by_finish_reason_or_by_count():
    cut, full = chat(finish_reason="length"), chat(ids=range(8))
    assert judged(cut) == {"overlong": 1, "rows_out": 1}
    (row,) = rows([full])
    assert not overlong(row, [full])
    assert not overlong(row, [full], 9)
    assert overlong(row, [full], 8)


@pytest.mark.parametrize(
    ("outcome", "out"),
    [
        (Outcome.completed(), False),
        (Outcome.truncated("turns"), False),
        (Outcome.truncated("repeat"), False),
        (Outcome.truncated("tokens"), True),
        (Outcome.truncated("context"), True),
        (Outcome.truncated("time"), True),
    ],
)
def test_incomplete_is_cut_off_before_an_answer_not_out_of_turns(outcome, out):
    trajectory = chat(outcome=outcome)
    assert incomplete(rows([trajectory])[0], [trajectory]) is out


def test_incomplete_is_also_a_last_turn_without_an_action():
    assert judged(chat(valid_action=False)) == {"incomplete": 1, "rows_out": 1}
    assert judged(chat(outcome=Outcome.truncated("turns")), truncations=["turns"]) == {
        "incomplete": 1,
        "rows_out": 1,
    }


def test_in_a_windowed_layout_each_row_is_judged_by_its_own_turn(make_trajectory):
    windowed = make_trajectory("w", lengths=((3, 2), (3, 2), (3, 2)), outcome=Outcome.truncated("context"))
    windowed.turns[0] = replace(windowed.turns[0], valid_action=False)
    out = filter_rows(rows([windowed]), [windowed], FilterSection()).out
    assert out.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("ids", "out"),
    [
        ([9] * 29, True),
        ([9] * 28, False),
        (list(range(20)) * 10, True),
        (list(range(20)) * 9 + list(range(19)), False),
        (list(range(300)), False),
        ([9] * 10, False),
    ],
)
def test_repetitive_is_a_run_of_20_tokens_at_10_places(ids, out):
    (row,) = rows([chat(ids=ids)])
    assert repetitive(row) is out


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 4), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_repetition_is_what_counting_every_window_says(ids, ngram, repeats):
    (row,) = rows([chat(ids=ids)])
    windows = [ids[i : i + ngram] for i in range(len(ids) - ngram + 1)]
    counted = any(windows.count(window) >= repeats for window in windows)
    assert repetitive(row, ngram, repeats) is counted


@pytest.mark.parametrize(
    "text",
    [
        "go \ufffd north",
        "go\x00",
        "\x1b[31m",
        "\x85",
        "private \ue000",
        "lone \ud800",
        "caf\u00c3\u00a9",
        "it\u00e2\u20ac\u2122s",
        "\u00f0\u0178\u02dc\u20ac",
        "\u00ef\u00bb\u00bftext",
        "a\u00c2\u00a0b",
    ],
)
def test_unreadable(text):
    trajectory = chat(completion=text)
    assert unreadable(rows([trajectory])[0], [trajectory])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tab\tline\nreturn\r",
        "caf\u00e9 \u2019 \u2026 S\u00c3O NA\u00cfVE \u00c2GE LIBERT\u00c9\u2026 CAF\u00c9\u2019s",
        "\u5317\u3078\u884c\u304f",
        "\U0001f600 \u00bd \u20ac5",
        "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea",
    ],
)
def test_text_of_any_language_is_readable(text):
    trajectory = chat(completion=text)
    assert not unreadable(rows([trajectory])[0], [trajectory])


def test_mojibake_of_every_kind_of_text_is_seen():
    for text in ("\u00e9t\u00e9", "it\u2019s", "\U0001f680"):
        garbled = text.encode().decode("cp1252", "replace")
        trajectory = chat(completion=garbled)
        assert unreadable(rows([trajectory])[0], [trajectory])


def test_a_switch_turns_its_filter_off():
    bad = chat(ids=[9] * 40, completion="\ufffd", finish_reason="length", valid_action=False)
    names = ("overlong", "incomplete", "repetitive", "unreadable")
    assert judged(bad) == {**dict.fromkeys(names, 1), "rows_out": 1}
    for name in names:
        assert name not in judged(bad, **{name: False})
    assert judged(bad, **dict.fromkeys(names, False)) == {}


def test_s12_filtered_rows_have_no_gradient_not_even_the_entropy_s():
    trajectories = [chat(), chat(finish_reason="length"), chat(valid_action=False), chat(ids=[8, 9])]
    made = rows(trajectories)
    out = filter_rows(made, trajectories, FilterSection()).out
    assert out.tolist() == [False, True, True, False]
    batch = collate(made)
    mask = batch.loss_mask & ~out[:, None]
    logp = torch.randn(mask.shape).double().requires_grad_()
    entropy = torch.rand(mask.shape).double().requires_grad_()
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1)

    def gradients(chosen: list[int], counted: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = policy_loss(
            logp[chosen],
            logp[chosen].detach(),
            torch.ones_like(logp[chosen]),
            counted[chosen],
            config=config,
            denominators=Denominators.of(counted[chosen].sum(1)),
            logp_ref=logp[chosen].detach() - 0.1,
            entropy=entropy[chosen],
        ).loss
        return torch.autograd.grad(loss, (logp, entropy))

    masked = gradients([0, 1, 2, 3], mask)
    for gradient in masked:
        assert not gradient[out].any() and gradient[~out].any()
    # Masked out or not there at all is the same: they are in no denominator.
    for gradient, alone in zip(masked, gradients([0, 3], batch.loss_mask), strict=True):
        assert torch.equal(gradient, alone)


def kept(rewards: list[float], groups: list[int], fraction: float = 0.75, valid=None) -> list[int]:
    ids = torch.tensor(groups)
    own = keep_groups(torch.tensor(rewards), ids, None if valid is None else torch.tensor(valid), fraction)
    return ids[own].tolist()


def test_s13_the_three_quarters_of_largest_spread_stay_whole():
    rewards = [1.0, 0, 5, 5, 3, 0, 10, 0]
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    assert kept(rewards, groups) == [0, 0, 2, 2, 3, 3]
    assert kept(rewards, groups, 0.5) == [2, 2, 3, 3]
    assert kept(rewards, groups, 0.1) == [3, 3]
    assert kept(rewards, groups, 1.0) == groups


def test_s13_all_equal_groups_go_first_and_ties_go_by_order():
    assert kept([2.4] * 6 + [0, 0.1], [0, 0, 0, 1, 1, 1, 2, 2], 0.34) == [2, 2]
    assert kept([1.0, 0, 1, 0, 1, 0, 1, 0], [4, 4, 7, 7, 2, 2, 9, 9]) == [4, 4, 7, 7, 2, 2]


def test_s13_a_failed_member_is_in_no_spread_and_not_kept():
    rewards, groups = [1.0, math.nan, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]
    assert kept(rewards, groups, 0.5, [True, False, True, True, True, True]) == [1, 1, 1]
    assert kept(rewards, groups, 1.0, [True, False, True, True, True, True]) == [0, 0, 1, 1, 1]
    assert kept([math.nan], [0], 0.5, [False]) == []


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_s13_the_order_of_members_decides_nothing(data):
    members = data.draw(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.1, 0.2, 0.3, 1.0])), min_size=1, max_size=24)
    )
    fraction = data.draw(st.floats(0.05, 1))
    shuffled = random.Random(0).sample(members, len(members))
    chosen = [
        set(kept([r for _, r in order], [g for g, _ in order], fraction)) for order in (members, shuffled)
    ]
    assert chosen[0] == chosen[1]
    count = len({g for g, _ in members})
    assert len(chosen[0]) == max(math.floor(fraction * count + 1e-9), 1)


def test_metrics_and_a_fraction_that_cannot_be():
    groups = torch.tensor([0, 0, 1, 1])
    assert group_metrics(keep_groups(torch.tensor([1.0, 0, 1, 1]), groups), groups) == {
        "filter/groups_kept": 1
    }
    with pytest.raises(UsageError, match="share"):
        keep_groups(torch.tensor([1.0]), torch.tensor([0]), None, 0.0)
