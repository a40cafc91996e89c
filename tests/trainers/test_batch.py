"""Rows, batches and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentgym.conversation import Conversation
from agentgym.messages import TextPart
from agentgym.outcome import Outcome
from agentgym.policies.base import Completion
from agentgym.trainers.batch import Row, collate, distinct, micro_batches, rows, tokenize
from agentgym.trajectory import Segment, Trajectory, Turn


def test_a_row_is_a_segment_of_a_valid_trajectory(make_trajectory: Callable[..., Trajectory]) -> None:
    failed = make_trajectory("f", outcome=Outcome.infra_failed("environment"))
    unended = make_trajectory("u")
    unended.outcome = None
    two = make_trajectory("two", lengths=((3, 2), (5, 1)))
    made = rows([failed, unended, two, make_trajectory("cancelled", outcome=Outcome.cancelled())])
    assert [(row.trajectory, row.index, row.turns) for row in made] == [
        (2, 0, ((0, 3, 5),)),
        (2, 1, ((1, 5, 6),)),
    ]
    assert [row.segment for row in made] == two.segments


def test_an_empty_completion_gives_no_row(make_trajectory: Callable[..., Trajectory]) -> None:
    assert rows([make_trajectory("e", lengths=((3, 0),))]) == []
    assert len(rows([make_trajectory("e", lengths=((3, 0), (4, 1)))])) == 1


def test_tokens_of_a_turn_that_never_ended_are_left_out(make_trajectory: Callable[..., Trajectory]) -> None:
    trajectory = make_trajectory("t", outcome=Outcome.truncated("time"))
    trajectory.segments[0].append_context([7, 8])
    trajectory.segments[0].append_sampled([9], [-1.0])
    [row] = rows([trajectory])
    assert len(row) == 5 and row.sampled == 2


def test_columns_speak_of_the_next_token(make_trajectory: Callable[..., Trajectory]) -> None:
    made = rows([make_trajectory("a", lengths=((3, 2),)), make_trajectory("b", lengths=((1, 1),))])
    batch = collate(made)
    assert batch.input_ids.shape == (2, 5) and batch.loss_mask.shape == (2, 4)
    assert batch.loss_mask.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert batch.targets[0, 2:].tolist() == made[0].segment.token_ids[3:]
    assert batch.logp_rollout[0, 2:].tolist() == pytest.approx(made[0].segment.logp_rollout[3:])
    assert batch.turn.tolist() == [[-1, -1, 0, 0], [0, -1, -1, -1]]
    assert batch.attention_mask.sum(1).tolist() == [5, 2]


def plain(tokens: int, n: int, i: int) -> Row:
    return Row(Segment([tokens] * n, [True] * n, [0.0] * n), i, i, ((0, 0, n),))


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 200)), min_size=1, max_size=40), st.integers(1, 500)
)
def test_micro_batches_are_a_partition_within_the_budget(kinds: list[tuple[int, int]], budget: int) -> None:
    made = [plain(*kind, i) for i, kind in enumerate(kinds)]
    parts = list(micro_batches(made, budget))
    assert sorted(row.index for part in parts for row in part) == list(range(len(made)))
    for part in parts:
        unequal = len({kinds[row.index] for row in part})
        assert unequal == 1 or max(map(len, part)) * unequal <= budget


def test_equal_rows_lie_in_one_micro_batch() -> None:
    parts = list(micro_batches([plain(1 + i % 2, 10, i) for i in range(8)], 10))
    assert [[row.index for row in part] for part in parts] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=12))
def test_distinct_rows_stand_for_all(kinds: list[tuple[int, int]]) -> None:
    batch = collate([plain(*kind, i) for i, kind in enumerate(kinds)])
    read, place = distinct(batch)
    assert len(read) == len(set(kinds))
    assert torch.equal(batch.input_ids[read][place], batch.input_ids)
    assert torch.equal(batch.attention_mask[read][place], batch.attention_mask)


@pytest.mark.parametrize("layout", ["chat", "turn"])
def test_an_expert_s_words_become_what_the_policy_would_have_read(tiny_model: Path, layout: Any) -> None:
    from transformers import AutoTokenizer

    from agentgym.policies.templates import HuggingFaceRenderer

    renderer = HuggingFaceRenderer(AutoTokenizer.from_pretrained(tiny_model))
    turns = [Turn(i, 0, (0, 0), (TextPart(f"Say {w}."),), w, w, 0.0) for i, w in enumerate(("one", "two"))]
    spoken = Trajectory("x", "e", "t", instruction="Repeat.", turns=turns, outcome=Outcome.completed())
    made = tokenize(spoken, renderer, system="Be brief.", layout=layout)
    assert len(made.segments) == (1 if layout == "chat" else 2)
    for turn, word in zip(made.turns, ("one", "two"), strict=True):
        ids = made.segments[turn.segment].token_ids
        start, end = turn.span
        assert renderer.decode(ids[start:end]) == word + renderer.end_of_turn
        assert renderer.decode(ids[:start]).startswith("<|im_start|>system\nBe brief.")
        assert renderer.decode(ids[:start]).endswith(f"Say {word}.<|im_end|>\n<|im_start|>assistant\n")
    assert spoken.segments == []


def test_an_observation_has_the_role_that_the_engine_gives_it(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from agentgym.policies.templates import HuggingFaceRenderer

    renderer = HuggingFaceRenderer(AutoTokenizer.from_pretrained(tiny_model))
    turns = [Turn(i, 0, (0, 0), (TextPart(f"Say {w}."),), w, w, 0.0) for i, w in enumerate(("one", "two"))]
    spoken = Trajectory("x", "e", "t", turns=turns, outcome=Outcome.completed())
    (segment,) = tokenize(spoken, renderer, role="tool").segments
    conversation = Conversation(renderer)
    conversation.read(turns[0].observation, role="tool")
    ids = tuple(renderer.encode("one" + renderer.end_of_turn))
    conversation.complete(Completion("one", ids, (0.0,) * len(ids)))
    prompt = conversation.read(turns[1].observation, role="tool")
    assert tuple(segment.token_ids[: len(prompt)]) == prompt
