"""IGPO: golden vectors, the invariants I1 to I17, and the method on SearchQA."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from agentgym.errors import ConfigError, UsageError
from agentgym.evaluation import answers
from agentgym.outcome import Outcome
from agentgym.trainers.advantages import group_statistics, grpo
from agentgym.trainers.answer_scoring import Query, WrappedAnswer, score_answers, turn_contexts
from agentgym.trainers.collect import Collection
from agentgym.trainers.correction import CorrectionConfig
from agentgym.trainers.credit import broadcast
from agentgym.trainers.filters import FilterSection
from agentgym.trainers.igpo import (
    IGPO,
    IGPOSection,
    Shares,
    accumulate,
    info_gains,
    last_turns,
    turn_advantages,
    turn_rewards,
)
from agentgym.trainers.igpo_metrics import answering_metrics, igpo_metrics, is_malformed
from agentgym.trainers.method import Step
from agentgym.trainers.policy_gradient import POLICY_GRADIENT
from agentgym.trainers.policy_gradient import PolicyGradientConfig as Config
from agentgym.trainers.policy_loss import PolicyLossConfig
from agentgym.trainers.update import make_loss
from agentgym.trajectory import Trajectory

from .test_resume import Interrupted, Stop, resume, state

GOLDEN = [[-2.0, -1.0, -0.5], [-2.0, -2.5]]
NAN = float("nan")


def f64(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def owners(scores: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([i for i, own in enumerate(scores) for _ in own], dtype=torch.long)


def known(
    scores: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    groups: Sequence[int] | None = None,
    valid: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores by trajectory and turn, as the pure functions take them."""
    return (
        f64([s for own in scores for s in own]),
        f64(outcomes),
        owners(scores),
        torch.tensor(groups or [0] * len(scores)),
        torch.tensor(valid or [True] * len(scores)),
    )


def shares(
    scores: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    groups: Sequence[int] | None = None,
    valid: Sequence[bool] | None = None,
    malformed: Sequence[bool] | None = None,
    **section: Any,
) -> Shares:
    bad = None if malformed is None else torch.tensor(malformed)
    return turn_advantages(*known(scores, outcomes, groups, valid), IGPOSection(**section), bad)


def population_grpo(outcomes: Tensor, groups: Tensor) -> Tensor:
    """GRPO on outcomes with IGPO's standard deviation."""
    stats = group_statistics(outcomes, groups, ddof=0)
    return (outcomes - stats.mean) / ((stats.std**2 + 1e-8).sqrt() + 1e-6)


# Golden vectors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, [2.336302, 1.267259, 0.999998, -2.336302, -0.999998]),
        ({"gamma": 0.9}, [2.119576, 1.167259, 0.999998, -2.236302, -0.999998]),
        ({"gamma": 0.0}, [1.069043, 0.267261, 0.999998, -1.336304, -0.999998]),
        ({"norm": "joint", "gamma": 0.0}, [1.02899, 0.171498, 1.02899, -1.543485, -0.685993]),
    ],
)
def test_golden_advantages(section: dict[str, Any], expected: list[float]) -> None:
    found = shares(GOLDEN, [1.0, 0.0], **section)
    assert found.advantages.tolist() == pytest.approx(expected, abs=2e-6)


def test_golden_z_scores() -> None:
    found = shares(GOLDEN, [1.0, 0.0])
    assert found.z_gain[found.counted].tolist() == pytest.approx([1.069043, 0.267261, -1.336304], abs=1e-6)
    assert found.z_outcome.tolist() == pytest.approx([0.999998, -0.999998], abs=1e-6)


def test_golden_gains() -> None:
    score, outcome, trajectory, *_ = known(GOLDEN, [1.0, 0.0])
    gains = info_gains(score, trajectory)
    assert gains.tolist() == [1.0, 0.5, 0.0, -0.5, 0.0]
    assert turn_rewards(gains, outcome, trajectory).tolist() == [1.0, 0.5, 1.0, -0.5, 0.0]
    probabilities = info_gains(score, trajectory, "prob")
    assert probabilities.tolist() == pytest.approx([0.232544, 0.238651, 0, -0.053250, 0], abs=1e-6)


def test_i17_golden_f1_is_over_sets_of_words() -> None:
    assert answers.f1("22 november 1610", ["november 1610"]) == pytest.approx(0.8)
    assert answers.f1("Paris, PARIS paris", ["Paris"]) == 1.0
    assert answers.f1("the Seine", ["Seine"]) == pytest.approx(2 / 3)
    assert answers.f1("x", ["november 1610", "X"]) == 1.0


# Invariants of the numbers ----------------------------------------------------------------------

SCORES = st.lists(
    st.lists(st.floats(-20, 0, allow_subnormal=False), min_size=1, max_size=6), min_size=1, max_size=6
)


@given(SCORES)
def test_i1_gains_sum_to_the_last_score_less_the_first(scores: list[list[float]]) -> None:
    flat, _, trajectory, *_ = known(scores, [0.0] * len(scores))
    total = torch.zeros(len(scores), dtype=torch.float64).index_add(
        0, trajectory, info_gains(flat, trajectory)
    )
    assert total.tolist() == pytest.approx([own[-1] - own[0] for own in scores], abs=1e-9)


@given(SCORES, st.integers(0, 2**16))
def test_i3_weight_zero_is_grpo_on_outcomes(scores: list[list[float]], seed: int) -> None:
    outcomes = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)).double()
    groups = torch.arange(len(scores)) % 2
    found = shares(scores, outcomes.tolist(), groups.tolist(), weight=0.0)
    assert torch.equal(found.advantages, population_grpo(outcomes, groups)[owners(scores)])


def test_i3_differs_from_grpo_by_the_standard_deviation_alone() -> None:
    outcomes, groups = f64([1.0, 0.0, 0.0, 0.4]), torch.zeros(4, dtype=torch.long)
    found = shares([[-1.0]] * 4, outcomes.tolist(), weight=0.0).advantages
    assert (found / grpo(outcomes, groups)).tolist() == pytest.approx([(4 / 3) ** 0.5] * 4, rel=1e-4)


def test_i4_single_turns_are_grpo() -> None:
    outcomes = [1.0, 0.0, 0.25, 0.25, 1.0]
    groups = [0, 0, 0, 1, 1]
    for norm in ("separate", "joint"):
        found = shares([[-1.0], [-7.0], [NAN], [0.0], [-3.0]], outcomes, groups, norm=norm, gamma=0.9)
        assert torch.equal(found.advantages, population_grpo(f64(outcomes), torch.tensor(groups)))


@pytest.mark.parametrize("norm", ["separate", "joint"])
def test_i5_a_constant_changes_nothing(norm: str) -> None:
    before = shares(GOLDEN, [1.0, 0.0], norm=norm)
    after = shares([[s - 4.0 for s in own] for own in GOLDEN], [1.0, 0.0], norm=norm)
    torch.testing.assert_close(after.advantages, before.advantages, atol=1e-12, rtol=0)


@pytest.mark.parametrize("factor", [0.1, 3.0, 100.0])
def test_i5_a_common_factor_cancels_in_a_pool_of_gains(factor: float) -> None:
    before = shares(GOLDEN, [1.0, 0.0])
    after = shares([[factor * s for s in own] for own in GOLDEN], [1.0, 0.0])
    torch.testing.assert_close(after.z_gain, before.z_gain, atol=1e-4, rtol=0)
    weighted = shares(GOLDEN, [1.0, 0.0], weight=factor, gamma=0.0).advantages
    counted = before.counted
    torch.testing.assert_close(weighted[counted], factor * before.z_gain[counted], atol=1e-12, rtol=0)


def test_i10_a_turn_and_the_next_differ_by_its_z() -> None:
    for gamma in (1.0, 0.9):
        found = shares(GOLDEN, [1.0, 0.0], gamma=gamma)
        a = found.advantages
        for u in (0, 1, 3):
            assert float(a[u] - gamma * a[u + 1]) == pytest.approx(float(found.z_gain[u]), abs=1e-12)


def test_i11_a_z_of_zero_does_not_merge_turns() -> None:
    z, trajectory = f64([1.0, 0.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 1])
    assert accumulate(z, trajectory, 0.9).tolist() == pytest.approx([1.81, 0.9, 1.0, 5.0])
    assert accumulate(z, trajectory, 1.0).tolist() == [2.0, 1.0, 1.0, 5.0]
    # The middle gain is the pool's mean: its z is exactly 0 and its turn keeps its discount.
    found = shares([[-3.0, -1.0, 0.0, 0.0], [0.0]], [1.0, 0.0], gamma=0.9)
    assert found.z_gain[1] == 0
    assert float(found.advantages[1]) == pytest.approx(
        0.9 * float(found.z_gain[2]) + 0.81 * float(found.z_outcome[0])
    )


def test_i12_equal_outcomes_still_teach() -> None:
    found = shares(GOLDEN, [0.0, 0.0])
    assert (found.advantages[found.counted] != 0).all()
    assert found.advantages[found.last].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm", ["separate", "joint"])
@pytest.mark.parametrize("value", [0.1, -0.3, 1e-9])
def test_i12_equal_everything_is_exactly_zero(value: float, norm: str) -> None:
    # In one pool gains and outcomes have to be equal too.
    outcome = value if norm == "joint" else 0.7
    scores = [[0.0, value], [0.0, value], [0.0]] if norm == "separate" else [[0.0, value]] * 3
    found = shares(scores, [outcome] * 3, norm=norm)
    assert not found.advantages.any() and found.advantages.isfinite().all()


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_i13_a_pool_of_one_is_zero(floor: float) -> None:
    found = shares([[-3.0, -1.0]], [1.0], std_floor=floor)
    assert found.advantages.tolist() == [0.0, 0.0]
    assert shares([[-3.0, -1.0], [-3.0]], [1.0, 0.0]).z_gain.tolist() == [0.0, 0.0, 0.0]


def test_i14_gamma_zero_leaves_each_turn_its_own() -> None:
    found = shares(GOLDEN, [1.0, 0.0], gamma=0.0)
    assert torch.equal(found.advantages[found.counted], found.z_gain[found.counted])
    assert torch.equal(found.advantages[found.last], found.z_outcome)


def test_i15_gains_of_malformed_rollouts_are_kept_or_dropped() -> None:
    scores, outcomes = [[-2.0, -1.0, -0.5], [-2.0, -2.5], [-2.0, -9.0, -1.0]], [1.0, 0.0, -2.0]
    bad = [False, False, True]
    kept = shares(scores, outcomes, malformed=bad)
    assert torch.equal(kept.advantages, shares(scores, outcomes).advantages)
    section = IGPOSection(malformed="drop")
    found = turn_advantages(*known(scores, outcomes), section, torch.tensor(bad))
    # The pool of gains is that of the two others, the outcome stays, and its turns share it.
    assert torch.equal(found.z_gain[:5], shares(GOLDEN, [1.0, 0.0]).z_gain)
    assert found.advantages[5:].tolist() == [float(found.z_outcome[2])] * 3
    assert float(found.z_outcome[2]) < -1


def test_i15_what_counts_as_malformed(make_trajectory: Callable[..., Trajectory]) -> None:
    answered = make_trajectory("a")
    assert not is_malformed(answered)
    assert is_malformed(make_trajectory("a", outcome=Outcome.truncated("turns")))
    unread = make_trajectory("a")
    unread.turns[-1] = dataclasses.replace(unread.turns[-1], valid_action=False)
    assert is_malformed(unread)


@given(st.permutations(range(4)))
def test_i16_statistics_do_not_depend_on_order(order: list[int]) -> None:
    scores = [[-2.0, -1.0, -0.5], [-2.0, -2.5], [-1.0, -3.0, -2.0], [-1.0]]
    outcomes, groups = [1.0, 0.0, 0.5, 0.2], [0, 0, 1, 1]
    for norm in ("separate", "joint"):
        before = shares(scores, outcomes, groups, norm=norm, gamma=0.9)
        after = shares(
            [scores[i] for i in order], [outcomes[i] for i in order], [groups[i] for i in order],
            norm=norm, gamma=0.9,
        )  # fmt: skip
        own = before.advantages.split([3, 2, 3, 1])
        torch.testing.assert_close(after.advantages, torch.cat([own[i] for i in order]), atol=1e-12, rtol=0)


def test_i16_invalid_members_are_in_no_pool() -> None:
    alone = shares(GOLDEN, [1.0, 0.0])
    found = shares([*GOLDEN, [NAN, 3.0]], [1.0, 0.0, NAN], valid=[True, True, False])
    assert torch.equal(found.advantages[:5], alone.advantages)
    assert found.advantages[5:].tolist() == [0.0, 0.0]
    lost = shares(GOLDEN, [NAN, NAN], valid=[False, False])
    assert not lost.advantages.any()


def test_clip_and_floor_curb_a_pool_of_little_spread() -> None:
    scores = [[0.0, 1e-2], *[[0.0, 0.0]] * 99]
    outcomes = [0.0] * 100
    assert float(shares(scores, outcomes).z_gain.max()) > 7
    assert float(shares(scores, outcomes, clip=5.0).z_gain.abs().max()) == 5.0
    assert float(shares(scores, outcomes, std_floor=0.1).z_gain.abs().max()) < 0.11
    # Outcomes have neither.
    wins = shares(scores, [1.0, *[0.0] * 99], clip=5.0, std_floor=10.0).z_outcome
    assert float(wins.max()) > 9


def test_nan_scores_move_no_turn() -> None:
    """A missing score takes the two gains beside it; all other turns keep their places."""
    scores = [[-2.0, NAN, -0.5, -0.25], [-2.0, -2.5], [-2.0, -1.5]]
    found = shares(scores, [1.0, 0.0, 0.5], gamma=0.9)
    assert found.counted.tolist() == [False, False, True, False, True, False, True, False]
    z, outcome = found.z_gain, float(found.z_outcome[0])
    expected = [
        0.9**2 * z[2] + 0.9**3 * outcome,
        0.9 * z[2] + 0.9**2 * outcome,
        z[2] + 0.9 * outcome,
        outcome,
    ]
    assert found.advantages[:4].tolist() == pytest.approx([float(e) for e in expected])
    metrics = igpo_metrics(found, *known(scores, [1.0, 0.0, 0.5]))
    assert metrics["igpo/nan_scores"] == 1 and metrics["igpo/mismatch_fallbacks"] == 1
    infinite = shares([[-2.0, -float("inf"), -0.5, -0.25], *scores[1:]], [1.0, 0.0, 0.5], gamma=0.9)
    assert torch.equal(infinite.advantages, found.advantages)


def test_a_score_a_turn_is_needed() -> None:
    with pytest.raises(UsageError, match=r"4 scores for 5 turns.*\n.*hint"):
        info_gains(torch.zeros(4), owners(GOLDEN))
    with pytest.raises(UsageError, match="by trajectory"):
        info_gains(torch.zeros(3), torch.tensor([1, 0, 0]))
    assert last_turns(torch.tensor([], dtype=torch.long)).shape == (0,)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValidationError):
        IGPOSection(info_gain="none")  # type: ignore[arg-type]


# Metrics ----------------------------------------------------------------------------------------


def test_metrics() -> None:
    everything = known(
        [*GOLDEN, [-1.0], [0.0, NAN]], [1.0, 0.0, 0.3, NAN], [0, 0, 1, 1], [True, True, True, False]
    )
    seen = igpo_metrics(turn_advantages(*everything, IGPOSection()), *everything)
    assert seen == pytest.approx(
        {
            "igpo/nan_scores": 0.0,
            "igpo/mismatch_fallbacks": 0.0,
            "igpo/s0_mean": -5 / 3,
            "igpo/s_last_mean": -4 / 3,
            "igpo/ig_mean": 1 / 3,
            "igpo/ig_std": 0.6236096,
            "igpo/pool_size": 3.0,
            "igpo/ig_frac_positive": 2 / 3,
            "igpo/ig_by_turn_1": 0.25,
            "igpo/ig_by_turn_2": 0.5,
            "igpo/z_ig_abs_mean": (1.069043 + 0.267261 + 1.336304) / 3,
            "igpo/z_out_abs_mean": 2 * 0.999998 / 3,
            "igpo/length_bias": (1 / 3) / 0.6236096,
            "igpo/ig_outcome_corr": 1.0,
            "igpo/groups_equal_outcome_frac": 0.5,
        },
        abs=1e-5,
    )
    nothing = known([[NAN]], [NAN], valid=[False])
    assert igpo_metrics(turn_advantages(*nothing, IGPOSection()), *nothing) == {
        "igpo/nan_scores": 0.0,
        "igpo/mismatch_fallbacks": 0.0,
    }


def test_answering_metrics(make_trajectory: Callable[..., Trajectory]) -> None:
    two = make_trajectory("a", lengths=((3, 2), (3, 2)))
    two.turns[0] = dataclasses.replace(
        two.turns[0], action='[{"name": "search", "arguments": {}}, {"name": "open"}]'
    )
    cut = make_trajectory("b", outcome=Outcome.truncated("turns"))
    cut.turns[0] = dataclasses.replace(cut.turns[0], valid_action=False)
    lost = make_trajectory("c", outcome=Outcome.infra_failed("tool"))
    assert answering_metrics([two, cut, lost]) == {
        "env/turns_mean": 1.5,
        "env/answered_frac": 0.5,
        "env/format_error_frac": pytest.approx(1 / 3),
        "env/tool_calls_mean": 1.0,
        "env/truncated_frac": 0.5,
    }
    assert answering_metrics([lost]) == {}


# Gradients --------------------------------------------------------------------------------------

ANSWER = WrappedAnswer("x", (30, 31, 40, 41), (2, 3))


def collected(make_trajectory: Callable[..., Trajectory]) -> Collection:
    lengths = [((9, 3), (5, 2), (7, 4)), ((9, 2), (4, 5)), ((9, 4),)]
    return Collection.of(
        [
            make_trajectory(str(i), 0, r, own)
            for i, (r, own) in enumerate(zip((1.0, 0.0, 0.5), lengths, strict=True))
        ]
    )


def gradient(learner: Any, collection: Collection, tokens: Tensor) -> tuple[float, list[Tensor]]:
    share, _ = make_loss(
        collection.rows,
        tokens,
        loss=PolicyLossConfig(aggregation="seq-mean-token-mean"),
        correction=CorrectionConfig(),
    )
    totals = learner.backward(collection.rows, share)
    return totals["loss/total"], [p.grad.clone() for p in learner.trainable.values()]


def advantages_of(collection: Collection, scores: Tensor, **section: Any) -> Tensor:
    units = collection.units
    found = turn_advantages(
        scores,
        collection.rewards,
        units.trajectory,
        collection.groups,
        collection.valid,
        IGPOSection(**section),
    )
    return broadcast(found.advantages.float(), units.index)


def scored(model: Any, collection: Collection) -> Tensor:
    return score_answers(model, [Query(c, ANSWER) for t in collection.trajectories for c in turn_contexts(t)])


def test_i2_the_scorer_has_no_part_in_the_gradient(
    make_learner: Callable[..., Any], make_trajectory: Callable[..., Trajectory]
) -> None:
    collection, learner = collected(make_trajectory), make_learner()
    scorer = copy.deepcopy(learner.model)
    tokens = advantages_of(collection, scored(scorer, collection))
    assert not tokens.requires_grad
    _, before = gradient(learner, collection, tokens)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(1.0)
    _, after = gradient(learner, collection, tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_i3_weight_zero_has_grpos_loss_and_gradient(
    make_learner: Callable[..., Any], make_trajectory: Callable[..., Trajectory]
) -> None:
    collection, learner = collected(make_trajectory), make_learner()
    own = population_grpo(collection.rewards.double(), collection.groups)
    base = broadcast(own[collection.units.trajectory].float(), collection.units.index)
    tokens = advantages_of(collection, scored(learner.model, collection), weight=0.0)
    assert torch.equal(tokens, base)
    loss, grads = gradient(learner, collection, tokens)
    expected, others = gradient(learner, collection, base)
    assert loss == expected
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    with_gains = advantages_of(collection, scored(learner.model, collection))
    assert not torch.equal(with_gains, base)


def test_i9_i10_tokens_of_a_turn_share_one_advantage_and_results_have_none(
    make_learner: Callable[..., Any], make_trajectory: Callable[..., Trajectory]
) -> None:
    collection, learner = collected(make_trajectory), make_learner()
    whole = collection.whole
    assert whole is not None
    tokens = advantages_of(collection, scored(learner.model, collection))
    assert not tokens[~whole.loss_mask].any()
    for unit in range(len(collection.units.trajectory)):
        assert len(tokens[collection.units.index == unit].unique()) == 1
    loss, grads = gradient(learner, collection, tokens)
    garbage = tokens.masked_fill(~whole.loss_mask, NAN)
    again, others = gradient(learner, collection, garbage)
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


# The method -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    pytest.importorskip("bm25s")
    questions = [
        {"id": f"q{i}", "question": f"Where is {name}?", "answers": [place, f"the {place}"], "split": "train"}
        for i, (name, place) in enumerate([("the apple", "table"), ("the door", "north wall")])
    ]
    corpus = [{"title": "Kitchen", "text": "The apple is on the table. The door is in the north wall."}]
    for name, lines in (("questions", questions), ("corpus", corpus)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("questions", "corpus")}


@pytest.fixture
def search_config(tiny_model: Path, files: dict[str, str], tmp_path: Path) -> Callable[..., Config]:
    """A run on SearchQA; the tiny model gets a context that its prompts fit into."""
    longer = tmp_path / "longer"
    shutil.copytree(tiny_model, longer)
    for name, key in (("config", "max_position_embeddings"), ("tokenizer_config", "model_max_length")):
        path = longer / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: 4096}))

    def make(env: dict[str, Any] | None = None, **igpo: Any) -> Config:
        return Config.model_validate(
            {
                "env": env
                or {
                    "id": "agentgym/SearchQA-v0",
                    "kwargs": {"data": "files", "max_steps": 3, **files},
                    "max_observation_chars": 80,
                },
                "model": {"name": str(longer), "autocast": "none"},
                "rollout": {"max_tokens": 4, "deterministic": True},
                "trackers": [],
                "groups": 2,
                "group_size": 3,
                "igpo": igpo,
            }
        )

    return make


def with_step(config: Config, folder: Path, use: Callable[[Any, Collection], Any]) -> Any:
    """What ``use(run, collection)`` returns, in an open run and with what its policy did."""
    from agentgym.trainers.collect import TaskOrder, collect, plan
    from agentgym.trainers.run import Run

    with Run(config, folder) as run:

        async def body() -> Any:
            engine = run.engine()
            try:
                episodes = plan(TaskOrder(run.tasks(), 0), 0, 0, config.groups, config.group_size)
                return await collect(engine, episodes, {}, max_failure_rate=0.0)
            finally:
                await engine.aclose()

        return use(run, Collection.of(asyncio.run(body())))


def test_the_method_scores_searchqa(search_config: Callable[..., Config], tmp_path: Path) -> None:
    def use(run: Any, collection: Collection) -> None:
        assert {len(t.turns) for t in collection.trajectories} == {3}
        found = {}
        for form in ("masked", "batched", "sequential"):
            method = IGPO(search_config(scorer=form), run)
            found[form] = method.scores(collection.trajectories)
        torch.testing.assert_close(found["masked"], found["sequential"], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["batched"], found["sequential"], atol=1e-5, rtol=0)
        first = found["masked"].view(2, 3, 3)[:, :, 0]
        assert (first == first[:, :1]).all(), "members of a group read the same prompt"

        whole = collection.whole
        assert whole is not None
        step = Step(0, collection, whole, collection.rewards, list(collection.rows))
        method = IGPO(search_config(), run)
        tokens = method.advantages(step, torch.zeros(whole.loss_mask.shape))
        expected = turn_advantages(
            found["masked"], collection.rewards, collection.units.trajectory, collection.groups,
            collection.valid, IGPOSection(),
        )  # fmt: skip
        assert torch.equal(tokens, broadcast(expected.advantages.float(), collection.units.index))
        assert tokens[whole.loss_mask].any()
        assert step.metrics["igpo/nan_scores"] == step.metrics["igpo/mismatch_fallbacks"] == 0
        assert step.metrics["igpo/pool_size"] == 6 and step.metrics["time/igpo_score"] > 0
        assert step.metrics["env/answered_frac"] == 0 and step.metrics["env/truncated_frac"] == 1

        # The best alias is chosen on the prompt, once for all turns and members of the group.
        task = collection.trajectories[0]
        one, other = method.answers(task)
        by_alias = [
            score_answers(run.learner.model, [Query(c, a) for c in turn_contexts(task)]) for a in (one, other)
        ]
        best = max(by_alias, key=lambda scores: float(scores[0]))
        torch.testing.assert_close(found["masked"][:3], best, atol=1e-5, rtol=0)
        pinned = IGPO(search_config(alias="first"), run).scores(collection.trajectories)
        torch.testing.assert_close(pinned[:3], by_alias[0], atol=1e-5, rtol=0)

        # A failed member has no score, and the others keep theirs.
        collection.trajectories[1].outcome = Outcome.infra_failed("tool")
        partly = method.scores(collection.trajectories)
        assert partly[3:6].isnan().all()
        torch.testing.assert_close(partly[6:], found["masked"][6:], atol=1e-5, rtol=0)

    with_step(search_config(), tmp_path / "run", use)


def test_a_step_on_searchqa(search_config: Callable[..., Config], tmp_path: Path) -> None:
    """Outcomes are all equal, so whatever is learnt is learnt from the gains."""
    from agentgym.policies import models
    from agentgym.trainers import launch
    from agentgym.trainers.run import Silent

    class Watch(Silent):
        def step(self, step: int, metrics: Mapping[str, float]) -> None:
            seen.append(dict(metrics))

    seen: list[dict[str, float]] = []
    config = search_config().model_copy(update={"steps": 1})
    trained = launch.launch(POLICY_GRADIENT, config, tmp_path / "run", progress=Watch())
    assert len(seen) == 1
    assert seen[0]["groups_all_equal_frac"] == seen[0]["igpo/groups_equal_outcome_frac"] == 1
    assert seen[0]["igpo/ig_std"] > 0 and seen[0]["grad_norm"] > 0
    assert {"igpo/ig_mean", "igpo/ig_by_turn_1", "igpo/ig_by_turn_2", "igpo/s0_mean"} <= seen[0].keys()
    before, after = (models.load(p, dtype=torch.float32)[0] for p in (config.model.name, trained))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_x16_a_resumed_run_equals_the_uninterrupted_one(
    search_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Weights, optimiser, metrics and journal; cut behind a checkpoint, in the midst of play."""
    from agentgym.trainers import launch

    settings = {
        "algorithm": "policy-gradient",
        "steps": 3,
        "checkpoint_every": 1,
        "optimiser": {"lr": 1e-3},
        "evaluation": {"every": 2, "episodes": 1, "split": "train"},
    }
    config = Config.model_validate({**search_config(gamma=0.9).model_dump(), **settings})
    config = config.model_copy(update={"loss": dataclasses.replace(config.loss, kl_coef=0.01)})
    launch.launch(POLICY_GRADIENT, config, tmp_path / "whole")
    whole = state(tmp_path / "whole")
    assert len(whole[2]) == 3 and len(whole[3]) == 3 * 6 + 1
    for metrics in whole[2]:
        assert metrics["igpo/ig_std"] > 0 and metrics["grad_norm"] > 0
    assert whole[2][2]["kl_ref"] > 0, "the reference stays where the run began"
    with pytest.raises(Interrupted):
        launch.launch(POLICY_GRADIENT, config, tmp_path / "cut", progress=Stop(turn=23))
    resume(tmp_path / "cut")
    assert state(tmp_path / "cut") == whole


def test_tasks_without_answers_are_refused(search_config: Callable[..., Config], tmp_path: Path) -> None:
    config = search_config({"id": "agentgym.testing:EchoEnv", "kwargs": {"words": 2}})

    def use(run: Any, collection: Collection) -> None:
        with pytest.raises(ConfigError, match=r"igpo needs gold answers.*EchoEnv.*\n.*SearchQA"):
            IGPO(config, run).scores(collection.trajectories)

    with_step(config, tmp_path / "run", use)


def test_other_estimators_are_refused(search_config: Callable[..., Config]) -> None:
    config = search_config()
    IGPO.check(config)
    with pytest.raises(ConfigError, match=r"estimator 'rloo' was chosen"):
        IGPO.check(config.model_copy(update={"estimator": "rloo"}))
    with pytest.raises(ConfigError, match=r"igpo learns from these too"):
        IGPO.check(config.model_copy(update={"filter_groups": True}))
    with pytest.raises(ConfigError, match=r"filters.groups drop equal groups"):
        IGPO.check(config.model_copy(update={"filters": FilterSection()}))
    with pytest.raises(ConfigError, match=r"layout='turn' forgets it"):
        turnwise = config.rollout.model_copy(update={"layout": "turn"})
        IGPO.check(config.model_copy(update={"rollout": turnwise}))
