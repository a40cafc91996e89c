"""EPO: golden vectors, E1-E14, degenerate batches, resuming with the history."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agentgym.errors import ConfigError
from agentgym.outcome import Outcome
from agentgym.trainers import launch, policy_gradient
from agentgym.trainers.aggregation import AGGREGATION_MODES, Denominators, aggregate
from agentgym.trainers.batch import collate
from agentgym.trainers.collect import Collection, TaskOrder, collect, plan
from agentgym.trainers.epo import EPO, EPOSection, History, penalty, phase_weight
from agentgym.trainers.learner import Outputs
from agentgym.trainers.logprobs import token_logprobs
from agentgym.trainers.method import Step
from agentgym.trainers.metrics import load as load_metrics
from agentgym.trajectory import Trajectory

from .test_resume import Interrupted, Stop, resume, state

Make = Callable[..., Any]
LAYOUTS = [((3, 2),), ((20, 6), (9, 3)), ((5, 0),), ((8, 1), (4, 4), (4, 1)), ((30, 12),), ((2, 3),)]


@pytest.fixture
def groups(make_trajectory: Make) -> list[Trajectory]:
    """Two groups of three, of uneven lengths and turns, one completion empty."""
    rewards = [1.0, 0.0, 0.5, 0.0, 1.0, 0.0]
    return [make_trajectory(f"t{i}", group=i // 3, reward=rewards[i], lengths=LAYOUTS[i]) for i in range(6)]


@dataclass
class Learned:
    """What some steps on the same trajectories left behind."""

    metrics: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]  # an optimiser step each, before clipping
    weights: dict[str, Tensor]
    moved: bool
    history: Any


@pytest.fixture
def learn(with_run: Make, tmp_path: Path) -> Callable[..., Learned]:
    """``learn(trajectories, "epo.coef=0.1", …, steps=2, double=False)``: GRPO's steps with these settings."""
    count = itertools.count()

    def use(trajectories: Sequence[Trajectory], *overrides: str, steps: int = 2, double: bool = False) -> Any:
        def body(config: Any, run: Any) -> Learned:
            for trajectory in trajectories:
                run.journal.begin(trajectory)
                run.journal.end(trajectory)
            if double:
                run.learner.model.double()
            gradients: list[dict[str, Tensor]] = []
            backward = run.learner.backward

            def kept(*args: Any, **more: Any) -> Any:
                totals = backward(*args, **more)
                gradients.append({n: p.grad.clone() for n, p in run.learner.trainable.items()})
                return totals

            run.learner.backward = kept
            methods = policy_gradient.switched_on(config, run)
            before = {n: w.clone() for n, w in run.learner.weights()}
            metrics = [
                policy_gradient.learn(config, run, methods, Collection.of(trajectories), None, number)
                for number in range(steps)
            ]
            after = {n: w.clone() for n, w in run.learner.weights()}
            moved = any(not torch.equal(before[n], after[n]) for n in before)
            history = [m.state() for m in methods if m.name == "epo"]
            return Learned(metrics, gradients, after, moved, history[0] if history else None)

        fixed = ("loss.kl_coef=0", "optimiser.lr=1e-3", "steps=10")
        return with_run(tmp_path / f"r{next(count)}", "grpo", body, *fixed, *overrides)

    return use


def same(one: Sequence[Mapping[str, Tensor]], other: Sequence[Mapping[str, Tensor]], atol: float = 0) -> bool:
    assert len(one) == len(other) > 0
    return all(
        a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=0, atol=atol) for n in a)
        for a, b in zip(one, other, strict=True)
    )


def base_metrics(learned: Learned) -> list[dict[str, float]]:
    """What a base algorithm logs too, without times."""
    left_out = ("time/", "epo/", "loss/entropy", "entropy_mean")
    return [{k: v for k, v in m.items() if not k.startswith(left_out)} for m in learned.metrics]


class Alone:
    """The term of one optimiser step on given entropies, without a model."""

    def __init__(self, settings: Make, trajectories: Sequence[Trajectory], *overrides: str) -> None:
        _, self.config = settings("grpo", "steps=10", "epo.coef=0.1", "epo.phase=constant", *overrides)
        self.epo = EPO(self.config, cast(Any, None))
        self.collection = Collection.of(trajectories)
        assert self.collection.whole is not None
        self.whole = self.collection.whole
        self.mask = self.whole.loss_mask

    def history(self, *steps: Sequence[float]) -> Alone:
        """Let every step have had the given entropies at turns 0, 1, …"""
        for entropies in steps:
            self.epo.history.push(torch.tensor(entropies).double(), torch.ones(len(entropies)).double())
        return self

    def __call__(self, entropy: Tensor, number: int = 0) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The term, its gradient in the entropies ``[B, T-1]``, and the step's metrics."""
        rows = self.collection.rows
        step = Step(number, self.collection, self.whole, self.collection.rewards, list(rows))
        leaf = entropy.double().requires_grad_()
        self.epo.before(step, torch.zeros(0))
        term = self.epo.term(step, rows, Denominators.of(self.mask.sum(1)))
        assert term is not None
        value, _ = term(self.whole, Outputs(torch.zeros_like(leaf), leaf), lambda x: x)
        (gradient,) = torch.autograd.grad(value, leaf)
        self.epo.finish(step, torch.zeros(0))
        return value.detach(), gradient, step.metrics

    def of_turns(self, *entropies: float) -> Tensor:
        """``[B, T-1]``: that entropy at every token of a turn, NaN off the mask."""
        values = torch.tensor(entropies).double()[self.whole.turn.clamp(min=0)]
        return torch.where(self.mask, values, math.nan)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_golden_epo_hinge() -> None:
    found = penalty(f64(0.1, 0.3, 0.6, 1.0), f64(*[0.4] * 4))
    assert torch.allclose(found, f64(0.1, 0, 0, 0.4), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("step", "beta"), [(0, 2), (30, 1.60653), (60, 1.36788), (120, 1.13534)])
def test_golden_epo_beta(step: int, beta: float) -> None:
    assert phase_weight(step, 100, EPOSection()) == pytest.approx(beta, abs=1e-5)  # k_mid is 60 of 100
    assert phase_weight(step, 7, EPOSection(k_mid=60)) == pytest.approx(beta, abs=1e-5)


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 1), (37, 0.874563), (75, 0.827067), (76, 0.768632), (100, 0.294304), (150, 0.03983)],
)
def test_golden_epo_release_weight(step: int, weight: float) -> None:
    assert phase_weight(step, 150, EPOSection(phase="release")) == pytest.approx(weight, abs=1e-6)


def test_e1_without_coefficient_it_is_the_base_bit_for_bit(learn: Make, groups: list[Trajectory]) -> None:
    base, epo = learn(groups), learn(groups, "epo.coef=0")
    assert same(base.gradients, epo.gradients) and same([base.weights], [epo.weights]) and base.moved
    drop = [{k: v for k, v in m.items() if not k.startswith("time/")} for m in epo.metrics]
    assert drop == [{k: v for k, v in m.items() if not k.startswith("time/")} for m in base.metrics]


def test_e1_and_e2_over_ppo_bit_for_bit(train: Make, tmp_path: Path) -> None:
    def weights(name: str, *overrides: str) -> bytes:
        folder = tmp_path / "-".join([name, *overrides])
        train(folder, name, "steps=3", "groups=6", "env.kwargs.turns=2", "optimiser.lr=1e-2", *overrides)
        return (folder / "model" / "model.safetensors").read_bytes()

    ppo, plain = weights("ppo"), weights("ppo_entropy", "loss.entropy_coef=0.1")
    assert weights("epo", "epo.coef=0") == ppo != plain
    assert weights("epo", "epo.coef=0.1", "epo.smooth=0") == plain
    narrow = "epo.coef=0.1", "epo.kappa_low=1", "epo.kappa_high=1"
    assert weights("epo", *narrow, "epo.mode=parity") == plain != weights("epo", *narrow)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("split", [(), ("epochs=2", "minibatches=2")], ids=["one", "four"])
def test_e2_without_penalty_it_is_the_plain_entropy_bonus_bit_for_bit(
    learn: Make, groups: list[Trajectory], mode: str, split: tuple[str, ...]
) -> None:
    base = learn(groups, "loss.entropy_coef=0.1", f"loss.aggregation={mode}", *split)
    epo = learn(groups, "epo.coef=0.1", "epo.smooth=0", f"loss.aggregation={mode}", *split)
    assert same(base.gradients, epo.gradients) and same([base.weights], [epo.weights])
    assert base_metrics(base) == base_metrics(epo)
    assert not same(base.gradients, learn(groups, f"loss.aggregation={mode}", *split).gradients)


def test_e3_inside_the_band_it_is_the_plain_entropy_bonus(learn: Make, groups: list[Trajectory]) -> None:
    base = learn(groups, "loss.entropy_coef=0.1", steps=3)
    epo = learn(groups, "epo.coef=0.1", "epo.kappa_low=0", "epo.kappa_high=1e6", steps=3)
    assert same(base.gradients, epo.gradients) and base_metrics(base) == base_metrics(epo)
    for metrics in epo.metrics[1:]:
        assert metrics["epo/penalty"] == metrics["epo/frac_below"] == metrics["epo/frac_above"] == 0
        assert metrics["epo/penalty_grad_norm"] == 0


def test_a_narrow_band_changes_the_gradient(learn: Make, groups: list[Trajectory]) -> None:
    base = learn(groups, "epo.coef=0.1", "epo.smooth=0")
    narrow = learn(groups, "epo.coef=0.1", "epo.kappa_low=1", "epo.kappa_high=1")
    assert same(base.gradients[:1], narrow.gradients[:1])  # the first step has no history
    assert not same(base.gradients[1:], narrow.gradients[1:])
    seen = narrow.metrics[1]
    assert seen["epo/frac_below"] + seen["epo/frac_above"] == 1
    assert seen["epo/penalty"] > 0 and seen["epo/penalty_grad_norm"] > 0


@pytest.mark.parametrize("mode", ["hinge", "squared", "parity"])
@given(h=st.floats(0, 20), reference=st.floats(0, 20))
def test_e4_a_band_without_edges_penalises_nothing(mode: Any, h: float, reference: float) -> None:
    entropy = f64(h, 0).requires_grad_()
    found = penalty(entropy, f64(reference, reference), kappa_low=0, kappa_high=math.inf, mode=mode)
    assert found.tolist() == [0, 0]
    if mode != "parity":
        (gradient,) = torch.autograd.grad(found.sum(), entropy)
        assert gradient.tolist() == [0, 0]


def test_e5_parity_moves_the_loss_and_no_gradient(settings: Make, groups: list[Trajectory]) -> None:
    found = [
        Alone(settings, groups, "epo.mode=parity", f"epo.smooth={smooth}").history([1.0])
        for smooth in (0.0, 1.0)
    ]
    entropies = found[0].of_turns(0.1, 1.0, 9.0)
    (plain, without, _), (value, gradient, metrics) = (alone(entropies) for alone in found)
    assert value > plain and torch.equal(gradient, without)
    assert metrics["epo/penalty"] > 0 and metrics["epo/penalty_grad_norm"] == 0


def test_e5_parity_trains_as_the_plain_bonus_does(learn: Make, groups: list[Trajectory]) -> None:
    narrow = "epo.kappa_low=1", "epo.kappa_high=1", "epo.coef=0.1"
    plain, parity = learn(groups, "loss.entropy_coef=0.1"), learn(groups, *narrow, "epo.mode=parity")
    assert same(plain.gradients, parity.gradients) and same([plain.weights], [parity.weights])
    assert parity.metrics[1]["loss/total"] - plain.metrics[1]["loss/total"] > 0.01


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.37, 5.0])
@pytest.mark.parametrize("knob", ["epo.alpha", "epo.smooth"])
def test_e5_the_hinge_s_slopes_and_when_the_bonus_is_reversed(
    settings: Make, groups: list[Trajectory], strength: float, knob: str
) -> None:
    alone = Alone(settings, groups, f"{knob}={strength}", "loss.aggregation=token-mean").history([1, 1, 1])
    _, gradient, metrics = alone(alone.of_turns(0.1, 1.0, 9.0))
    unit = 0.1 / float(alone.mask.sum())
    below, within, above = (gradient[alone.whole.turn == turn] for turn in range(3))
    assert torch.allclose(below, torch.full_like(below, -unit * (1 + strength)))
    assert torch.allclose(within, torch.full_like(within, -unit))
    assert torch.allclose(above, torch.full_like(above, -unit * (1 - strength)), atol=1e-15)
    assert bool((below < -unit).all()) and bool((above > -unit).all())
    # Descent lowers the entropy above the band only where the slope is positive: c_s w_k alpha > 1.
    assert bool((above > 0).all()) == (strength > 1)
    count = len(below) + len(above)
    assert metrics["epo/penalty_grad_norm"] == pytest.approx(unit * strength * math.sqrt(count))
    assert metrics["epo/frac_below"] == pytest.approx(len(below) / float(alone.mask.sum()))
    assert metrics["epo/frac_above"] == pytest.approx(len(above) / float(alone.mask.sum()))


@pytest.mark.parametrize("steps", [1, 10, 150])
def test_the_defaults_reverse_the_bonus_above_the_band_throughout(steps: int) -> None:
    section = EPOSection()
    weights = [section.smooth * phase_weight(k, steps, section) * section.alpha for k in range(steps)]
    assert min(weights) > 1


@pytest.mark.parametrize("mode", ["hinge", "squared"])
@given(reference=st.floats(0.01, 10), low=st.floats(0, 1), high=st.floats(1, 3), alpha=st.floats(0, 5))
def test_e6_the_hinge_is_continuous_and_zero_at_the_edges(
    mode: Any, reference: float, low: float, high: float, alpha: float
) -> None:
    def at(h: float) -> float:
        band = {"kappa_low": low, "kappa_high": high}
        return penalty(f64(h), f64(reference), **band, alpha=alpha, mode=mode).item()

    near = 1e-7
    for edge in (low * reference, high * reference):
        assert at(edge) == 0
        assert 0 <= at(edge - near) <= alpha * near * 1.01 and 0 <= at(edge + near) <= alpha * near * 1.01


def test_the_band_is_inclusive_in_parity_too() -> None:
    found = penalty(f64(0.5, 1.5, 0.499, 1.501), f64(1, 1, 1, 1), alpha=0.05, mode="parity")
    assert found.tolist() == [0, 0, 0.05, 0.05]


def test_tokens_on_an_edge_count_as_inside(settings: Make, groups: list[Trajectory]) -> None:
    alone = Alone(settings, groups).history([1.0, 1.0, 1.0])
    _, _, metrics = alone(alone.of_turns(0.5, 1.5, 0.5))
    assert metrics["epo/frac_below"] == metrics["epo/frac_above"] == metrics["epo/penalty"] == 0


def test_e7_the_reference_is_a_number() -> None:
    reference = f64(1.0).requires_grad_()
    for mode in ("hinge", "squared"):
        found = penalty(f64(9.0).requires_grad_(), reference, mode=cast(Any, mode))
        assert torch.autograd.grad(found.sum(), reference, allow_unused=True) == (None,)


def test_e7_a_step_sees_only_earlier_ones(settings: Make, groups: list[Trajectory]) -> None:
    alone = Alone(settings, groups, "epo.kappa_low=1", "epo.kappa_high=1")
    entropies = [(1.0, 2.0, 3.0), (5.0, 2.0, 1.0), (4.0, 4.0, 4.0)]
    seen = [alone(alone.of_turns(*own), number)[2] for number, own in enumerate(entropies)]
    assert not {"epo/penalty", "epo/ref_turn_0", "epo/frac_below"} & seen[0].keys()
    references = [[metrics[f"epo/ref_turn_{turn}"] for turn in range(3)] for metrics in seen[1:]]
    assert references == [[1, 2, 3], [3, 2, 2]]
    means = [[metrics[f"epo/entropy_turn_{turn}"] for turn in range(3)] for metrics in seen]
    assert means == [list(own) for own in entropies]


def test_e7_an_empty_history_penalises_nothing(settings: Make, groups: list[Trajectory]) -> None:
    first, plain = Alone(settings, groups), Alone(settings, groups, "epo.smooth=0").history([1.0])
    entropies = first.of_turns(0.1, 1.0, 9.0)
    (value, gradient, metrics), (bonus, without, _) = first(entropies), plain(entropies)
    assert torch.equal(value, bonus) and torch.equal(gradient, without)
    assert metrics["epo/entropy_mean"] > 0
    assert History().reference(3) is None


def test_e7_a_turn_beyond_the_history_falls_back_to_the_mean_of_all() -> None:
    history = History()
    history.push(f64(10, 2), f64(5, 1))
    found = history.reference(4)
    assert found is not None and found.tolist() == [2, 2, 2, 2]
    history.push(f64(6), f64(1))  # turn 0: 2, 6; all: 2, 6
    found = history.reference(4)
    assert found is not None and found.tolist() == [4, 2, 4, 4]
    found = history.reference(4, "global")
    assert found is not None and found.tolist() == [4, 4, 4, 4]


def test_e8_histories_are_aligned_by_turn_index(settings: Make, make_trajectory: Make) -> None:
    history = History()
    history.push(f64(1, 2, 3), f64(1, 1, 1))
    history.push(f64(1, 2), f64(1, 1))
    for turns in (1, 2, 3):
        found = history.reference(turns)
        assert found is not None and found.tolist() == [1, 2, 3][:turns]
    # The same through steps of real rows: three turns, then two.
    long = make_trajectory("a", lengths=((3, 2), (4, 3), (2, 1)))
    short = make_trajectory("b", lengths=((3, 2), (4, 3)))
    first, second = Alone(settings, [long]), Alone(settings, [short])
    first(first.of_turns(1, 2, 3))
    second.epo = first.epo
    second(second.of_turns(1, 2))
    found = first.epo.history.reference(3)
    assert found is not None and found.tolist() == [1, 2, 3]


def test_a_turn_without_tokens_leaves_a_gap_and_shifts_nothing(settings: Make, make_trajectory: Make) -> None:
    gap = Alone(settings, [make_trajectory("a", lengths=((3, 2), (4, 0), (2, 2)))])
    _, _, metrics = gap(gap.of_turns(1, math.nan, 3))
    assert {k: v for k, v in metrics.items() if "turn" in k} == {
        "epo/entropy_turn_0": 1,
        "epo/entropy_turn_2": 3,
    }
    found = gap.epo.history.reference(3)
    assert found is not None and found.tolist() == [1, 2, 3]  # turn 1: the mean of all


@pytest.mark.parametrize("mode", ["hinge", "squared", "parity"])
def test_e9_neither_padding_nor_what_ended_or_failed_is_in_a_mean(
    settings: Make, groups: list[Trajectory], make_trajectory: Make, mode: str
) -> None:
    failed = make_trajectory(
        "f", reward=9.0, lengths=((2, 9), (3, 9)), outcome=Outcome.infra_failed("sandbox")
    )
    alone, beside = (Alone(settings, own, f"epo.mode={mode}") for own in (groups, [failed, *groups]))
    seen = []
    for one in (alone, beside):
        one.history([1.0, 1.0, 1.0])
        seen.append(one(one.of_turns(0.2, 3.0, 5.0)))  # NaN wherever no token was sampled
    (value, gradient, metrics), (other, same_gradient, same_metrics) = seen
    assert math.isfinite(value) and torch.equal(value, other) and metrics == same_metrics
    assert torch.equal(gradient, same_gradient) and not gradient[~alone.mask].any()
    # Turn 1 is had by two of six trajectories, turn 2 by one: the others, over by then, count nowhere.
    assert [metrics[f"epo/entropy_turn_{turn}"] for turn in range(3)] == pytest.approx([0.2, 3.0, 5.0])
    tokens = [sum(own[turn][1] for own in LAYOUTS if turn < len(own)) for turn in range(3)]
    expected = sum(n * h for n, h in zip(tokens, (0.2, 3.0, 5.0), strict=True)) / sum(tokens)
    assert metrics["epo/entropy_mean"] == pytest.approx(expected)


@pytest.mark.parametrize("size", [2, 50])
def test_e10_entropies_of_uniform_and_certain_tokens(size: int) -> None:
    targets = torch.zeros(1, dtype=torch.long)
    uniform = token_logprobs(torch.zeros(1, 4), torch.randn(size, 4), targets, with_entropy=True)
    assert uniform.entropy is not None and uniform.entropy.item() == pytest.approx(math.log(size))
    weight = torch.zeros(size, 4)
    weight[1, 0] = 1e4
    certain = token_logprobs(torch.ones(1, 4), weight, targets, with_entropy=True)
    assert certain.entropy is not None and certain.entropy.item() == 0


def test_e11_phase_weights_span_the_run() -> None:
    for steps in (1, 125, 150):
        beta = [phase_weight(k, steps, EPOSection()) for k in (0, steps)]
        assert beta == pytest.approx([2, 1 + math.exp(-1 / 0.6)])
        release = [phase_weight(k, steps, EPOSection(phase="release")) for k in (0, steps)]
        assert release == pytest.approx([1, 0.8 * math.exp(-3)])
        assert [phase_weight(k, steps, EPOSection(phase="constant")) for k in (0, steps)] == [1, 1]


def test_e11_the_phase_counts_the_run_s_steps(settings: Make, groups: list[Trajectory]) -> None:
    for phase in ("beta", "release"):
        alone = Alone(settings, groups, f"epo.phase={phase}", "steps=40").history([1.0])
        metrics = [alone(alone.of_turns(1, 1, 1), number)[2] for number in (0, 20, 39)]
        expected = [phase_weight(number, 40, alone.epo.section) for number in (0, 20, 39)]
        assert [own["epo/beta"] for own in metrics] == expected and expected == sorted(expected)[::-1]


FLAGS = {
    "coef": "0.2", "smooth": "0.5", "kappa_low": "0.2", "kappa_high": "2.5", "alpha": "3.0",
    "mode": '"squared"', "reference": '"global"', "phase": '"release"', "k_mid": "2.0", "gamma": "3.0",
}  # fmt: skip


def test_e12_every_flag_has_a_case() -> None:
    assert FLAGS.keys() == EPOSection.model_fields.keys()


@pytest.mark.parametrize(("flag", "text"), FLAGS.items())
def test_e12_every_flag_reaches_the_loss(
    settings: Make, groups: list[Trajectory], tmp_path: Path, flag: str, text: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[epo]\n{flag} = {text}\n")
    _, config = settings("grpo", f"epo.{flag}={text}")
    assert getattr(config.epo, flag) == json.loads(text) != getattr(EPOSection(), flag)
    _, from_file = launch.resolve("grpo", [file], ["env=agentgym.testing:EchoEnv", "model=none"])
    assert cast(Any, from_file).epo == config.epo

    values = []
    for more in ([], [f"epo.{flag}={text}"]):
        alone = Alone(settings, groups, "epo.phase=beta", *more).history([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
        values.append(alone(alone.of_turns(0.3, 2.0, 7.0), number=3)[0].item())
    assert values[0] != values[1]


def test_options_that_the_release_ignores_do_not_exist(settings: Make) -> None:
    with pytest.raises(ConfigError, match="window_size"):
        settings("grpo", "epo.window_size=5")


def test_e13_members_of_a_group_share_task_and_first_observation(with_run: Make, tmp_path: Path) -> None:
    async def use(config: Any, run: Any) -> list[Trajectory]:
        engine = run.engine()
        try:
            order = TaskOrder(run.tasks(), config.seed)
            return await collect(engine, plan(order, 0, 0, 3, 4), {}, max_failure_rate=0)
        finally:
            await engine.aclose()

    ended = with_run(tmp_path / "r", "grpo", use, "epo.coef=0.1", "env.kwargs.words=8")
    starts: dict[int, set[Any]] = {}
    for trajectory in ended:
        start = trajectory.task_id, trajectory.env_seed, trajectory.turns[0].observation
        starts.setdefault(trajectory.group, set()).add(start)
    assert len(ended) == 12 and [len(own) for own in starts.values()] == [1, 1, 1]
    assert len({start[0] for own in starts.values() for start in own}) == 3


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_e14_micro_batches_change_nothing(learn: Make, groups: list[Trajectory], mode: str) -> None:
    settings = (
        "epo.coef=0.5", "epo.kappa_low=0.99", "epo.kappa_high=1.0", f"loss.aggregation={mode}",
        "optimiser.max_grad_norm=1e9",
    )  # fmt: skip
    found = [
        learn(groups, *settings, f"optimiser.micro_batch_tokens={budget}", double=True)
        for budget in (4096, 40, 1)
    ]
    assert found[0].metrics[1]["epo/penalty"] > 0
    for other in found[1:]:
        assert same(found[0].gradients, other.gradients, atol=1e-10)
        for one, two in zip(found[0].metrics, other.metrics, strict=True):
            mine = {k: v for k, v in one.items() if k.startswith(("epo/", "loss/total"))}
            assert mine == pytest.approx({k: two[k] for k in mine}, abs=1e-10)


@pytest.mark.parametrize("aggregation", AGGREGATION_MODES)
def test_the_term_is_aggregated_as_the_policy_loss_is(
    settings: Make, groups: list[Trajectory], aggregation: str
) -> None:
    norm = ["loss.length_norm=7"] if aggregation.endswith("norm") else []
    alone = Alone(settings, groups, f"loss.aggregation={aggregation}", *norm).history([1, 1])
    entropies = alone.of_turns(0.1, 2.0, 0.9)
    lengths = Denominators.of(alone.mask.sum(1), length_norm=7)
    step = Step(0, alone.collection, alone.whole, alone.collection.rewards, alone.collection.rows)
    alone.epo.before(step, torch.zeros(0))
    term = alone.epo.term(step, step.rows, lengths)
    assert term is not None
    parts = [
        term(batch, Outputs(None, entropies[batch.row, : batch.loss_mask.shape[1]]), lambda x: x)[0]
        for batch in map(collate, ([row] for row in step.rows))
    ]
    levels = alone.of_turns(0.4, 0.5, 0.0)
    expected = -0.1 * aggregate(entropies - levels, alone.mask, cast(Any, aggregation), lengths)
    assert torch.allclose(sum(parts, torch.zeros(())), expected)


def test_rows_read_twice_are_history_once(learn: Make, groups: list[Trajectory]) -> None:
    once, twice = (learn(groups, "epo.coef=0.1", f"epochs={n}", steps=1) for n in (1, 2))
    assert once.history == twice.history
    assert len(once.gradients) == 1 and len(twice.gradients) == 2


def test_the_history_survives_json() -> None:
    history = History()
    history.push(f64(1 / 3, 0, 2), f64(1, 0, 3))
    again = History.of(json.loads(json.dumps(history.state())))
    again.push(f64(0.1), f64(1))
    history.push(f64(0.1), f64(1))
    one, two = history.reference(5), again.reference(5)
    assert one is not None and two is not None and torch.equal(one, two)


def test_entropies_that_are_not_finite_are_no_history() -> None:
    history = History()
    history.push(f64(math.nan, 1), f64(2, 2))
    history.push(f64(), f64())
    history.push(f64(0), f64(0))
    assert history.reference(2) is None


def test_equal_rewards_leave_the_entropy_term_alone(
    learn: Make, make_trajectory: Make, groups: list[Trajectory]
) -> None:
    equal = [replace(t, turns=[replace(turn, reward=0.0) for turn in t.turns]) for t in groups]
    plain, epo = learn(equal, "epo.coef=0"), learn(equal, "epo.coef=0.1", steps=1)
    assert not plain.gradients and not plain.moved
    assert epo.moved and all(torch.isfinite(g).all() for g in epo.gradients[0].values())
    assert epo.metrics[0]["loss/pg"] == 0 and epo.metrics[0]["rows_skipped"] == 0
    assert epo.metrics[0]["loss/total"] < 0
    both = learn(equal, "loss.entropy_coef=0.1", steps=1)
    assert same(both.gradients, epo.gradients)


@pytest.mark.parametrize("failed", [True, False])
def test_a_step_without_anything_valid_is_no_update_and_no_history(
    learn: Make, make_trajectory: Make, failed: bool
) -> None:
    outcome = Outcome.infra_failed("environment")
    lost = [make_trajectory(f"f{i}", outcome=outcome) for i in range(3)] if failed else []
    epo = learn(lost, "epo.coef=0.1")
    assert epo.metrics == [{"updates_per_step": 0.0}] * 2 and not epo.moved
    assert epo.history == History().state()


def test_rows_that_were_all_filtered_out_are_no_history(learn: Make, groups: list[Trajectory]) -> None:
    whole = [groups[0], groups[4], groups[5]]
    lost = [replace(t, outcome=Outcome.truncated("tokens")) for t in whole]
    epo = learn(lost, "epo.coef=0.1", "filters.groups=1")
    assert epo.metrics[0]["filter/rows_out"] == 3 and not epo.moved
    assert epo.history == History().state()
    some = learn([*whole[:2], lost[2]], "epo.coef=0.1", "filters.groups=1", steps=1)
    assert some.history == learn(whole[:2], "epo.coef=0.1", "filters.groups=1", steps=1).history


def test_empty_completions_and_a_single_turn(learn: Make, make_trajectory: Make) -> None:
    empty = [make_trajectory(f"e{i}", reward=float(i), lengths=((4, 0),)) for i in range(2)]
    assert not learn(empty, "epo.coef=0.1").moved
    one = [make_trajectory(f"o{i}", reward=float(i), lengths=((4, 1),)) for i in range(2)]
    epo = learn([*empty, *one], "epo.coef=0.1")
    assert epo.moved and list(epo.history["turns"]) == ["0"]
    assert all(math.isfinite(v) for m in epo.metrics for v in m.values())


def test_a_second_entropy_bonus_is_refused(settings: Make) -> None:
    with pytest.raises(ConfigError, match="another") as caught:
        settings("grpo", "epo.coef=0.1", "loss.entropy_coef=0.1")
    assert "epo.coef" in caught.value.hint


def test_a_band_that_is_upside_down_is_refused(settings: Make) -> None:
    with pytest.raises(ConfigError, match="kappa_low 2 is above"):
        settings("grpo", "epo.kappa_low=2")


@pytest.mark.parametrize("behind", [1, 2])
def test_x16_a_resumed_run_goes_on_with_history_and_phase(train: Make, tmp_path: Path, behind: int) -> None:
    overrides = (
        "steps=5", "groups=2", "group_size=3", "env.kwargs.turns=2", "checkpoint_every=2", "epo.coef=0.1",
        "epo.kappa_low=1", "epo.kappa_high=1", "optimiser.lr=1e-2", "loss.kl_coef=0",
    )  # fmt: skip
    train(tmp_path / "whole", "grpo", *overrides)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", "grpo", *overrides, progress=Stop(step=behind))
    resume(tmp_path / "cut")
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    metrics = [own for _, own in sorted(load_metrics(tmp_path / "whole").items())]
    assert len({own["epo/beta"] for own in metrics}) == 5
    assert all(own["epo/penalty"] > 0 for own in metrics[1:])


def test_the_presets_differ_in_the_entropy_term_alone() -> None:
    need = ["env=agentgym.testing:EchoEnv", "model=none"]
    ppo, epo, plain = (
        launch.resolve(name, overrides=need)[1].model_dump() for name in ("ppo", "epo", "ppo_entropy")
    )
    assert epo.pop("epo")["coef"] == plain["loss"]["entropy_coef"] == 0.001
    plain["loss"]["entropy_coef"] = 0.0
    assert ppo.pop("epo") is None is plain.pop("epo") and ppo == plain == epo


def test_replays_of_spear_have_no_part_of_it(learn: Callable[..., Learned], groups: list[Trajectory]) -> None:
    """Its means are over what the present policy sampled, and a replay is a choice of earlier rows."""
    still = (
        "optimiser.lr=1e-30", "spear.buffer_size=2", "spear.warmup=0", "spear.trigger=0.1",
        "spear.minibatches=2",
    )  # fmt: skip
    alone, beside = learn(groups, *still), learn(groups, *still, "epo.coef=0.1")
    assert [m["sil/updates"] for m in beside.metrics] == [0, 2]
    assert len(beside.gradients) == 4
    assert not any(same([x], [y]) for x, y in zip(beside.gradients[:2], alone.gradients[:2], strict=True))
    assert same(beside.gradients[2:], alone.gradients[2:])
    assert beside.history["whole"][1] == 2
