"""PPO: advantages over sampled tokens, where rewards stand, both critics, what teaches nothing, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym import journal
from agentgym.errors import ConfigError
from agentgym.messages import TextPart
from agentgym.outcome import Outcome
from agentgym.trainers import launch
from agentgym.trainers.advantages import whiten
from agentgym.trainers.batch import rows
from agentgym.trainers.checkpoint import latest
from agentgym.trainers.collect import Collection
from agentgym.trainers.learner import Outputs
from agentgym.trainers.method import Step
from agentgym.trainers.metrics import load as load_metrics
from agentgym.trainers.policy_gradient import learn, switched_on
from agentgym.trainers.ppo import PPO, token_rewards
from agentgym.trainers.update import Reference, update
from agentgym.trajectory import Segment, Trajectory, Turn

from .test_resume import Interrupted, Stop, resume, state

Make = Callable[..., Any]
LAYOUTS = [((3, 2),), ((20, 6), (9, 3)), ((5, 0),), ((8, 1), (4, 4), (4, 1)), ((30, 12),), ((2, 3),)]
QUICK = ("optimiser.lr=1e-3", "minibatches=1")
SEPARATE, SHARED = CRITICS = ("ppo.critic=separate", "ppo.critic=shared")


@pytest.fixture
def episodes(make_trajectory: Make) -> list[Trajectory]:
    """Six tasks, of uneven lengths and turns, one completion empty."""
    rewards = [1.0, 0.0, 0.5, 0.25, 1.0, 0.0]
    return [make_trajectory(f"t{i}", group=i, reward=rewards[i], lengths=LAYOUTS[i]) for i in range(6)]


def episode(
    id: str, turns: Sequence[tuple[int, int, float]], *, one_row: bool, outcome: Outcome | None = None
) -> Trajectory:
    """Of ``(tokens read, tokens sampled, reward)`` turns, in one row or in one row a turn."""
    made, segments = [], [Segment()]
    for index, (read, sampled, reward) in enumerate(turns):
        if index and not one_row:
            segments.append(Segment())
        segments[-1].append_context([7 + index] * read)
        span = segments[-1].append_sampled([40 + index] * sampled, [-1.0] * sampled)
        made.append(Turn(index, len(segments) - 1, span, (TextPart("o"),), "c", "a", reward))
    return Trajectory(id, "e", "t", segments=segments, turns=made, outcome=outcome or Outcome.completed())


def step_of(trajectories: Sequence[Trajectory], rewards: Any = None) -> Step:
    collection = Collection.of(trajectories)
    assert collection.whole is not None
    rewards = collection.rewards if rewards is None else torch.tensor(rewards)
    return Step(0, collection, collection.whole, rewards, list(collection.rows))


def in_time(step: Step, tokens: torch.Tensor) -> list[list[float]]:
    """``[B, T-1]`` as one list a trajectory, of its sampled tokens in order."""
    owners = range(len(step.collection.trajectories))
    return [
        [x for row, own in enumerate(step.whole.trajectory.tolist()) if own == owner
         for x in tokens[row][step.whole.loss_mask[row]].tolist()]
        for owner in owners
    ]  # fmt: skip


class Foretold:
    """Stands where a learner is asked for values, and says the given ones in order of time."""

    def __init__(self, step: Step, values: Sequence[float]) -> None:
        self.step, self.values = step, values

    def judge(self, chosen: Any) -> Outputs:
        made = torch.full(self.step.whole.loss_mask.shape, math.nan, dtype=torch.float64)
        made[self.step.whole.loss_mask] = torch.tensor(self.values, dtype=torch.float64)
        return Outputs(None, value=made)


def of_critic(with_run: Make, folder: Path, step: Step, values: Sequence[float], *overrides: str) -> Any:
    """The advantages and returns that the method takes from a critic which says ``values``."""

    def use(config: Any, run: Any) -> Any:
        (method,) = switched_on(config, run)
        method.critic = Foretold(step, values)
        zeros = torch.zeros(step.whole.loss_mask.shape, dtype=torch.float64)
        return method.advantages(step, zeros), method.returns

    return with_run(folder, "ppo", use, "ppo.whiten=false", *overrides)


def quick(overrides: Sequence[str]) -> tuple[str, ...]:
    """``overrides`` over rates at which little data is enough; a shared critic has none of its own."""
    return (*QUICK, *(() if SHARED in overrides else ("ppo.optimiser.lr=1e-3",)), *overrides)


def updated(
    with_run: Make, folder: Path, batches: Sequence[Sequence[Trajectory]], *overrides: str
) -> dict[str, Any]:
    """Metrics of steps on the ``batches``, the method, and all weights before and after."""

    def weights(run: Any) -> dict[str, torch.Tensor]:
        both = {"policy": run.learner, **run.learners}
        return {f"{o}/{n}": w.detach().clone() for o, m in both.items() for n, w in m.trainable.items()}

    def use(config: Any, run: Any) -> Any:
        for trajectory in (t for batch in batches for t in batch):
            run.journal.begin(trajectory)
            run.journal.end(trajectory)
        methods = switched_on(config, run)
        before = weights(run)
        reference = Reference(run) if config.loss.kl_coef or config.kl_in_reward else None
        metrics = [
            learn(config, run, methods, Collection.of(batch), reference, number)
            for number, batch in enumerate(batches)
        ]
        after = weights(run)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        return {"metrics": metrics, "moved": moved, "after": after, "before": before}

    return with_run(folder, "ppo", use, *quick(overrides))


def finite(metrics: dict[str, float]) -> bool:
    return all(math.isfinite(value) and abs(value) < 1e6 for value in metrics.values())


# Where rewards stand


def test_every_turn_is_rewarded_on_its_last_token() -> None:
    turns = [(3, 2, 0.5), (4, 3, 0.0), (2, 1, 1.0)]
    for one_row in (True, False):
        step = step_of([episode("a", turns, one_row=one_row), episode("b", [(1, 2, 0.25)], one_row=True)])
        assert in_time(step, token_rewards(step)) == [[0, 0.5, 0, 0, 0, 1.0], [0, 0.25]]


def test_what_shaping_added_stands_on_the_last_turn() -> None:
    step = step_of([episode("a", [(3, 2, 0.5), (4, 2, 1.0)], one_row=True)], rewards=[0.75])
    assert in_time(step, token_rewards(step)) == [[0, 0.5, 0, 0.25]]


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([(3, 2, 0.5), (4, 0, 1.0)], [0, 1.5]),
        ([(3, 0, 0.5), (4, 3, 1.0)], [0.5, 0, 1.0]),
        ([(3, 0, 0.5), (1, 0, 0.25), (4, 1, 1.0), (1, 0, 2.0), (1, 0, 4.0), (1, 2, 8.0)], [7.75, 0, 8.0]),
    ],
)
@pytest.mark.parametrize("one_row", [True, False])
def test_a_turn_without_a_token_loses_no_reward(
    turns: list[tuple[int, int, float]], found: list[float], one_row: bool
) -> None:
    beside = [episode(name, [(2, 1, 0.125), (1, 0, 0.0)], one_row=one_row) for name in "xy"]
    step = step_of([beside[0], episode("a", turns, one_row=one_row), beside[1]])
    assert in_time(step, token_rewards(step)) == [[0.125], found, [0.125]]


TURN = st.tuples(st.integers(1, 3), st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.25, 1.0]))
EPISODE = st.tuples(st.lists(TURN, min_size=1, max_size=5), st.booleans(), st.booleans())


@settings(deadline=None, max_examples=150)
@given(st.lists(EPISODE, min_size=1, max_size=4), st.lists(st.sampled_from([0.0, -0.5, 2.0]), min_size=4))
def test_token_rewards_add_up_to_the_reward(drawn: Any, shaping: list[float]) -> None:
    lost = Outcome.infra_failed("sandbox")
    made = [
        episode(f"t{i}", turns, one_row=one_row, outcome=lost if failed else None)
        for i, (turns, one_row, failed) in enumerate(drawn)
    ]
    if not rows(made):
        return
    shaped = [t.reward + shaping[i] if t.valid else math.nan for i, t in enumerate(made)]
    step = step_of(made, rewards=shaped)
    found = in_time(step, token_rewards(step))
    assert not token_rewards(step)[~step.whole.loss_mask].any()
    for index, trajectory in enumerate(made):
        if trajectory.valid and trajectory.sampled_tokens:
            assert sum(found[index]) == pytest.approx(shaped[index])
        else:
            assert found[index] == []


# Advantages


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("read", [1, 9])
def test_x9_with_no_value_and_no_discount_the_advantage_is_the_reward(
    with_run: Make, tmp_path: Path, one_row: bool, read: int
) -> None:
    turns = [(read, 2, 0.0), (read, 3, 0.0), (read, 1, 0.7)]
    step = step_of([episode("a", turns, one_row=one_row)])
    advantages, returns = of_critic(with_run, tmp_path / "r", step, [0.0] * 6)
    assert in_time(step, advantages) == [pytest.approx([0.7] * 6, abs=1e-7)]
    assert in_time(step, returns) == [pytest.approx([0.7] * 6, abs=1e-7)]


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("turns", [[(2, 3, 1.0)], [(2, 1, 0.0), (5, 2, 1.0)], [(1, 2, 0.0), (3, 1, 1.0)]])
def test_golden_gae_through_rows_and_observations(
    with_run: Make, tmp_path: Path, turns: list[tuple[int, int, float]], one_row: bool
) -> None:
    step = step_of([episode("a", turns, one_row=one_row)])
    advantages, returns = of_critic(with_run, tmp_path / "r", step, [0.2, 0.4, 0.6], "ppo.lam=0.95")
    assert in_time(step, advantages) == [pytest.approx([0.751, 0.58, 0.4])]
    assert in_time(step, returns) == [pytest.approx([0.951, 0.98, 1.0])]


def test_the_penalty_of_every_token_is_in_its_return(with_run: Make, tmp_path: Path) -> None:
    step = step_of([episode("a", [(2, 2, 0.0), (3, 1, 1.0)], one_row=True)])
    step.divergence = torch.full(step.whole.loss_mask.shape, 0.5)
    _, returns = of_critic(with_run, tmp_path / "r", step, [0.0] * 3, "kl_in_reward=0.2")
    assert in_time(step, returns) == [pytest.approx([0.7, 0.8, 0.9])]


def test_rows_out_of_the_loss_are_not_in_the_whitening(
    with_run: Make, episodes: list[Trajectory], tmp_path: Path
) -> None:
    def use(config: Any, run: Any) -> Any:
        (method,) = switched_on(config, run)
        step = step_of(episodes)
        step.rows = [row for row in step.rows if row.trajectory != 4]
        return method.advantages(step, torch.zeros(step.whole.loss_mask.shape)), step

    advantages, step = with_run(tmp_path / "r", "ppo", use)
    kept = [x for owner, line in enumerate(in_time(step, advantages)) if owner != 4 for x in line]
    assert not any(in_time(step, advantages)[4])
    assert torch.tensor(kept).mean().item() == pytest.approx(0, abs=1e-6)
    assert torch.tensor(kept).std().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_first_advantages_are_whitened_returns(
    with_run: Make, episodes: list[Trajectory], tmp_path: Path, critic: str
) -> None:
    def use(config: Any, run: Any) -> Any:
        (method,) = switched_on(config, run)
        step = step_of(episodes)
        return method, step, method.advantages(step, torch.zeros(step.whole.loss_mask.shape))

    method, step, advantages = with_run(tmp_path / "r", "ppo", use, critic)
    mask = step.whole.loss_mask
    assert not method.values.any() and step.metrics["value/mean"] == 0
    returns = torch.where(mask, step.rewards[step.whole.trajectory][:, None], 0.0)
    assert torch.equal(method.returns, returns)
    assert torch.allclose(advantages, whiten(returns, mask), rtol=0, atol=1e-6)
    assert step.metrics["return/mean"] == pytest.approx(float(returns[mask].mean()))
    assert step.metrics["value/explained_variance"] == pytest.approx(0)


def test_the_journal_has_the_first_tokens_advantage(
    with_run: Make, episodes: list[Trajectory], tmp_path: Path
) -> None:
    updated(with_run, tmp_path / "r", [episodes])
    found = {
        record.trajectory_id: record.data["data"]["advantage"]
        for record in journal.read(tmp_path / "r")
        if record.type == "train" and record.trajectory_id
    }
    step = step_of(episodes)
    returns = torch.where(step.whole.loss_mask, step.rewards[step.whole.trajectory][:, None], 0.0)
    expected = in_time(step, whiten(returns, step.whole.loss_mask))
    assert found == {
        t.id: pytest.approx(line[0], abs=1e-6) if line else 0.0
        for t, line in zip(episodes, expected, strict=True)
    }


# Updates


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("epochs=2", "minibatches=2"),
        ("kl_in_reward=0.1", "loss.kl_coef=0.1", "loss.entropy_coef=0.01"),
        ("ppo.value_clip=0", "ppo.gamma=0.99", "ppo.lam=0.9", "ppo.whiten=false"),
        ("model.lora.rank=4", "loss.aggregation=seq-mean-token-sum"),
    ],
    ids=" ".join,
)
def test_every_path_makes_finite_updates(
    with_run: Make, episodes: list[Trajectory], tmp_path: Path, critic: str, overrides: tuple[str, ...]
) -> None:
    found = updated(with_run, tmp_path / "r", [episodes, episodes], critic, *overrides)
    first, last = found["metrics"]
    assert finite(first) and finite(last) and first.keys() == last.keys()
    assert last["updates_per_step"] == (4 if "epochs=2" in overrides else 1)
    assert last["skipped_updates"] == 0 and last["loss/value"] > 0 and last["value/mean"] != 0
    assert 0 <= last["clipfrac_value"] <= 1
    separate = critic == CRITICS[0]
    heads = {name for name in found["moved"] if "value_head" in name}
    assert {name.partition("/")[0] for name in heads} == {"critic" if separate else "policy"}
    assert {name.partition("/")[0] for name in found["moved"]} == (
        {"critic", "policy"} if separate else {"policy"}
    )
    if separate:
        assert last["critic/grad_norm"] > 0 and last["critic/skipped_updates"] == 0
    if "model.lora.rank=4" in overrides:
        assert all("lora_" in name or "value_head" in name for name in found["moved"])


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critic_learns_a_constant_return(
    with_run: Make, make_trajectory: Make, tmp_path: Path, critic: str
) -> None:
    alike = [make_trajectory(f"e{i}", group=i, reward=0.8, lengths=LAYOUTS[i]) for i in (0, 1, 3)]
    found = updated(
        with_run, tmp_path / "r", [alike] * 40, critic, "ppo.whiten=false", "optimiser.lr=3e-3",
        "ppo.value_coef=1" if critic == SHARED else "ppo.optimiser.lr=3e-3",
    )  # fmt: skip
    metrics = found["metrics"]
    assert metrics[0]["value/mean"] == 0 and metrics[0]["loss/value"] == pytest.approx(0.32)
    assert metrics[-1]["value/mean"] == pytest.approx(0.8, abs=0.05)
    assert metrics[-1]["loss/value"] < 0.01
    assert all("value/explained_variance" not in m and finite(m) for m in metrics)


def test_equal_returns_move_the_critic_and_not_the_policy(
    with_run: Make, make_trajectory: Make, tmp_path: Path
) -> None:
    alike = [make_trajectory(f"e{i}", group=i, reward=0.75, lengths=LAYOUTS[i]) for i in (0, 1, 3)]
    found = updated(with_run, tmp_path / "r", [alike])
    assert found["moved"] == {"critic/value_head.weight", "critic/value_head.bias"}
    (metrics,) = found["metrics"]
    assert metrics["adv/max"] == metrics["adv/min"] == metrics["updates_per_step"] == 0
    assert metrics["loss/value"] == pytest.approx(0.75**2 / 2)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(
    "turns",
    [[(3, 2, 1.0)], [(3, 1, 1.0)], [(3, 2, 0.0), (4, 0, 1.0)], [(3, 0, 1.0), (4, 2, 0.0)], [(3, 0, 1.0)]],
    ids=str,
)
def test_one_trajectory_is_finite(
    with_run: Make, tmp_path: Path, critic: str, turns: list[tuple[int, int, float]]
) -> None:
    alone = episode("a", turns, one_row=True)
    found = updated(with_run, tmp_path / "r", [[alone], [alone]], critic)
    assert all(finite(m) for m in found["metrics"])
    assert bool(found["moved"]) == bool(alone.sampled_tokens)


@pytest.mark.parametrize("critic", CRITICS)
def test_failed_trajectories_are_excluded(
    with_run: Make, make_trajectory: Make, episodes: list[Trajectory], tmp_path: Path, critic: str
) -> None:
    failed = make_trajectory("f", group=0, reward=99.0, outcome=Outcome.infra_failed("sandbox"))
    without = updated(with_run, tmp_path / "a", [episodes], critic)["after"]
    beside = updated(with_run, tmp_path / "b", [[failed, *episodes]], critic)["after"]
    assert all(torch.equal(without[name], beside[name]) for name in without)
    nothing = updated(with_run, tmp_path / "c", [[failed]], critic)
    assert not nothing["moved"] and nothing["metrics"] == [{"updates_per_step": 0.0}]


def test_in_the_warm_up_the_critic_learns_alone(
    with_run: Make, episodes: list[Trajectory], tmp_path: Path
) -> None:
    common = ("minibatches=3", "loss.kl_coef=0.1", "loss.entropy_coef=0.01")
    found = updated(with_run, tmp_path / "r", [episodes, episodes], "ppo.critic_warmup=2", *common)
    assert found["moved"] and all(name.startswith("critic/") for name in found["moved"])
    assert [m["updates_per_step"] for m in found["metrics"]] == [0, 0]
    assert found["metrics"][1]["loss/value"] > 0
    first = updated(with_run, tmp_path / "a", [episodes], "ppo.critic_warmup=1", *common)["after"]
    usual = updated(with_run, tmp_path / "b", [episodes], *common)["after"]
    critic = [name for name in first if name.startswith("critic/")]
    assert critic and all(torch.equal(first[name], usual[name]) for name in critic)
    later = updated(with_run, tmp_path / "c", [episodes, episodes], "ppo.critic_warmup=1", *common)
    assert any(name.startswith("policy/") for name in later["moved"])


@pytest.mark.parametrize("critic", CRITICS)
def test_no_split_changes_a_gradient(
    with_run: Make, episodes: list[Trajectory], tmp_path: Path, critic: str
) -> None:
    def use(config: Any, run: Any) -> Any:
        (method,) = switched_on(config, run)
        judged = method.critic or run.learner
        judged.model.double()
        judged.value_head.double()
        torch.nn.init.normal_(judged.value_head.weight, generator=torch.Generator().manual_seed(0))
        step = step_of(episodes)
        method.advantages(step, torch.zeros(step.whole.loss_mask.shape))
        method.values = method.values + 0.3 * torch.cos(
            torch.arange(method.values.numel()).view_as(method.values)
        )
        found: list[dict[str, Any]] = []

        def kept(chosen: Any, loss: Any, **options: Any) -> Any:
            judged.backward(chosen, loss)
            found.append({n: p.grad.clone() for n, p in judged.trainable.items() if p.grad is not None})
            return {"grad_norm": 0.0, "lr": 0.0, "skipped_updates": 0.0, "time/update": 0.0,
                    "loss/value": 0.0, "clipfrac_value": 0.0}  # fmt: skip

        judged.step = kept
        for budget, chosen in ((10**6, step.rows), (1, step.rows), (40, step.rows[::-1])):
            judged._optimiser_section = judged._optimiser_section.model_copy(
                update={"micro_batch_tokens": budget}
            )
            if method.critic is not None:
                method.after_update(step, chosen)
                continue
            step.rows = chosen
            tokens = torch.sin(torch.arange(method.values.numel(), dtype=torch.float64)).view_as(
                method.values
            )
            update(run, [method], step, tokens, loss=config.loss, correction=config.correction,
                   epochs=1, minibatches=1)  # fmt: skip
        return found

    whole, *others = with_run(
        tmp_path / "r", "ppo", use, critic, *(["ppo.value_coef=0.7"] if critic == SHARED else [])
    )
    largest = max(float(g.abs().max()) for g in whole.values())
    assert largest > 0 and any("value_head" in name for name in whole) and len(whole) > 2
    for other in others:
        assert whole.keys() == other.keys()
        for name in whole:
            assert float((whole[name] - other[name]).abs().max()) <= 1e-9 * largest, name


# Settings and whole runs


@pytest.mark.parametrize(
    ("name", "overrides", "match"),
    [
        ("grpo", ("estimator=gae",), "from a critic"),
        ("ppo", ("estimator=grpo",), "has no critic"),
        ("ppo", ("ppo.critic=shared", "ppo.critic_warmup=3"), "trunk"),
        ("ppo", ("ppo.optimiser.micro_batch_tokens=512",), "micro-batches"),
        ("ppo", ("gigpo.omega=1.0",), "cannot be combined with gigpo"),
    ],
)
def test_settings_that_contradict_are_refused(
    settings: Make, name: str, overrides: tuple[str, ...], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        launch.resolve(name, overrides=["env=agentgym.testing:EchoEnv", "model=tiny", *overrides])


def test_the_preset_has_the_usual_numbers() -> None:
    _, config = launch.resolve(
        "ppo", overrides=["env=agentgym.testing:EchoEnv", "model=tiny", "ppo.optimiser.warmup_updates=5"]
    )
    assert (config.ppo.gamma, config.ppo.lam, config.ppo.value_clip) == (1, 1, 0.5)
    assert config.ppo.optimiser.lr == 1e-5 and config.ppo.optimiser.warmup_updates == 5
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.kl_coef) == (0.2, 0.2, 0)
    assert (config.epochs, config.minibatches, config.group_size) == (1, 4, 1)
    assert config.learner_heads == "policy" and set(PPO.refuses) == {"gigpo", "igpo", "spear"}


@pytest.mark.parametrize("critic", [(CRITICS[0], "ppo.critic_warmup=1"), (CRITICS[1],)], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(
    train: Make, tmp_path: Path, critic: tuple[str, ...]
) -> None:
    overrides = (
        *quick(critic), "steps=4", "groups=4", "minibatches=2", "env.kwargs.turns=2", "checkpoint_every=1",
        "env.invalid_penalty=0.1", "env.parser=tags", "model.lora.rank=2", "model.lora.dropout=0.1",
        *(["ppo.optimiser.schedule=linear"] if SEPARATE in critic else []),
    )  # fmt: skip
    train(tmp_path / "whole", "ppo", *overrides)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", "ppo", *overrides, progress=Stop(step=1))
    resume(tmp_path / "cut")
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    saved = latest(tmp_path / "whole" / "checkpoints")
    assert saved is not None
    assert (saved.folder / "critic-weights.safetensors").exists() == (critic[0] == CRITICS[0])


def test_reward_rises(train: Make, tmp_path: Path) -> None:
    start = train(
        tmp_path / "c", "cloning", "steps=26", "demonstrations=16", "batch_rows=8", "optimiser.lr=3e-3"
    )
    train(
        tmp_path / "p", "ppo", f"model={start}", "steps=40", "groups=32", "minibatches=1",
        "optimiser.lr=1e-3", "ppo.optimiser.lr=1e-3",
    )  # fmt: skip
    found = list(load_metrics(tmp_path / "p").values())
    scores = [m["score/mean"] for m in found]
    assert sum(scores[-8:]) / 8 > sum(scores[:8]) / 8 + 0.2
