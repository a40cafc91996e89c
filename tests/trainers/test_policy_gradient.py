"""GRPO and its relatives as one run: identities, what teaches nothing, what is excluded, learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agentgym import journal
from agentgym.errors import ConfigError
from agentgym.outcome import Outcome
from agentgym.trainers import policy_gradient, update
from agentgym.trainers.collect import Collection
from agentgym.trainers.method import Step
from agentgym.trainers.metrics import load as load_metrics
from agentgym.trajectory import Trajectory

Make = Callable[..., Any]
LAYOUTS = [((3, 2),), ((20, 6), (9, 3)), ((5, 0),), ((8, 1), (4, 4), (4, 1)), ((30, 12),), ((2, 3),)]


@pytest.fixture
def groups(make_trajectory: Make) -> list[Trajectory]:
    """Two groups of three, of uneven lengths and turns, one completion empty."""
    rewards = [1.0, 0.0, 0.5, 0.0, 1.0, 0.0]
    return [make_trajectory(f"t{i}", group=i // 3, reward=rewards[i], lengths=LAYOUTS[i]) for i in range(6)]


def updated(with_run: Make, folder: Path, trajectories: Sequence[Trajectory], *overrides: str) -> Any:
    """Metrics of one update on ``trajectories``, and the weights before and after."""

    def use(config: Any, run: Any) -> Any:
        for trajectory in trajectories:
            run.journal.begin(trajectory)
            run.journal.end(trajectory)
        before = {n: w.clone() for n, w in run.learner.weights()}
        reference = update.Reference(run) if config.loss.kl_coef or config.kl_in_reward else None
        methods = policy_gradient.switched_on(config, run)
        collection = Collection.of(trajectories)
        metrics = policy_gradient.learn(config, run, methods, collection, reference, 0)
        return metrics, before, {n: w.clone() for n, w in run.learner.weights()}

    return with_run(folder, "grpo", use, "loss.kl_coef=0", "optimiser.lr=1e-3", *overrides)


def token_advantages(config: Any, collection: Collection) -> torch.Tensor:
    assert collection.whole is not None
    step = Step(0, collection, collection.whole, collection.rewards, list(collection.rows))
    return policy_gradient.advantages(config, step)[1]


def moved(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_on_policy_the_ratio_is_one(with_run: Make, groups: list[Trajectory], tmp_path: Path) -> None:
    metrics, before, after = updated(with_run, tmp_path / "r", groups)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == metrics["ratio_min"] == 1
    assert metrics["approx_kl"] == metrics["clipfrac_low"] == metrics["clipfrac_high"] == 0
    assert metrics["updates_per_step"] == 1 and moved(before, after)


def test_on_policy_old_log_probs_change_nothing(
    with_run: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    def use(config: Any, run: Any) -> Any:
        collection = Collection.of(groups)
        tokens = token_advantages(config, collection)
        found = []
        for old in (None, run.learner.score(collection.rows)):
            loss, _ = update.make_loss(
                collection.rows, tokens, loss=config.loss, correction=config.correction, old=old
            )
            run.learner.backward(collection.rows, loss)
            found.append([p.grad.clone() for p in run.learner.trainable.values()])
        return found

    first, second = with_run(tmp_path / "r", "grpo", use, "loss.kl_coef=0")
    largest = max(float(g.abs().max()) for g in first)
    assert largest > 0
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_rows_that_are_skipped_change_no_gradient(
    with_run: Make, make_trajectory: Make, groups: list[Trajectory], tmp_path: Path, mode: str
) -> None:
    equal = [make_trajectory(f"e{i}", group=9, reward=1.0, lengths=((6, 5),)) for i in range(3)]

    def use(config: Any, run: Any) -> Any:
        run.learner.model.double()
        collection = Collection.of([*groups, *equal])
        tokens = token_advantages(config, collection)
        live = [row for row in collection.rows if tokens[row.index].any()]
        assert len(live) == len(collection.rows) - 3
        found = []
        for chosen in (collection.rows, live):
            loss, _ = update.make_loss(
                collection.rows, tokens, loss=config.loss, correction=config.correction, old=None
            )
            run.learner.backward(chosen, loss)
            found.append([p.grad.clone() for p in run.learner.trainable.values()])
        return found

    full, skipped = with_run(tmp_path / "r", "grpo", use, "loss.kl_coef=0", f"loss.aggregation={mode}")
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(full, skipped, strict=True))


def test_rows_that_only_the_kl_of_covariance_acts_on_are_not_skipped(
    with_run: Make, make_trajectory: Make, tmp_path: Path
) -> None:
    rewards = [1.0, 0.0, 0.5, 0.3, 0.3, 0.3]
    both = [
        make_trajectory(f"t{i}", group=i // 3, reward=rewards[i], lengths=((3 + i, 4 + i),)) for i in range(6)
    ]
    held = ("loss.covariance.kind=kl", "loss.covariance.fraction=1.0", "epochs=2")
    metrics, _, after = updated(with_run, tmp_path / "r", both, *held)
    # An entropy coefficient too small to tell has every row computed.
    _, _, whole = updated(with_run, tmp_path / "s", both, *held, "loss.entropy_coef=1e-30")
    assert metrics["rows_skipped"] < 3
    assert all(torch.allclose(after[name], whole[name], rtol=0, atol=1e-6) for name in after)


def test_equal_rewards_change_nothing(with_run: Make, make_trajectory: Make, tmp_path: Path) -> None:
    equal = [make_trajectory(f"e{i}", group=i // 2, reward=float(i // 2)) for i in range(4)]
    metrics, before, after = updated(with_run, tmp_path / "r", equal)
    assert metrics["updates_per_step"] == 0 and metrics["rows_skipped"] == 4
    assert metrics["groups_all_equal_frac"] == 1 and not moved(before, after)


def test_skipped_rows_dilute_no_mean(
    with_run: Make, make_trajectory: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    equal = [make_trajectory(f"e{i}", group=9, reward=1.0) for i in range(2)]
    metrics, _, _ = updated(with_run, tmp_path / "r", [*groups, *equal], "correction.rule=truncate")
    live, _, _ = updated(with_run, tmp_path / "s", groups, "correction.rule=truncate")
    assert metrics["rows_skipped"] >= 2 and metrics["ratio_mean"] == pytest.approx(1)
    assert metrics["weight_mean"] == pytest.approx(live["weight_mean"])


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo"])
def test_one_member_has_no_advantage(
    with_run: Make, make_trajectory: Make, tmp_path: Path, estimator: str
) -> None:
    metrics, before, after = updated(
        with_run, tmp_path / "r", [make_trajectory("one", reward=1.0)], f"estimator={estimator}"
    )
    assert not moved(before, after) and metrics["updates_per_step"] == 0


def test_failed_members_are_excluded(
    with_run: Make, make_trajectory: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    failed = make_trajectory("f", group=0, reward=99.0, outcome=Outcome.infra_failed("sandbox"))
    _, _, without = updated(with_run, tmp_path / "a", groups)
    _, _, beside = updated(with_run, tmp_path / "b", [failed, *groups])
    assert not moved(without, beside)


@pytest.mark.parametrize("failed", [True, False])
def test_nothing_valid_is_no_update_and_no_nan(
    with_run: Make, make_trajectory: Make, tmp_path: Path, failed: bool
) -> None:
    outcome = Outcome.infra_failed("environment")
    lost = [make_trajectory(f"f{i}", outcome=outcome) for i in range(3)] if failed else []
    metrics, before, after = updated(with_run, tmp_path / "r", lost)
    assert metrics == {"updates_per_step": 0.0} and not moved(before, after)


@pytest.mark.parametrize(
    "overrides",
    [
        ("epochs=2", "minibatches=2"),
        ("loss.kl_coef=0.1",),
        ("estimator=reinforce++", "kl_in_reward=0.1"),
        ("estimator=reinforce++-baseline",),
        ("estimator=rloo", "loss.aggregation=seq-mean-token-sum"),
        ("correction.rule=truncate",),
        ("loss.entropy_coef=0.01",),
        ("overlong.max_length=12", "overlong.cache=8"),
        ("model.lora.rank=4",),
    ],
    ids=" ".join,
)
def test_every_path_makes_finite_updates(
    with_run: Make, groups: list[Trajectory], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    metrics, before, after = updated(with_run, tmp_path / "r", groups, *overrides)
    assert all(value == value and abs(value) < 1e6 for value in metrics.values()), metrics
    assert metrics["updates_per_step"] == (4 if "epochs=2" in overrides else 1)
    assert metrics["skipped_updates"] == 0 and moved(before, after)
    if "epochs=2" in overrides:
        assert metrics["ratio_max"] != 1 and metrics["approx_kl"] != 0
    if "loss.kl_coef=0.1" in overrides:
        assert metrics["kl_ref"] == pytest.approx(0, abs=1e-6)


def test_advantages_are_in_the_journal(with_run: Make, groups: list[Trajectory], tmp_path: Path) -> None:
    updated(with_run, tmp_path / "r", groups)
    found = {
        record.trajectory_id: record.data["data"]["advantage"]
        for record in journal.read(tmp_path / "r")
        if record.type == "train" and record.trajectory_id
    }
    assert list(found) == [t.id for t in groups]
    assert found["t0"] > 0 > found["t1"]
    assert sum(list(found.values())[:3]) == pytest.approx(0, abs=1e-5)


def test_kl_in_reward_needs_token_rewards(train: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token rewards"):
        train(tmp_path / "r", "grpo", "kl_in_reward=0.1", "steps=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("filter_groups=true",), "filter_groups drops groups of equal rewards"),
        (("filters.overlong=true",), "filters.groups 0.75"),
    ],
)
def test_groups_of_one_cannot_be_compared_by_spread(
    settings: Make, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings("ppo", *overrides)
    assert "group_size" in caught.value.hint
    settings("ppo", *overrides, "group_size=2")
    settings("ppo", "filters.groups=1")


@pytest.mark.parametrize(
    "override",
    [
        "optimiser.betas=[2,0.9]",
        "optimiser.eps=-1",
        "optimiser.weight_decay=-1",
        "overlong={max_length=5,cache=10}",
    ],
)
def test_numbers_that_cannot_be_are_refused_before_the_run(settings: Make, override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0].partition(".")[2] or "cache"):
        settings("grpo", override)


def test_times_of_optimiser_steps_add_up() -> None:
    steps = [{"time/critic": 1.0, "time/update": 2.0, "lr": 3.0}] * 2
    assert update.over_updates(steps) == {"time/critic": 2.0, "time/update": 4.0, "lr": 3.0}


def test_filtering_every_group_ends(train: Make, tmp_path: Path) -> None:
    train(tmp_path / "r", "dapo", "steps=2", "groups=2", "group_size=2", "filter_rounds=3")
    metrics = load_metrics(tmp_path / "r")
    assert [m["updates_per_step"] for m in metrics.values()] == [0, 0]
    assert [m["episodes"] for m in metrics.values()] == [12, 12]
    trained = [t for t in journal.load(tmp_path / "r").values()]
    assert len({t.group for t in trained}) == 12


def test_reward_rises(train: Make, tmp_path: Path) -> None:
    start = train(
        tmp_path / "c", "cloning", "steps=26", "demonstrations=16", "batch_rows=8", "optimiser.lr=3e-3"
    )
    train(
        tmp_path / "g", "grpo", f"model={start}", "steps=40", "groups=4", "group_size=8",
        "optimiser.lr=1e-3", "loss.kl_coef=0",
    )  # fmt: skip
    scores = [m["score/mean"] for m in load_metrics(tmp_path / "g").values()]
    assert sum(scores[-8:]) / 8 > sum(scores[:8]) / 8 + 0.2
