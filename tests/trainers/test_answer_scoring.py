"""Answer scoring: three forms, one number; which tokens are the answer's; what a score may depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentgym.errors import UsageError
from agentgym.policies import models
from agentgym.trainers.answer_scoring import (
    Form,
    Query,
    WrappedAnswer,
    score_answers,
    turn_contexts,
    wrap_answer,
)
from agentgym.trajectory import Segment, Trajectory, Turn

FORMS: tuple[Form, ...] = ("sequential", "batched", "masked")


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return models.load(tiny_model, dtype=torch.float32, device="cpu")


@pytest.fixture
def wrapped(loaded: tuple[Any, Any]) -> WrappedAnswer:
    return wrap_answer(loaded[1], "the apple", prefix="<think>So.</think>\n<answer>", suffix="</answer>\n")


def chain(turns: int, seed: int = 0, prompt: int = 9) -> list[tuple[int, ...]]:
    """Growing contexts whose turns differ in length."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [prompt, *torch.randint(1, 30, (turns - 1,), generator=draw).tolist()]
    ids = torch.randint(3, 300, (sum(lengths),), generator=draw).tolist()
    return [tuple(ids[: sum(lengths[: t + 1])]) for t in range(turns)]


@torch.no_grad()
def by_hand(model: Any, query: Query) -> float:
    """From full logits, one token after the other."""
    ids = torch.tensor([[*query.context, *query.answer.token_ids]])
    logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = [len(query.context) + g for g in query.answer.gold]
    return sum(float(logp[p - 1, ids[0, p]]) for p in places) / len(places)


def conversation(contexts: list[tuple[int, ...]]) -> Trajectory:
    """One segment whose completions begin where the contexts end, with two tokens each."""
    ids = [*contexts[-1], 7, 8]
    turns = [
        Turn(i, 0, (len(c), len(c) + 2), (), "", "", 0.0) for i, c in enumerate(contexts)
    ]  # fmt: skip
    return Trajectory(
        "a", "e", "t", segments=[Segment(ids, [False] * len(ids), [0.0] * len(ids))], turns=turns
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("turns", range(1, 11))
def test_i6_three_forms_agree(
    loaded: tuple[Any, Any], wrapped: WrappedAnswer, turns: int, attention: str
) -> None:
    model, tokenizer = loaded
    other = wrap_answer(tokenizer, "a door", prefix="<answer>", suffix="</answer>")
    # Trajectories of one group share the prompt; another task's answer and lengths lie beside them.
    queries = [Query(c, wrapped) for seed in range(2) for c in chain(turns, seed)]
    queries += [Query(c, other) for c in chain(max(1, turns - 2), 5, prompt=3)]
    model.set_attn_implementation(attention)
    try:
        found = {form: score_answers(model, queries, form=form, token_budget=600) for form in FORMS}
    finally:
        model.set_attn_implementation("sdpa")
    expected = torch.tensor([by_hand(model, query) for query in queries], dtype=torch.float64)
    for form in FORMS:
        torch.testing.assert_close(found[form], expected, atol=1e-5, rtol=0)
        again = score_answers(model, queries[::-1], form=form, token_budget=150).flip(0)
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2, "alpha": 8.0}}], ids=str
)
def test_i6_three_forms_agree_on_a_learner(
    make_learner: Callable[..., Any], wrapped: WrappedAnswer, options: dict[str, Any]
) -> None:
    """A learner's attention is exchanged for one that packs rows, and adapters stand in its layers."""
    model = make_learner(**options).model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    queries = [Query(c, wrapped) for c in (*chain(6), *chain(3, 1))]
    expected = torch.tensor([by_hand(model, query) for query in queries], dtype=torch.float64)
    for form in FORMS:
        torch.testing.assert_close(score_answers(model, queries, form=form), expected, atol=1e-5, rtol=0)


def test_i6_left_padding_changes_nothing(loaded: tuple[Any, Any], wrapped: WrappedAnswer) -> None:
    """Right padding is ours; a model that reads the same rows padded on the left finds the same scores."""
    model = loaded[0]
    queries = [Query(c, wrapped) for c in chain(4)]
    rows = [[*q.context, *wrapped.token_ids] for q in queries]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    real = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    places = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logp = model(input_ids=ids, attention_mask=real, position_ids=places).logits.log_softmax(-1)
    after = len(wrapped.token_ids)
    left = [
        sum(logp[i, width - after + g - 1, wrapped.token_ids[g]] for g in wrapped.gold) / len(wrapped.gold)
        for i in range(len(rows))
    ]
    for form in FORMS:
        torch.testing.assert_close(
            score_answers(model, queries, form=form).float(), torch.stack(left), atol=1e-5, rtol=0
        )


def test_i6_segments_of_their_own_and_forks(
    loaded: tuple[Any, Any], wrapped: WrappedAnswer, make_trajectory: Callable[..., Trajectory]
) -> None:
    model, _ = loaded
    contexts = turn_contexts(make_trajectory("a", lengths=((5, 2), (9, 3), (4, 1))))
    assert [len(c) for c in contexts] == [5, 9, 4]
    queries = [Query(c, wrapped) for c in contexts]
    one, two, three = (score_answers(model, queries, form=form) for form in FORMS)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    torch.testing.assert_close(three, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_i7_what_follows_a_turn_leaves_its_score_bit_equal(
    loaded: tuple[Any, Any], wrapped: WrappedAnswer, form: Form
) -> None:
    model, _ = loaded
    contexts = chain(5)
    changed = [
        c if t < 3 else (*c[: len(contexts[2])], *(300 - i for i in c[len(contexts[2]) :]))
        for t, c in enumerate(contexts)
    ]
    before = score_answers(model, [Query(c, wrapped) for c in contexts], form=form)
    after = score_answers(model, [Query(c, wrapped) for c in changed], form=form)
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] - after[3:]).abs().min() > 0
    alone = score_answers(model, [Query(c, wrapped) for c in contexts[:3]], form=form)
    torch.testing.assert_close(alone, before[:3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_equal_contexts_have_bit_equal_scores(
    loaded: tuple[Any, Any], wrapped: WrappedAnswer, form: Form
) -> None:
    first, second = chain(3, prompt=12), chain(6, seed=1, prompt=12)
    second = [(*first[0], *c[12:]) for c in second]
    scores = score_answers(loaded[0], [Query(c, wrapped) for c in (*first, *second)], form=form)
    assert scores[0] == scores[3]
    assert len(set(scores.tolist())) == 8


def test_masked_reads_each_token_once(loaded: tuple[Any, Any], wrapped: WrappedAnswer) -> None:
    model, shapes = loaded[0], []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    contexts = chain(6)
    score_answers(model, [Query(c, wrapped) for c in contexts], form="masked")
    hook.remove()
    assert shapes == [(1, len(contexts[-1])), (1, 6 * (len(wrapped.token_ids) - 1))]


@pytest.mark.parametrize("answer", ["apple", "4", "the apple", "x\nyé", "go north, go south", "日本"])
def test_i8_gold_tokens_are_those_of_its_characters(loaded: tuple[Any, Any], answer: str) -> None:
    tokenizer = loaded[1]
    for prefix, suffix in [("<answer>", "</answer>"), ("So\n", "\n"), ("", ""), (" ", " .")]:
        wrapped = wrap_answer(tokenizer, answer, prefix=prefix, suffix=suffix)
        whole = tokenizer(prefix + answer + suffix, add_special_tokens=False, return_offsets_mapping=True)
        begin, end = len(prefix), len(prefix + answer)
        inside = [i for i, (a, b) in enumerate(whole["offset_mapping"]) if a < end and b > begin]
        assert list(wrapped.gold) == inside
        assert list(wrapped.token_ids) == whole["input_ids"][: inside[-1] + 1]
        assert answer.strip() in tokenizer.decode([wrapped.token_ids[g] for g in wrapped.gold])


def test_i8_the_wrapper_acts_by_conditioning_alone(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    context = chain(1)[0]
    opened = [
        wrap_answer(tokenizer, "apple", prefix=p, suffix="</answer>") for p in ("<answer>", "look\n<answer>")
    ]
    closed = wrap_answer(tokenizer, "apple", prefix="<answer>", suffix="</answer>\n\nlook, look")
    assert len(opened[0].gold) == len(opened[1].gold) and closed == opened[0]
    shorter, longer = score_answers(model, [Query(context, a) for a in opened]).tolist()
    assert shorter != longer
    assert longer == pytest.approx(by_hand(model, Query(context, opened[1])), abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_prefix_and_one_token(loaded: tuple[Any, Any], form: Form) -> None:
    """The context's own last state predicts the answer: a copy of no token."""
    answer = WrappedAnswer("x", (17,), (0,))
    queries = [Query(c, answer) for c in chain(3)]
    expected = [by_hand(loaded[0], q) for q in queries]
    assert score_answers(loaded[0], queries, form=form).tolist() == pytest.approx(expected, abs=1e-5)


def test_i2_scoring_carries_no_gradient_and_restores_the_mode(
    loaded: tuple[Any, Any], wrapped: WrappedAnswer
) -> None:
    model = loaded[0]
    model.train()
    scores = score_answers(model, [Query(c, wrapped) for c in chain(2)])
    assert model.training and not scores.requires_grad
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def test_temperature_and_double_precision(tiny_model: Path, wrapped: WrappedAnswer) -> None:
    model = models.load(tiny_model, dtype=torch.float32, device="cpu")[0].double()
    queries = [Query(c, wrapped) for c in chain(4)]
    forms: list[Tensor] = [score_answers(model, queries, form=form, temperature=0.5) for form in FORMS]
    for scores in forms[1:]:
        torch.testing.assert_close(scores, forms[0], atol=1e-12, rtol=0)
    assert (forms[0] - score_answers(model, queries)).abs().min() > 1e-3


def test_bfloat16_scores_are_near(loaded: tuple[Any, Any], wrapped: WrappedAnswer) -> None:
    queries = [Query(c, wrapped) for c in chain(4)]
    exact = score_answers(loaded[0], queries)
    for form in FORMS:
        low = score_answers(loaded[0], queries, form=form, autocast=torch.bfloat16)
        torch.testing.assert_close(low, exact, atol=0.05, rtol=0)


def test_contexts_are_prefixes_of_the_segment() -> None:
    contexts = chain(3)
    assert turn_contexts(conversation(contexts)) == contexts


def test_what_cannot_be_scored_is_said(loaded: tuple[Any, Any], wrapped: WrappedAnswer) -> None:
    model, tokenizer = loaded
    with pytest.raises(UsageError, match="has no tokens"):
        wrap_answer(tokenizer, " ", prefix="<answer>", suffix="</answer>")

    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match=r"does not tell which characters.*\n.*tokenizer.json"):
        wrap_answer(Slow(), "a", prefix="", suffix="")
    with pytest.raises(UsageError, match="a context is empty"):
        score_answers(model, [Query((), wrapped)])
    trajectory = conversation(chain(1))
    trajectory.turns = [Turn(0, 0, (0, 0), (), "", "", 0.0)]
    with pytest.raises(UsageError, match="no prompt tokens"):
        turn_contexts(trajectory)


def test_sliding_windows_need_another_form(wrapped: WrappedAnswer) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    full = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    queries = [Query(c, wrapped) for c in chain(5)]
    torch.testing.assert_close(
        score_answers(full, queries), score_answers(full, queries, form="sequential"), atol=1e-5, rtol=0
    )
    windowed = Qwen2ForCausalLM(
        Qwen2Config(**shape, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    ).eval()
    with pytest.raises(UsageError, match=r"sliding_attention.*\n.*batched"):
        score_answers(windowed, queries)
    batched = score_answers(windowed, queries, form="batched")
    torch.testing.assert_close(
        batched, score_answers(windowed, queries, form="sequential"), atol=1e-5, rtol=0
    )
