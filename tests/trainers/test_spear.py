"""SPEAR: both buffers, the double gate, replay, the bonus, and what must not change."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from agentgym.errors import ConfigError
from agentgym.messages import ToolCall
from agentgym.outcome import Outcome
from agentgym.trainers import launch
from agentgym.trainers.batch import Row, collate
from agentgym.trainers.collect import Collection
from agentgym.trainers.metrics import load as load_metrics
from agentgym.trainers.policy_gradient import learn, switched_on
from agentgym.trainers.policy_loss import PolicyLossConfig
from agentgym.trainers.self_imitation import (
    BaselineFIFO,
    Earned,
    Sample,
    SampleBuffer,
    better,
    earnings,
    replay_tensors,
)
from agentgym.trainers.spear import Spear, SpearSection, tool_turns
from agentgym.trainers.update import make_loss
from agentgym.trajectory import Segment, Trajectory

from .test_resume import RUN, Interrupted, Stop, resume, state

Make = Callable[..., Any]
LAYOUTS = [((3, 2),), ((20, 6), (9, 3)), ((5, 0),), ((8, 1), (4, 4), (4, 1)), ((30, 12),), ((2, 3),)]
PLAIN = ("loss.kl_coef=0", "optimiser.lr=1e-3", "optimiser.weight_decay=0.1")
# Anything above the median is replayed at the next step, at full weight.
EAGER = ("spear.warmup=0", "spear.buffer_size=8", "spear.trigger=0")


@pytest.fixture
def batches(make_trajectory: Make) -> list[list[Trajectory]]:
    """Four steps of two groups; rewards differ, the groups' means are 0.5 and 0.2; one has no token."""
    rewards = [1.0, 0.0, 0.5, 0.0, 0.6, 0.0]
    return [
        [
            make_trajectory(f"s{step}t{i}", group=2 * step + i // 3, reward=rewards[i], lengths=LAYOUTS[i])
            for i in range(6)
        ]
        for step in range(4)
    ]


def session(
    with_run: Make,
    folder: Path,
    batches: Sequence[Sequence[Trajectory]],
    *overrides: str,
    numbers: Sequence[int] | None = None,
    double: bool = False,
    each: Callable[[Any, Any], None] = lambda spear, metrics: None,
) -> Any:
    """Metrics of every step on ``batches``, and the learner's weights and moments at the end."""

    def use(config: Any, run: Any) -> Any:
        if double:
            run.learner.model.double()
        for trajectory in itertools.chain.from_iterable(batches):
            run.journal.begin(trajectory)
            run.journal.end(trajectory)
        methods = switched_on(config, run)
        told = []
        for place, batch in enumerate(batches):
            number = place if numbers is None else numbers[place]
            told.append(learn(config, run, methods, Collection.of(batch), None, number))
            for method in methods:
                each(method, told[-1])
        weights, moments, _ = run.learner.state()
        return told, {n: w.clone() for n, w in weights.items()}, {n: m.clone() for n, m in moments.items()}

    return with_run(folder, "grpo", use, *PLAIN, *overrides)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def sample(id: str = "a", step: int = 0, outcome: float = 1.0, bonus: float = 0.0, **fields: Any) -> Sample:
    values: dict[str, Any] = {
        "token_ids": (5, 6, 7, 8),
        "positions": (2, 3),
        "logp": (-0.5, -1.5),
        "logp_rollout": (-0.5, -1.5),
        "advantages": (1.0, 1.0),
        "turns": ((0, 2, 4),),
        "success": True,
    }
    return Sample(id=id, step=step, outcome=outcome, bonus=bonus, **{**values, **fields})


def test_golden_p50_and_recalibrated_advantages() -> None:
    fifo = BaselineFIFO(10)
    fifo.push([Earned(value, 0.0, 0.0) for value in (0, 10, 2.5, 5, 7.5)])
    assert fifo.median() == 5
    buffer = SampleBuffer(8)
    buffer.insert(sample(str(r), outcome=r) for r in (10, 5, 2.5))
    selection = buffer.take(5, 0.0, 0)
    assert [(s.outcome, a) for s, a in zip(selection.samples, selection.advantages, strict=True)] == [(10, 5)]
    assert (selection.eligible, selection.dropped) == (1, 2)
    fifo = BaselineFIFO(10)
    fifo.push([Earned(value, 0.0, value) for value in (0, 10, 2.5, 5)])
    assert fifo.median() == fifo.median_std() == 3.75


def test_golden_alfworld_rewards(with_run: Make, make_trajectory: Make, tmp_path: Path) -> None:
    won = make_trajectory("w", reward=10.0, lengths=((2, 1),) * 12)
    lost = make_trajectory("l", reward=0.0, lengths=((2, 1),) * 4)
    gone = make_trajectory("g", reward=0.0, outcome=Outcome.infra_failed("environment"))
    collection = Collection.of([won, lost, gone])

    def use(config: Any, run: Any) -> Any:
        spear = Spear(config, run)
        return spear.shape(50, collection, collection.rewards), spear.shape(
            200, collection, collection.rewards
        )

    at_50, at_200 = with_run(tmp_path / "r", "grpo", use, "spear.intrinsic=turns")
    assert at_50[:2].tolist() == pytest.approx([10.853553, 0.341421], abs=1e-6) and at_50[2] == 0
    assert at_200 is collection.rewards


@pytest.mark.parametrize("case", ["c_sil", "gamma", "below trigger"])
def test_s1_without_replay_the_weights_and_moments_are_the_base_s_bit_for_bit(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path, case: str
) -> None:
    settings, numbers = {
        "c_sil": ((*EAGER, "spear.c_sil=0"), (0, 1, 2, 3)),
        "gamma": (("spear.warmup=200", *EAGER[1:]), (0, 0, 0, 0)),
        "below trigger": (("spear.warmup=0",), (0, 1, 2, 3)),
    }[case]
    told, weights, moments = session(with_run, tmp_path / "a", batches, *settings, numbers=numbers)
    _, base, base_moments = session(with_run, tmp_path / "b", batches, numbers=numbers)
    assert equal(weights, base) and equal(moments, base_moments)
    assert any(m["sil/triggered"] for m in told) == (case != "below trigger")
    assert all(m["sil/updates"] == 0 for m in told)
    told, weights, _ = session(with_run, tmp_path / "c", batches, *EAGER, numbers=(1, 2, 3, 4))
    assert not equal(weights, base) and sum(m["sil/updates"] for m in told) == 3


def test_s1_before_the_first_replay_nothing_has_changed(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    _, weights, moments = session(with_run, tmp_path / "a", batches[:1], *EAGER)
    _, base, base_moments = session(with_run, tmp_path / "b", batches[:1])
    assert equal(weights, base) and equal(moments, base_moments)


def test_s2_an_empty_or_small_buffer_makes_no_step(
    with_run: Make, batches: list[list[Trajectory]], make_trajectory: Make, tmp_path: Path
) -> None:
    flat = [[make_trajectory(f"f{s}{i}", reward=1.0) for i in range(3)] for s in range(3)]
    told, _, _ = session(with_run, tmp_path / "a", flat, *EAGER)
    assert [m["sil/buffer_rows"] for m in told] == [0, 0, 0]
    assert all(m["sil/triggered"] == m["sil/updates"] == m["updates_per_step"] == 0 for m in told)
    told, _, _ = session(with_run, tmp_path / "b", batches, "spear.warmup=0", "spear.buffer_size=3")
    rows = [m["sil/buffer_rows_above_p50"] for m in told]
    assert [m["sil/triggered"] for m in told] == [float(r > 4.5) for r in rows] and max(rows) > 4.5
    assert SampleBuffer(4).take(0.0, 0.0, 0).samples == []


def test_s3_a_reward_at_the_median_is_not_replayed() -> None:
    buffer = SampleBuffer(8)
    buffer.insert([sample("at", outcome=0.25, bonus=0.3), sample("over", outcome=0.26, bonus=0.3)])
    fifo = BaselineFIFO(4)
    rewards = torch.full((3,), 0.25)
    fifo.push(
        earnings(rewards, rewards.double(), torch.full((3,), 0.3).double(), torch.zeros(3), rewards > 0)
    )
    buffer.samples[0] = replace(buffer.samples[0], bonus=fifo.steps[0][0].bonus)
    mu = 0.37
    p50 = fifo.median(mu)
    assert p50 is not None and buffer.samples[0].reward(mu) == p50
    assert [s.id for s in buffer.take(p50, mu, 0).samples] == ["over"]


def test_s4_stored_and_replayed_advantages_are_above_zero(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    seen = []

    def look(spear: Spear, metrics: Any) -> None:
        seen.extend(spear.buffer.samples)
        if metrics["sil/updates"]:
            assert metrics["sil/adv_mean"] > 0

    session(with_run, tmp_path / "a", batches, *EAGER, each=look)
    assert seen and all(min(s.advantages) > 0 and s.logp and max(s.logp) < 0 for s in seen)
    assert all(s.outcome >= 0.5 for s in seen)


def test_s4_in_a_row_of_mixed_signs_the_good_tokens_alone_are_imitated() -> None:
    segment = Segment()
    segment.append_context([9, 9])
    spans = [segment.append_sampled([3, 4], [-1.0, -2.0])]
    segment.append_context([9])
    spans.append(segment.append_sampled([5], [-3.0]))
    row = Row(segment, 0, 0, tuple((i, *span) for i, span in enumerate(spans)))
    # NaN stands where nothing was sampled; the mean over the padded width would be negative.
    gains = torch.tensor([math.nan, 0.5, 0.5, math.nan, -4.0, -9.0, -9.0])
    assert better(row, gains) == [2, 3]
    logp = torch.tensor([0.0, -1.1, -2.1, 0.0, -3.1, 0.0, 0.0])
    stored = Sample.of(row, gains, logp, trajectory_id="t", step=3, outcome=1.0, bonus=0.0, success=True)
    assert stored.advantages == (0.5, 0.5) and stored.logp_rollout == (-1.0, -2.0)
    batch = collate([stored.row(0)])
    assert batch.loss_mask.tolist() == [[False, True, True, False, False]]
    tokens, old = replay_tensors([stored], [0.7])
    assert tokens[0].tolist() == pytest.approx([0, 0.7, 0.7, 0, 0])
    assert old[0].tolist() == pytest.approx([0, -1.1, -2.1, 0, 0])
    assert better(row, -gains.abs()) == []


def test_s5_rows_too_old_are_dropped_before_the_new_come(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    ages: list[int] = []

    def look(spear: Spear, metrics: Any) -> None:
        steps = [s.step for s in spear.buffer.samples]
        ages.append(max(steps) - min(steps))

    settings = ("spear.buffer_size=1000", "spear.tolerate_steps=1")
    session(with_run, tmp_path / "a", batches, *settings, each=look)
    assert ages == [0, 1, 2, 2]
    buffer = SampleBuffer(4)
    buffer.insert(sample(str(step), step=step) for step in (2, 7, 8))
    buffer.evict(5)
    assert [s.step for s in buffer.samples] == [7, 8]
    SampleBuffer(4).evict(5)


def test_s6_a_replay_empties_the_buffer_and_takes_a_row_once(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    take = SampleBuffer.take

    def noted(self: SampleBuffer, *arguments: Any, **options: Any) -> Any:
        selection = take(self, *arguments, **options)
        assert len(self) == 0
        taken.extend(s.id for s in selection.samples)
        return selection

    monkeypatch.setattr(SampleBuffer, "take", noted)
    left = []
    session(
        with_run, tmp_path / "a", batches, *EAGER,
        each=lambda spear, metrics: left.append({s.step for s in spear.buffer.samples}),
    )  # fmt: skip
    assert taken and len(set(taken)) == len(taken)
    assert left == [{0}, {1}, {2}, {3}]


@given(
    st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=5), max_size=8),
    st.integers(1, 9),
    st.randoms(),
)
@examples(max_examples=50, deadline=None)
def test_s7_whole_steps_leave_and_the_median_has_no_order(
    steps: list[list[float]], capacity: int, random: Any
) -> None:
    fifo = BaselineFIFO(capacity)
    for step in steps:
        before = list(fifo.steps)
        fifo.push([Earned(value, 0.0, 0.0) for value in step])
        assert len(fifo) <= capacity + len(step)
        kept = list(fifo.steps)[:-1]
        assert kept == before[len(before) - len(kept) :]
        gone = before[: len(before) - len(kept)]
        assert not gone or sum(map(len, before)) > capacity
    values = [group for step in fifo.steps for group in step]
    shuffled = BaselineFIFO(100)
    shuffled.push(random.sample(values, len(values)))
    assert shuffled.median() == fifo.median()
    assert (fifo.median() is None) == (not values)


def test_s9_what_is_stored_is_a_copy(with_run: Make, batches: list[list[Trajectory]], tmp_path: Path) -> None:
    kept: list[tuple[Any, Any]] = []

    def look(spear: Spear, metrics: Any) -> None:
        # Every stored row so far is as it was, through updates, replays and what becomes of its trajectory.
        assert all(s == as_it_was for s, as_it_was in kept)
        kept.extend((s, copy.deepcopy(s)) for s in spear.buffer.samples)
        for trajectory in itertools.chain.from_iterable(batches[:1]):
            for segment in trajectory.segments:
                segment.token_ids[:] = [1] * len(segment)
        before = [copy.deepcopy(s) for s in spear.buffer.samples]
        for place, stored in enumerate(spear.buffer.samples):
            row = stored.row(place)
            row.segment.token_ids[0] = 99
        assert spear.buffer.samples == before

    told, _, _ = session(with_run, tmp_path / "a", batches, *EAGER, each=look)
    assert kept and any(m["sil/updates"] for m in told)


def test_s10_covariance_leaves_tokens_out_of_replay(
    with_run: Make, batches: list[list[Trajectory]], make_trajectory: Make, tmp_path: Path
) -> None:
    wide = ("spear.covariance_low=0.0", "spear.covariance_fraction=0.3")
    told, weights, _ = session(with_run, tmp_path / "a", batches, *EAGER, *wide)
    assert any(0 < m.get("sil/cov_masked_frac", 0) <= 0.3 for m in told)
    _, whole, _ = session(with_run, tmp_path / "b", batches, *EAGER, "spear.covariance_fraction=0")
    assert not equal(weights, whole)
    # Nothing but wins: A~ is constant, no token has a covariance, none is left out.
    even = [
        [make_trajectory(f"e{s}{i}", group=s, reward=float(i == 0), lengths=((9, 7),)) for i in range(3)]
        for s in range(2)
    ]
    told, weights, _ = session(with_run, tmp_path / "c", even, *EAGER, *wide)
    assert told[1]["sil/updates"] == 1 and told[1]["sil/cov_masked_frac"] == told[1]["sil/cov_max"] == 0


@pytest.mark.parametrize("each", [0.1, 0.4])
def test_s11_the_bonus_is_capped_and_gone_at_the_end(make_trajectory: Make, each: float) -> None:
    section = SpearSection(intrinsic="turns", intrinsic_coef=0.5, intrinsic_each=each)
    bonuses = [section.bonus(make_trajectory(f"t{n}", lengths=((2, 1),) * n)) for n in range(1, 30)]
    assert bonuses[0] == pytest.approx(0.5 * each) and max(bonuses) == bonuses[-1] == 0.5
    assert bonuses == sorted(bonuses)
    assert SpearSection(intrinsic="none").bonus(make_trajectory("t")) == 0


def test_s11_tool_calls_count_turns_that_called_and_were_understood(make_trajectory: Make) -> None:
    from agentgym.actions import write_calls

    trajectory = make_trajectory("t", lengths=((2, 1),) * 6)
    call = ToolCall("search", {"query": "x"})
    actions = [
        (write_calls([call]), True),
        (write_calls([call, call]), True),
        (write_calls([call]), False),
        ('<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>', True),
        ("the answer is 3", True),
        ('{"name": 3}', True),
    ]
    trajectory.turns = [
        replace(turn, action=action, valid_action=valid)
        for turn, (action, valid) in zip(trajectory.turns, actions, strict=True)
    ]
    assert tool_turns(trajectory) == 3
    assert SpearSection(intrinsic="tool_calls").bonus(trajectory) == pytest.approx(0.3)


def test_a_stored_bonus_is_weighed_as_now_or_as_it_was(
    with_run: Make, make_trajectory: Make, tmp_path: Path
) -> None:
    """An early failure whose only merit was its length is above the median no longer, once mu is 0."""
    long = make_trajectory("long", reward=0.0, lengths=((2, 1),) * 10)
    short = make_trajectory("short", reward=0.0, lengths=((2, 1),))
    settings = ("spear.intrinsic=turns", "spear.decay=1", *EAGER)
    stored: dict[str, Any] = {}

    def look(spear: Spear, metrics: Any) -> None:
        stored[spear.section.bonus_at_replay] = (
            spear.baseline.median(0.0),
            [s.reward(0.0) for s in spear.buffer.samples],
            metrics["intrinsic/mu"],
        )

    for mode in ("present", "stored"):
        session(
            with_run, tmp_path / mode, [[long, short]], *settings, f"spear.bonus_at_replay={mode}", each=look
        )
    assert stored["present"] == (0.0, [0.0] * 10, 1.0)
    p50, rewards, _ = stored["stored"]
    assert p50 == pytest.approx(0.55) and rewards == [1.0] * 10


def test_s12_what_filters_took_out_is_never_stored(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    garbled = batches[0][0]
    garbled.turns = [replace(t, finish_reason="length") for t in garbled.turns]
    stored: list[str] = []
    session(
        with_run, tmp_path / "a", batches[:1], *EAGER, "filters.groups=1.0", "rollout.max_tokens=64",
        each=lambda spear, metrics: stored.extend(s.id for s in spear.buffer.samples),
    )  # fmt: skip
    assert stored and not any(id.startswith("s0t0/") for id in stored)


def test_success_can_be_required(with_run: Make, batches: list[list[Trajectory]], tmp_path: Path) -> None:
    for trajectory in batches[0][:3]:
        trajectory.turns = [replace(t, success=False) for t in trajectory.turns]
    stored: list[Sample] = []
    session(
        with_run, tmp_path / "a", batches[:1], *EAGER, "spear.require_success=true",
        each=lambda spear, metrics: stored.extend(spear.buffer.samples),
    )  # fmt: skip
    assert {s.id.split("/")[0] for s in stored} == {"s0t4"} and all(s.success for s in stored)


def test_s14_at_the_collecting_policy_replay_is_reinforce(
    make_learner: Make, batches: list[list[Trajectory]]
) -> None:
    learner = make_learner(torch.float64)
    rows = Collection.of(batches[0]).rows
    logp = learner.score(rows)
    samples = [
        Sample.of(
            row, torch.ones(logp.shape[1]), logp[row.index],
            trajectory_id=str(row.index), step=0, outcome=1.0, bonus=0.0, success=True,
        )
        for row in rows
    ]  # fmt: skip
    gains = [0.3 + 0.1 * i for i in range(len(samples))]
    replayed = [s.row(i) for i, s in enumerate(samples)]
    tokens, old = replay_tensors(samples, gains)
    config = SpearSection(covariance_fraction=0).replay_loss(PolicyLossConfig(kl_coef=0.3, clip_dual=3.0))
    assert config.kl_coef == 0 and config.clip_dual is None and config.clip_high == 0.28
    run = launch.resolve("grpo", overrides=["env=agentgym.testing:EchoEnv", "model=x"])[1]
    loss, seen = make_loss(replayed, tokens, loss=config, correction=run.correction, old=old, scale=0.5)
    learner.backward(replayed, loss)
    metrics = seen()
    found = {n: p.grad.clone() for n, p in learner.trainable.items()}
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-9) and metrics["clipfrac_high"] == 0

    count = sum(row.sampled for row in rows)

    def reinforce(batch: Any, outputs: Any) -> Any:
        own = torch.tensor(gains, dtype=torch.float64)[batch.row]
        return -0.5 * (outputs.log_probs * batch.loss_mask).sum(1) @ own / count, {}

    learner.backward(rows, reinforce)
    largest = max(float(p.grad.abs().max()) for p in learner.trainable.values())
    assert largest > 0
    for name, parameter in learner.trainable.items():
        assert torch.allclose(found[name], parameter.grad, rtol=0, atol=1e-6 * largest), name


@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 2**40), st.randoms(), st.booleans())
@examples(max_examples=40, deadline=None)
def test_s15_the_draw_is_the_seed_s_and_no_order_s(
    count: int, capacity: int, seed: int, random: Any, power: bool
) -> None:
    made = [sample(f"t{i}", outcome=float(i % 4)) for i in range(count)]
    drawn = []
    for order in (made, random.sample(made, count)):
        buffer = SampleBuffer(capacity)
        buffer.insert(order)
        drawn.append(buffer.take(0.5, 0.0, seed, power_of_two=power))
    assert drawn[0] == drawn[1]
    eligible = sum(s.outcome > 0.5 for s in made)
    wanted = min(eligible, capacity)
    if power and eligible:
        wanted = min(2 ** int(math.log2(eligible)), capacity)
    assert len(drawn[0].samples) == wanted and drawn[0].eligible == eligible
    assert len({s.id for s in drawn[0].samples}) == wanted


def test_s15_the_draw_is_uniform() -> None:
    counts = dict.fromkeys(map(str, range(5)), 0)
    for seed in range(400):
        buffer = SampleBuffer(2)
        buffer.insert(map(sample, counts))
        for one in buffer.take(0.0, 0.0, seed).samples:
            counts[one.id] += 1
    assert all(120 < n < 200 for n in counts.values()), counts  # 160 expected, 9.8 the standard deviation


def test_dividing_by_the_spread() -> None:
    buffer = SampleBuffer(2)
    buffer.insert([sample(outcome=3.0)])
    assert buffer.take(1.0, 0.0, 0, std=0.5).advantages == [pytest.approx(4, abs=1e-4)]


@pytest.mark.parametrize("budget", [16, 64])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum"])
def test_x2_micro_batches_change_no_replay(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path, mode: str, budget: int
) -> None:
    ends = [
        session(
            with_run, tmp_path / str(tokens), batches[:3], *EAGER, f"loss.aggregation={mode}",
            "spear.covariance_low=0.0", "spear.covariance_fraction=0.1", "optimiser.eps=1.0",
            f"optimiser.micro_batch_tokens={tokens}", double=True,
        )[1]
        for tokens in (4096, budget)
    ]  # fmt: skip
    base = session(with_run, tmp_path / "base", batches[:3], f"loss.aggregation={mode}", "optimiser.eps=1.0",
                   double=True)[1]  # fmt: skip
    largest = max(float((ends[0][n] - base[n]).abs().max()) for n in base)
    assert largest > 0
    for name in base:
        assert torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-5 * largest), name


@pytest.mark.parametrize(
    "overrides",
    [
        ("spear.minibatches=3",),
        ("loss.entropy_coef=0.01",),
        ("epochs=2", "minibatches=2"),
        ("estimator=dr_grpo", "loss.aggregation=seq-mean-token-sum-norm", "loss.length_norm=16"),
        ("estimator=reinforce++-baseline", "loss.clip_dual=10"),
        ("gigpo.omega=1", "gigpo.norm=none", "estimator=dr_grpo"),
        ("spear.norm=std", "correction.rule=truncate"),
        ("spear.intrinsic=turns", "spear.decay=3", "spear.power_of_two=true"),
        ("model.lora.rank=4",),
        ("spear.replay=joint", "epochs=2", "minibatches=2"),
    ],
    ids=" ".join,
)
def test_every_path_replays_and_stays_finite(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    told, weights, _ = session(with_run, tmp_path / "a", batches, *EAGER, *overrides)
    assert all(math.isfinite(v) for metrics in told for v in metrics.values()), told
    assert all(bool(w.isfinite().all()) for w in weights.values())
    replays = [m for m in told if m["sil/updates"]]
    assert replays and all(m["sil/age_max"] >= m["sil/age_mean"] >= 1 for m in replays)
    expected = {
        "age_mean", "age_max", "gamma", "loss", "grad_norm", "clipfrac", "clipfrac_lower", "approx_kl",
        "ratio_mean", "ratio_max", "adv_mean", "cov_mean", "cov_max", "cov_masked_frac", "n_selected",
        "n_dropped_nonpositive", "buffer_rows", "buffer_rows_above_p50", "triggered",
    }  # fmt: skip
    if "spear.replay=joint" in overrides:
        expected -= {"grad_norm"}  # the base's is that of both
        assert replays[-1]["sil/updates"] == 2
    assert {f"sil/{name}" for name in expected} <= replays[-1].keys()
    assert {"baseline/p50", "baseline/p50_std", "baseline/fifo_size", "intrinsic/mu"} <= replays[-1].keys()
    assert replays[-1]["sil/ratio_max"] != 1  # the policy has moved since
    if "spear.minibatches=3" in overrides:
        assert replays[-1]["sil/updates"] > 1


def test_a_joint_replay_adds_c_sil_times_its_gradient_to_the_base_s(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    free = (*EAGER, "optimiser.max_grad_norm=1e9", "spear.covariance_fraction=0", "spear.replay=joint")

    def moments(weight: float) -> dict[str, Any]:
        told, _, found = session(
            with_run, tmp_path / str(weight), batches[:2], *free, f"spear.c_sil={weight}", double=True
        )
        assert [m["sil/updates"] for m in told] == [0, float(weight > 0)]
        # The learning rate's schedule sees the base's steps alone, and there are no others.
        assert all(int(v) == 2 for n, v in found.items() if n.endswith("/step"))
        return {n: v for n, v in found.items() if n.endswith("/exp_avg")}

    base, once, twice = moments(0), moments(1), moments(2)
    largest = max(float((once[n] - base[n]).abs().max()) for n in base)
    assert largest > 0
    for name in base:
        double = 2 * (once[name] - base[name])
        assert torch.allclose(twice[name] - base[name], double, rtol=0, atol=1e-9 * largest), name


def test_a_joint_replay_has_the_base_s_optimiser_steps(settings: Make) -> None:
    with pytest.raises(ConfigError, match="part of the base's optimiser steps"):
        settings("grpo", "spear.replay=joint", "spear.minibatches=2")


def test_replay_does_not_move_the_learning_rate(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    def use(config: Any, run: Any) -> Any:
        for trajectory in itertools.chain.from_iterable(batches):
            run.journal.begin(trajectory)
            run.journal.end(trajectory)
        methods = switched_on(config, run)
        rates = []
        for number, batch in enumerate(batches):
            rates.append(learn(config, run, methods, Collection.of(batch), None, number)["lr"])
        return rates, run.learner.updates, run.learner.scheduled

    rates, updates, scheduled = with_run(
        tmp_path / "a", "grpo", use, *PLAIN, *EAGER, "optimiser.schedule=linear", "steps=4"
    )
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert (updates, scheduled) == (7, 4)


@pytest.mark.parametrize(
    "case", ["all equal", "one member", "all failed", "empty completion", "failed beside"]
)
def test_degenerate_batches(
    with_run: Make, make_trajectory: Make, batches: list[list[Trajectory]], tmp_path: Path, case: str
) -> None:
    lost = Outcome.infra_failed("environment")
    batch = {
        "all equal": [make_trajectory(f"e{i}", group=99, reward=2.4, lengths=((4, 3),)) for i in range(4)],
        "one member": [make_trajectory("one", group=99, reward=1.0)],
        "all failed": [make_trajectory(f"f{i}", group=99, outcome=lost) for i in range(3)],
        "empty completion": [
            make_trajectory(f"n{i}", group=99, reward=float(i), lengths=((4, 0),)) for i in range(2)
        ],
        "failed beside": [make_trajectory("f", group=99, reward=99.0, outcome=lost), *batches[1]],
    }[case]
    kept: list[int] = []
    told, weights, _ = session(
        with_run, tmp_path / "a", [batches[0], batch, batches[2]], *EAGER, "spear.intrinsic=turns",
        each=lambda spear, metrics: kept.append(len(spear.baseline)),
    )  # fmt: skip
    assert all(math.isfinite(v) for metrics in told for v in metrics.values())
    assert all(bool(w.isfinite().all()) for w in weights.values())
    new = {"all equal": 1, "one member": 1, "all failed": 0, "empty completion": 0, "failed beside": 2}[case]
    assert kept == [2, 2 + new, 4 + new]
    if case == "failed beside":
        _, without, _ = session(
            with_run, tmp_path / "b", [batches[0], batches[1], batches[2]], *EAGER, "spear.intrinsic=turns"
        )
        assert equal(weights, without)


def test_state_is_json_and_comes_back(
    with_run: Make, batches: list[list[Trajectory]], tmp_path: Path
) -> None:
    def look(spear: Spear, metrics: Any) -> None:
        text = json.dumps(spear.state())
        other = Spear(spear.config, spear.run)
        other.load(json.loads(text))
        assert other.buffer.samples == spear.buffer.samples and spear.buffer.samples
        assert list(other.baseline.steps) == list(spear.baseline.steps)
        assert json.dumps(other.state()) == text

    session(with_run, tmp_path / "a", batches[:2], "spear.intrinsic=turns", each=look)


@pytest.mark.parametrize("replay", [["spear.minibatches=2"], ["spear.replay=joint", "minibatches=2"]])
def test_x16_a_resumed_run_has_both_buffers(train: Make, tmp_path: Path, replay: list[str]) -> None:
    start = train(
        tmp_path / "c", "cloning", "steps=20", "demonstrations=16", "batch_rows=8", "optimiser.lr=3e-3"
    )
    small = [s for s in RUN if not s.startswith("env.parser")]
    small += [
        f"model={start}", "group_size=4", "spear.warmup=2", "spear.buffer_size=2", "spear.trigger=0.5",
        "spear.intrinsic=turns", *replay, "optimiser.schedule=linear",
    ]  # fmt: skip
    train(tmp_path / "whole", "grpo", *small)
    whole = state(tmp_path / "whole")
    assert sum(metrics["sil/updates"] for metrics in whole[2]) >= 2
    saved = json.loads(whole[1]["state.json"])["extra"]["methods"]["spear"]
    assert len(saved["baseline"]) == 5 and whole[2][2]["sil/buffer_rows"] > 0
    for place, stop in enumerate(({"step": 1}, {"turn": 37}, {"step": 3})):
        with pytest.raises(Interrupted):
            train(tmp_path / f"cut{place}", "grpo", *small, progress=Stop(**stop))
        resume(tmp_path / f"cut{place}")
        assert state(tmp_path / f"cut{place}") == whole


def test_bounds_that_cannot_be_are_refused_before_anything_starts(settings: Make) -> None:
    with pytest.raises(ConfigError, match="covariance"):
        settings("grpo", "spear.covariance_low=3.0", "spear.covariance_high=2.0")
    with pytest.raises(ConfigError):
        settings("grpo", "spear.intrinsic=everything")


@pytest.mark.parametrize("base", ["spear", "drbot", "gigpo"])
def test_presets(settings: Make, base: str) -> None:
    config = launch.resolve(
        base,
        overrides=["env=agentgym.testing:EchoEnv", "model=x"],
        added=[] if base == "spear" else ["spear"],
    )[1]
    assert config.spear.c_sil == 1 and config.spear.warmup == config.spear.decay == 200
    loss = config.spear.replay_loss(config.loss)
    assert loss.covariance.fraction == 0.02 and loss.aggregation == config.loss.aggregation
    if base == "drbot":
        assert config.filters.groups == 0.75 and config.loss.clip_dual == 10 and config.loss.kl_coef == 0


@pytest.mark.slow
def test_reward_rises_with_replay(train: Make, tmp_path: Path) -> None:
    start = train(
        tmp_path / "c", "cloning", "steps=26", "demonstrations=16", "batch_rows=8", "optimiser.lr=3e-3"
    )
    train(
        tmp_path / "g", "spear", f"model={start}", "steps=30", "groups=4", "group_size=8",
        "optimiser.lr=1e-3", "spear.warmup=10", "spear.buffer_size=8",
    )  # fmt: skip
    metrics = list(load_metrics(tmp_path / "g").values())
    scores = [m["score/mean"] for m in metrics]
    assert sum(m["sil/updates"] for m in metrics) >= 3
    assert sum(scores[-8:]) / 8 > sum(scores[:8]) / 8 + 0.2
