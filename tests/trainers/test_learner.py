"""The learner: gradients that no split changes, adapters, schedules, exact log-probs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agentgym.errors import UsageError
from agentgym.trainers.aggregation import AGGREGATION_MODES, Denominators
from agentgym.trainers.batch import collate, rows
from agentgym.trainers.policy_loss import PolicyLossConfig, policy_loss

Make = Callable[..., Any]


@pytest.fixture
def uneven(make_trajectory: Make) -> list[Any]:
    """Rows of 7 trajectories of 1 to 3 turns, 4 to 60 tokens each."""
    shapes = [((3, 1),), ((20, 9), (31, 4)), ((5, 5),), ((40, 20),), ((8, 2), (9, 3), (50, 1)), ((4, 30),)]
    return rows([make_trajectory(f"t{i}", lengths=shape) for i, shape in enumerate(shapes)])


def surrogate(chosen: list[Any], mode: str) -> Any:
    norm = 16.0 if mode == "seq-mean-token-sum-norm" else None
    config = PolicyLossConfig(aggregation=mode, length_norm=norm, kl_coef=0.1, entropy_coef=0.01)
    denominators = Denominators.of(torch.tensor([row.sampled for row in chosen]), length_norm=16.0)

    def loss(batch: Any, outputs: Any) -> Any:
        logp, entropy, _ = outputs
        advantages = torch.cos(batch.row.double())[:, None].expand_as(logp).to(logp.dtype)
        old = (logp - 0.1 * torch.sin(batch.targets.to(logp.dtype))).detach()
        value, _ = policy_loss(
            logp, old, advantages, batch.loss_mask, config=config, denominators=denominators,
            logp_ref=old, entropy=entropy,
        )  # fmt: skip
        return value, {}

    return loss


def gradient(learner: Any, chosen: list[Any], mode: str) -> dict[str, Any]:
    learner.backward(chosen, surrogate(chosen, mode), with_entropy=True)
    return {name: p.grad.clone() for name, p in learner.trainable.items()}


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_no_split_changes_a_gradient(make_learner: Make, uneven: list[Any], mode: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        whole = gradient(make_learner(dtype, micro_batch_tokens=10**6), uneven, mode)
        largest = max(float(g.abs().max()) for g in whole.values())
        assert largest > 0
        for budget in (1, 90):
            split = gradient(make_learner(dtype, micro_batch_tokens=budget), uneven[::-1], mode)
            for name in whole:
                assert float((whole[name] - split[name]).abs().max()) <= tolerance * largest, (budget, name)


def test_no_split_changes_the_updated_weights(make_learner: Make, uneven: list[Any]) -> None:
    first, second = (make_learner(torch.float64, micro_batch_tokens=n) for n in (10**6, 1))
    for learner in (first, second):
        for _ in range(3):
            learner.step(uneven, surrogate(uneven, "token-mean"), with_entropy=True)
    for name, weight in first.trainable.items():
        assert torch.allclose(weight, second.trainable[name], rtol=0, atol=1e-9), name


def test_equal_rows_are_read_once_and_count_each(make_learner: Make, make_trajectory: Make) -> None:
    members = [make_trajectory(name, lengths=((20, 3), (30, 2))) for name in ("a", "a", "b", "a")]
    many, learner, whole = rows(members), make_learner(torch.float64), make_learner(torch.float64)
    seen: list[int] = []
    learner.model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel())
    )
    together = gradient(learner, many, "seq-mean-token-sum")
    assert sum(seen) == sum(map(len, many)) / 2 and len(many) == 8
    loss = surrogate(many, "seq-mean-token-sum")
    for row in many:  # each by itself, added up
        batch = collate([row])
        loss(batch, whole.forward(batch, with_entropy=True))[0].backward()
    for name, parameter in whole.trainable.items():  # transformers' norms round to fp32 whatever the model is
        assert torch.allclose(together[name], parameter.grad, rtol=0, atol=1e-6), name


def test_log_probs_are_those_of_full_logits(make_learner: Make, uneven: list[Any]) -> None:
    learner = make_learner(torch.float64)
    batch = collate(uneven)
    logp, entropy, _ = learner.forward(batch, with_entropy=True)
    full = learner.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    exact = full[:, :-1].log_softmax(-1)
    chosen = exact.gather(2, batch.targets[..., None])[..., 0]
    assert torch.allclose(logp, torch.where(batch.loss_mask, chosen, 0.0), atol=1e-9)
    own = -(exact.exp() * exact).sum(-1)
    assert torch.allclose(entropy, torch.where(batch.loss_mask, own, 0.0), atol=1e-9)
    assert torch.allclose(learner.score(uneven), logp, atol=1e-9)


def test_gradient_checkpointing_changes_no_gradient(make_learner: Make, uneven: list[Any]) -> None:
    plain = gradient(make_learner(torch.float64), uneven, "token-mean")
    saved = gradient(make_learner(torch.float64, gradient_checkpointing=True), uneven, "token-mean")
    for name in plain:
        assert torch.allclose(plain[name], saved[name], rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_is_no_update(make_learner: Make, uneven: list[Any]) -> None:
    learner = make_learner()
    before = {name: p.detach().clone() for name, p in learner.trainable.items()}

    def broken(batch: Any, outputs: Any) -> Any:
        return outputs.logp.sum() * float("nan"), {}

    assert learner.step(uneven, broken)["skipped_updates"] == 1
    assert all(torch.equal(before[name], p) for name, p in learner.trainable.items())


def test_merged_adapters_are_the_adapted_model(
    make_learner: Make, uneven: list[Any], tiny_model: Path
) -> None:
    adapted = make_learner(torch.float64, lora={"rank": 4})
    assert all("lora_" in name for name in adapted.trainable)
    for _ in range(3):
        adapted.step(uneven, surrogate(uneven, "token-mean"), with_entropy=True)
    plain = make_learner(torch.float64)
    names = [name for name, _ in plain.weights()]
    merged = dict(adapted.weights())
    assert list(merged) == names
    before = plain.score(uneven)
    plain.model.load_state_dict(merged, strict=False)
    after = plain.score(uneven)
    assert torch.allclose(after, adapted.score(uneven), rtol=0, atol=1e-9)
    assert not torch.allclose(after, before, atol=1e-4)


def test_dropout_of_an_update_depends_on_its_number_alone(make_learner: Make, uneven: list[Any]) -> None:
    made = []
    for noise in (0, 5):
        learner = make_learner(torch.float64, lora={"rank": 4, "dropout": 0.5})
        torch.rand(noise)
        made.append(gradient(learner, uneven, "token-mean"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_schedules(make_learner: Make, uneven: list[Any]) -> None:
    def rates(schedule: str) -> list[float]:
        learner = make_learner(lr=1.0, warmup_updates=2, schedule=schedule, planned_updates=6)
        seen = []
        for learner.scheduled in range(7):
            seen.append(learner.learning_rate)
        return seen

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_on_the_output_layer_is_refused(make_learner: Make) -> None:
    with pytest.raises(UsageError, match="one matrix"):
        make_learner(lora={"target_modules": ["lm_head"]})
