"""GiGPO: golden vector, X13, anchors of real observations."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentgym.errors import UsageError
from agentgym.messages import Content, ImagePart, TextPart
from agentgym.outcome import Outcome
from agentgym.trainers.advantages import dr_grpo, grpo
from agentgym.trainers.collect import Collection
from agentgym.trainers.credit import accumulate, broadcast
from agentgym.trainers.gigpo import (
    GiGPO,
    GiGPOSection,
    anchor_clusters,
    anchor_metrics,
    similarity_clusters,
    step_advantages,
)
from agentgym.trainers.method import Step
from agentgym.trainers.policy_gradient import PolicyGradientConfig, advantages
from agentgym.trainers.run import Run
from agentgym.trajectory import Segment, Trajectory, Turn


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def play(
    id: str,
    observations: Sequence[str | Content],
    rewards: Sequence[float],
    group: int = 0,
    outcome: Outcome | None = None,
) -> Trajectory:
    """An episode whose turns read a token and sample one."""
    segment, turns = Segment(), []
    for i, (o, r) in enumerate(zip(observations, rewards, strict=True)):
        segment.append_context([5])
        span = segment.append_sampled([6], [-1.0])
        turns.append(Turn(i, 0, span, (TextPart(o),) if isinstance(o, str) else o, "c", "a", r))
    outcome = outcome or Outcome.completed()
    return Trajectory(id, "e", "t", group=group, segments=[segment], turns=turns, outcome=outcome)


def whole(
    trajectories: Sequence[Trajectory], section: GiGPOSection | None = None, rewards: Tensor | None = None
) -> Tensor:
    """A of every turn ``[U]``, as the loop takes it; 0 for turns without a token in the loss.

    ``rewards`` are what shaping made of the trajectories'.
    """
    section = section or GiGPOSection()
    config = PolicyGradientConfig.model_validate(
        {
            "env": "agentgym.testing:EchoEnv",
            "model": "none",
            "estimator": "grpo" if section.norm == "std" else "dr_grpo",
            "gigpo": section,
        }
    )
    collection = Collection.of(trajectories)
    assert collection.whole is not None
    rewards = collection.rewards if rewards is None else rewards
    step = Step(0, collection, collection.whole, rewards, list(collection.rows))
    method = GiGPO(config, cast(Run, None))  # it reads no run
    tokens = method.advantages(step, advantages(config, step)[1])
    made = torch.zeros(len(collection.units.trajectory))
    spoken = collection.units.index >= 0
    made[collection.units.index[spoken]] = tokens[spoken]
    return made


GOLDEN = [play("1", "abc", [0, 0, 10]), play("2", "abb", [0, 0, 0])]


def test_golden_gigpo():
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    returns = accumulate(f64(0, 0, 10, 0, 0, 0), owner, 0.95)
    assert returns.tolist() == pytest.approx([9.025, 9.5, 10, 0, 0, 0])
    step = step_advantages(returns, anchor_clusters(GOLDEN))
    assert step.tolist() == pytest.approx([0.707107, 1.1547, 0, -0.707107, -0.57735, -0.57735], abs=1e-5)
    assert step[2] == 0
    total = whole(GOLDEN)
    assert (total - step).tolist() == pytest.approx([0.707107] * 3 + [-0.707107] * 3, abs=1e-6)


def test_golden_gigpo_statistics_are_over_trajectories_not_rows():
    # The biased forms of the golden vector, for contrast: a row a turn, each with the trajectory's reward.
    rows = grpo(f64(10, 10, 10, 0, 0, 0), torch.zeros(6, dtype=torch.long))
    assert rows[0].item() == pytest.approx(0.912871, abs=1e-6)
    rows = grpo(f64(10, 10, 0, 0, 0, 0, 0), torch.zeros(7, dtype=torch.long))
    assert [rows[0].item(), rows[-1].item()] == pytest.approx([1.46385, -0.58554], abs=1e-5)
    uneven = [play("win", "ab", [0, 10]), play("loss", "cdefg", [0] * 5)]
    assert whole(uneven, GiGPOSection(omega=0.0)).tolist() == pytest.approx(
        [0.707107] * 2 + [-0.707107] * 5, abs=1e-6
    )


@pytest.mark.parametrize(("norm", "base"), [("std", grpo), ("none", dr_grpo)])
def test_X13_omega_zero_is_grpo_at_trajectory_level_bit_for_bit(norm, base):
    advantages = base(torch.tensor([10.0, 0.0]), torch.zeros(2, dtype=torch.long))
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(whole(GOLDEN, GiGPOSection(omega=0.0, norm=norm)), advantages[owner])


def test_X13_distinct_observations_have_no_step_advantage():
    distinct = [play("1", "abc", [0, 0, 10]), play("2", "def", [0, 3, 0])]
    assert torch.equal(whole(distinct), whole(distinct, GiGPOSection(omega=0.0)))


def test_X13_one_observation_a_step_gives_the_step_s_group_relative_return():
    group = [play(str(i), "abc", r) for i, r in enumerate([[0, 0, 10], [0, 1, 0], [2, 0, 0]])]
    returns = torch.stack(
        [accumulate(f64(*(t.reward for t in g.turns)), torch.zeros(3), 0.95) for g in group]
    )
    step = whole(group) - whole(group, GiGPOSection(omega=0.0))
    for turn in range(3):
        expected = grpo(returns[:, turn], torch.zeros(3, dtype=torch.long)).float()
        assert torch.allclose(step.view(3, 3)[:, turn], expected, rtol=0, atol=1e-6)


def test_X13_a_trajectory_s_rows_may_stand_twice():
    # Units are turns: tokens read them through an index, so a duplicated row changes no statistic.
    advantages = whole(GOLDEN)
    index = torch.tensor([[0, 0, -1], [1, 2, -1], [3, 4, 5]])
    once, twice = broadcast(advantages, index), broadcast(advantages, index[[0, 1, 1, 2]])
    assert torch.equal(twice[[0, 1, 3]], once)


def test_a_failed_trajectory_is_in_no_cluster_and_gets_zero():
    failed = play("3", "ab", [0, 5], outcome=Outcome.infra_failed("environment"))
    with_failed = whole([*GOLDEN, failed])
    assert torch.equal(with_failed[:6], whole(GOLDEN))
    assert with_failed[6:].tolist() == [0, 0]


def test_what_shaping_adds_reaches_the_episode_part_alone():
    # Both score 5 for the environment, a turn apart; the shorter one then loses 2 for its length, say.
    pair = [play("1", "abc", [0, 0, 5]), play("2", "ab", [0, 5])]
    shaped = torch.tensor([5.0, 3.0])
    step = whole(pair) - whole(pair, GiGPOSection(omega=0.0))
    part = whole(pair, rewards=shaped) - whole(pair, GiGPOSection(omega=0.0), shaped)
    assert torch.allclose(part, step, rtol=0, atol=1e-6)
    episode = whole(pair, GiGPOSection(omega=0.0), shaped)
    assert episode.tolist() == pytest.approx([0.707107] * 3 + [-0.707107] * 2, abs=1e-6)
    assert step[:2].tolist() == pytest.approx([-0.707107] * 2, abs=1e-4)


def test_groups_never_share_a_cluster():
    other = replace(GOLDEN[1], group=1)
    for similarity in (None, 0.5):
        clusters = anchor_clusters([GOLDEN[0], other], similarity).tolist()
        assert not set(clusters[:3]) & set(clusters[3:])
    assert not whole([GOLDEN[0], other]).any()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_degenerate_clusters_are_exactly_zero_and_the_rest_sums_to_zero(data):
    count = data.draw(st.integers(1, 12))
    clusters = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    values = data.draw(st.lists(st.sampled_from([2.4, 0.1, -7.7]), min_size=count, max_size=count))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    returns = torch.where(valid, f64(*values), math.nan)
    for norm in ("std", "none"):
        advantages = step_advantages(returns, clusters, valid, norm)
        assert not advantages[~valid].any()
        for cluster in set(clusters.tolist()):
            inside = valid & (clusters == cluster)
            if len(set(returns[inside].tolist())) <= 1:
                assert not advantages[inside].any()
            assert abs(float(advantages[inside].sum())) < 1e-9


def test_keys_are_exact_in_text_images_and_order():
    red, blue = ImagePart(b"red"), ImagePart(b"blue")
    contents: list[Content] = [
        (TextPart("ab"),),
        (TextPart("a"), TextPart("b")),
        (TextPart("ab "),),
        (TextPart("ab"), red),
        (TextPart("ab"), blue),
        (red, TextPart("ab")),
        (ImagePart(b"ab"),),
        (),
    ]
    both = [play("1", contents, [0.0] * len(contents)), play("2", contents, [0.0] * len(contents))]
    keys = anchor_clusters(both).tolist()
    assert len(set(keys)) == len(contents)
    assert keys[: len(contents)] == keys[len(contents) :]


@pytest.mark.parametrize("observations", [True, False])
@pytest.mark.parametrize("window", [1, 2, 9])
def test_the_history_that_a_wrapper_shows_is_no_part_of_the_state(window, observations):
    from agentgym.testing import EchoEnv
    from agentgym.wrappers.observations import ObservationHistory

    def texts(env) -> list[str]:
        seen = [env.reset(seed=3)[0]]
        seen += [env.step(f"say {i}")[0] for i in range(2)]
        return [str(text) for text in seen]

    bare = texts(EchoEnv(turns=3))
    shown = texts(ObservationHistory(EchoEnv(turns=3), window, observations))
    assert shown[1:] != bare[1:]
    pair = [play("1", bare, [0.0] * 3), play("2", shown, [0.0] * 3)]
    for similarity in (None, 0.99):
        both = anchor_clusters(pair, similarity).tolist()
        assert both[:3] == both[3:]


def test_similar_texts_join_and_order_and_repetition_do_not_matter():
    texts = [
        "You are in the kitchen. You see a red apple.",
        "You are in the kitchen. You see a red apple!",
        "You are in the cellar, and it is dark.",
        "You are in the kitchen. You see a red apple.",
    ]
    clusters = similarity_clusters(texts, 0.9)
    assert clusters[0] == clusters[1] == clusters[3] != clusters[2]
    assert len(set(similarity_clusters(texts, 1.0))) == 3
    assert similarity_clusters([], 0.9) == []
    shuffled = list(range(4))
    random.Random(0).shuffle(shuffled)
    assert similarity_clusters([texts[i] for i in shuffled], 0.9) == [clusters[i] for i in shuffled]
    with pytest.raises(UsageError, match=r"0\.95"):
        similarity_clusters(texts, 0.0)


def test_long_texts_of_few_characters_are_compared_too():
    # difflib leaves out characters that are frequent in long texts unless told not to.
    assert similarity_clusters(["ab" * 200, "ab" * 200 + "c"], 0.95) == [0, 0]


@given(st.lists(st.text("ab ", max_size=6), max_size=12), st.sampled_from([0.5, 0.8, 1.0]))
@settings(max_examples=60, deadline=None)
def test_equal_texts_share_a_cluster_and_numbers_have_no_gaps(texts, threshold):
    clusters = similarity_clusters(texts, threshold)
    assert set(clusters) == set(range(len(set(clusters))))
    by_text = dict(zip(texts, clusters, strict=True))
    assert [by_text[text] for text in texts] == clusters
    if threshold == 1.0:
        assert len(set(clusters)) == len(set(texts))


def test_images_must_be_equal_for_similar_texts_to_join():
    def seen(text: str, image: bytes) -> Content:
        return (TextPart(text), ImagePart(image))

    pages = [seen("a page of text", b"1"), seen("a page of text.", b"1"), seen("a page of text", b"2")]
    clusters = anchor_clusters([play("1", pages, [0.0] * 3)], 0.9).tolist()
    assert clusters[0] == clusters[1] != clusters[2]


def test_metrics_say_how_much_was_compared():
    metrics = anchor_metrics(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([True, True, True, True, False]))
    assert metrics == {"gigpo/cluster_size": 1.5, "gigpo/alone_frac": 0.5}
    assert anchor_metrics(torch.tensor([0]), torch.tensor([False])) == {}
