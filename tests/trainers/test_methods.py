"""What holds for every preset and every method: reduction to the base, exact resume, degenerate batches."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agentgym.errors import ConfigError
from agentgym.messages import TextPart
from agentgym.outcome import Outcome
from agentgym.trainers import launch, update
from agentgym.trainers.collect import Collection
from agentgym.trainers.learner import Outputs
from agentgym.trainers.method import Method, Step
from agentgym.trainers.policy_gradient import METHODS, learn, switched_on
from agentgym.trajectory import Trajectory

from .test_resume import Interrupted, Stop, resume, state

Make = Callable[..., Any]
LAYOUTS = [((3, 2),), ((20, 6), (9, 3)), ((5, 0),), ((8, 1), (4, 4), (4, 1)), ((30, 12),), ((2, 3),)]
PLAIN = ("loss.kl_coef=0", "optimiser.lr=1e-3")
# Answers by task id are what IGPO needs, and EchoEnv's tasks have none: tests of its own train it.
TRAINED = sorted({*launch.presets()} - {"pocket", "igpo"})


@pytest.fixture
def groups(make_trajectory: Make) -> list[Trajectory]:
    """Two groups of three, of uneven lengths and turns, one completion empty."""
    rewards = [1.0, 0.0, 0.5, 0.0, 1.0, 0.0]
    return [make_trajectory(f"t{i}", group=i // 3, reward=rewards[i], lengths=LAYOUTS[i]) for i in range(6)]


def learned(
    with_run: Make,
    folder: Path,
    batches: Sequence[Sequence[Trajectory]],
    *overrides: str,
    name: str = "grpo",
    added: Sequence[str] = (),
    double: bool = False,
) -> Any:
    """Metrics of the last of several steps on the ``batches``, and the weights before and after."""

    def use(config: Any, run: Any) -> Any:
        if double:
            run.learner.model.double()
        for trajectory in itertools.chain.from_iterable(batches):
            run.journal.begin(trajectory)
            run.journal.end(trajectory)
        methods = switched_on(config, run)
        before = {n: w.clone() for n, w in run.learner.weights()}
        metrics = {}
        for number, batch in enumerate(batches):
            metrics = learn(config, run, methods, Collection.of(batch), None, number)
        return metrics, before, {n: w.clone() for n, w in run.learner.weights()}

    return with_run(folder, name, use, *PLAIN, *overrides)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def half_cloned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that wins some episodes of EchoEnv: from a random one every reward of a group is equal."""
    algorithm, config = launch.resolve(
        "cloning",
        overrides=[
            "env=agentgym.testing:EchoEnv", "env.kwargs.words=2", f"model={tiny_model}", "trackers=[]",
            "steps=26", "demonstrations=16", "batch_rows=8", "optimiser.lr=3e-3", "rollout.max_tokens=4",
            "model.autocast=none", "checkpoint_every=0",
        ],
    )  # fmt: skip
    return launch.launch(algorithm, config, tmp_path_factory.mktemp("half-cloned") / "run")


@pytest.mark.parametrize("name", TRAINED)
def test_every_preset_resumes_exactly(train: Make, half_cloned: Path, tmp_path: Path, name: str) -> None:
    """X16: counters, schedules, buffers, histories and critics go on where they stopped."""
    settings = [
        f"model={half_cloned}", "steps=4", "optimiser.lr=1e-3", "checkpoint_every=1", "groups=4",
        "group_size=4", "loss.kl_coef=0.01", "evaluation.every=3", "evaluation.episodes=4",
    ]  # fmt: skip
    if name == "dr_grpo":
        settings.append("loss.length_norm=16")
    if name == "drbot":
        settings += ["filters.overlong=false", "filters.incomplete=false"]
    if name == "spear":
        settings += ["spear.buffer_size=2", "spear.warmup=2", "spear.trigger=1.0"]
    train(tmp_path / "whole", name, *settings)
    whole = state(tmp_path / "whole")
    assert all(math.isfinite(v) for metrics in whole[2] for v in metrics.values() if v is not None)
    assert any(metrics["updates_per_step"] for metrics in whole[2])
    assert any(metrics.get("adv/max", 0) > 0 for metrics in whole[2])
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", name, *settings, progress=Stop(step=1))
    resume(tmp_path / "cut")
    assert state(tmp_path / "cut") == whole


class Idle(Method):
    """A method that leaves every hook alone."""

    name = "idle"


def test_a_method_that_does_nothing_changes_nothing(
    with_run: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    def use(idle: bool) -> Callable[[Any, Any], Any]:
        def inner(config: Any, run: Any) -> Any:
            methods = [Idle(config, run)] if idle else []
            learn(config, run, methods, Collection.of(groups), None, 0)
            return {n: w.clone() for n, w in run.learner.weights()}

        return inner

    def journalled(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def inner(config: Any, run: Any) -> Any:
            for trajectory in groups:
                run.journal.begin(trajectory)
                run.journal.end(trajectory)
            return fn(config, run)

        return inner

    one = with_run(tmp_path / "a", "grpo", journalled(use(False)), *PLAIN)
    other = with_run(tmp_path / "b", "grpo", journalled(use(True)), *PLAIN)
    assert equal(one, other)


def test_x13_gigpo_without_omega_is_grpo_bit_for_bit(
    with_run: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    _, before, base = learned(with_run, tmp_path / "a", [groups, groups])
    _, _, same = learned(with_run, tmp_path / "b", [groups, groups], "gigpo.omega=0")
    _, _, other = learned(with_run, tmp_path / "c", [groups, groups], "gigpo.omega=1")
    assert equal(base, same) and not equal(base, before) and not equal(base, other)


def test_x13_distinct_observations_have_no_step_part(
    with_run: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    from dataclasses import replace

    for trajectory in groups:
        trajectory.turns = [
            replace(t, observation=(TextPart(f"{trajectory.id} {t.index}"),)) for t in trajectory.turns
        ]
    metrics, _, base = learned(with_run, tmp_path / "a", [groups])
    metrics, _, same = learned(with_run, tmp_path / "b", [groups], "gigpo.omega=1")
    assert equal(base, same) and metrics["gigpo/alone_frac"] == 1


def test_s12_filtered_rows_have_no_gradient_and_are_in_no_denominator(
    with_run: Make, make_trajectory: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    from dataclasses import replace

    cut = make_trajectory("cut", group=5, reward=0.5, lengths=((4, 6),))
    other = make_trajectory("other", group=5, reward=0.5, lengths=((4, 6),))
    for trajectory in (cut, other):
        trajectory.turns = [replace(t, finish_reason="length") for t in trajectory.turns]
    bonus = ("loss.entropy_coef=0.1", "rollout.max_tokens=64")
    _, _, without = learned(with_run, tmp_path / "a", [groups], *bonus)
    metrics, _, filtered = learned(
        with_run, tmp_path / "b", [[*groups, cut, other]], *bonus, "filters.groups=1.0"
    )
    assert metrics["filter/overlong"] == 2 == metrics["filter/rows_out"]
    assert equal(without, filtered)


def test_s13_the_group_filter_drops_whole_groups(
    with_run: Make, make_trajectory: Make, groups: list[Trajectory], tmp_path: Path
) -> None:
    even = [make_trajectory(f"e{i}", group=7, reward=0.3, lengths=((6, 3),)) for i in range(3)]
    metrics, _, _ = learned(with_run, tmp_path / "a", [[*groups, *even]], "filters.groups=0.75")
    assert metrics["filter/groups_kept"] == 2 and metrics["rows_skipped"] == 0


@pytest.mark.parametrize("kind", ["clip", "kl"])
def test_covariance_selects_in_every_minibatch(
    with_run: Make, groups: list[Trajectory], tmp_path: Path, kind: str
) -> None:
    own = {"clip": "loss.covariance.low=0.0", "kl": "loss.covariance.coef=5.0"}[kind]
    settings = (f"loss.covariance.kind={kind}", "loss.covariance.fraction=0.3", own)
    metrics, before, after = learned(
        with_run, tmp_path / "a", [groups], *settings, "minibatches=2", "epochs=2"
    )
    _, _, plain = learned(with_run, tmp_path / "b", [groups], "minibatches=2", "epochs=2")
    assert 0 < metrics["cov_masked_frac"] <= 0.5
    assert not equal(after, before) and not equal(after, plain)


@pytest.mark.parametrize("budget", [16, 64, 4096])
@pytest.mark.parametrize("with_", ["gigpo", "loss.covariance.low=0.0"])
def test_x2_micro_batches_change_no_update_of_a_method(
    with_run: Make, groups: list[Trajectory], tmp_path: Path, with_: str, budget: int
) -> None:
    settings = ["gigpo.omega=1" if with_ == "gigpo" else with_]
    weights = []
    for place, tokens in enumerate((4096, budget)):
        _, before, after = learned(
            with_run, tmp_path / str(place), [groups], *settings, f"optimiser.micro_batch_tokens={tokens}",
            "optimiser.eps=1.0", double=True,
        )  # fmt: skip
        weights.append({n: after[n] - before[n] for n in before})
    largest = max(float(w.abs().max()) for w in weights[0].values())
    assert largest > 0
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-6 * largest), name


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_x2_two_ranks_average_to_the_gradient_of_one(
    make_learner: Make, groups: list[Trajectory], mode: str
) -> None:
    from agentgym.trainers.aggregation import Denominators
    from agentgym.trainers.policy_loss import PolicyLossConfig, policy_loss

    config = PolicyLossConfig(aggregation=mode)  # type: ignore[arg-type]
    rows = Collection.of(groups).rows
    lengths = torch.tensor([row.sampled for row in rows])

    def gradient(parts: Sequence[Sequence[Any]]) -> dict[str, Any]:
        learner = make_learner(torch.float64)
        total: dict[str, Any] = {}
        for part in parts:
            denominators = Denominators.of(lengths, world_size=len(parts))

            def loss(batch: Any, outputs: Outputs, d: Denominators = denominators) -> Any:
                gain = torch.cos(batch.row.double())[:, None].expand_as(outputs.log_probs)
                old = outputs.log_probs.detach() - 0.05
                return policy_loss(
                    outputs.log_probs, old, gain, batch.loss_mask, config=config, denominators=d
                )[0], {}

            learner.backward(part, loss)
            for name, parameter in learner.trainable.items():
                total[name] = total.get(name, 0) + parameter.grad.clone() / len(parts)
        return total

    one, two = gradient([rows]), gradient([rows[:2], rows[2:]])
    largest = max(float(g.abs().max()) for g in one.values())
    # transformers' norms round to fp32 whatever the model is
    assert all(torch.allclose(one[n], two[n], rtol=0, atol=1e-6 * largest) for n in one)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"igpo", "ppo"}))
@pytest.mark.parametrize("case", ["all equal", "one member", "all failed", "empty completion", "one turn"])
def test_degenerate_batches(
    with_run: Make, make_trajectory: Make, tmp_path: Path, method: str, case: str
) -> None:
    lost = Outcome.infra_failed("environment")
    batch = {
        "all equal": [make_trajectory(f"e{i}", reward=2.4, lengths=((4, 3),)) for i in range(4)],
        "one member": [make_trajectory("one", reward=1.0)],
        "all failed": [make_trajectory(f"f{i}", outcome=lost) for i in range(3)],
        "empty completion": [make_trajectory(f"n{i}", reward=float(i), lengths=((4, 0),)) for i in range(2)],
        "one turn": [make_trajectory(f"s{i}", reward=float(i)) for i in range(3)],
    }[case]
    section = {"gigpo": "gigpo.omega=1", "spear": "spear.c_sil=1.0", "epo": "epo.coef=0.001"}[method]
    metrics, before, after = learned(with_run, tmp_path / "r", [batch, batch], section)
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    assert all(bool(w.isfinite().all()) for w in after.values())
    if case in ("all failed", "empty completion") or (
        method != "epo" and case in ("all equal", "one member")
    ):
        assert equal(before, after)
    else:
        assert not equal(before, after)


@pytest.mark.parametrize(
    ("name", "added"),
    [("ppo", ["gigpo"]), ("ppo", ["spear"]), ("ppo", ["igpo"]), ("gigpo", ["igpo"])],
)
def test_methods_that_do_not_go_together_are_refused_with_a_reason(name: str, added: list[str]) -> None:
    if not {name, *added} <= {*METHODS}:
        pytest.skip(f"{added[0]} is not installed")
    with pytest.raises(ConfigError) as caught:
        launch.resolve(name, overrides=["env=agentgym.testing:EchoEnv", "model=tiny"], added=added)
    assert len(str(caught.value)) > 60


def test_methods_compose(with_run: Make, groups: list[Trajectory], tmp_path: Path) -> None:
    metrics, before, after = learned(
        with_run,
        tmp_path / "r",
        [groups, groups, groups],
        "gigpo.omega=1",
        "spear.c_sil=1.0",
        "epo.coef=0.01",
    )
    assert not equal(before, after) and metrics["updates_per_step"] >= 1
    assert {"gigpo/alone_frac"} <= metrics.keys()


def test_a_step_knows_its_rows(groups: list[Trajectory]) -> None:
    collection = Collection.of(groups)
    assert collection.whole is not None
    step = Step(0, collection, collection.whole, collection.rewards, list(collection.rows))
    assert step.metrics == {} and update.split(step.rows, 2, 0) != []
    units = collection.units
    assert units.trajectory.tolist() == [0, 1, 1, 2, 3, 3, 3, 4, 5]
    assert units.turn.tolist() == [0, 0, 1, 0, 0, 1, 2, 0, 0]
    for row in collection.rows:
        for index, start, end in row.turns:
            unit = units.index[row.index, start - 1 : end - 1]
            assert bool((units.trajectory[unit] == row.trajectory).all()) and bool(
                (units.turn[unit] == index).all()
            )


PAGES = sorted((Path(__file__).parents[2] / "docs" / "algorithms").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_that_the_pages_name_are_accepted(page: Path) -> None:
    """``section.key=a|b`` in a page's text: each value resolves, over the page's own preset."""
    name = page.stem if page.stem in launch.presets() else "grpo"
    for key, values in re.findall(r"`(\w+\.[\w.]+)=([^\s`]+)`", page.read_text()):
        for value in values.split("|"):
            launch.resolve(name, overrides=["env=agentgym/SearchQA-v0", "model=m", f"{key}={value}"])
