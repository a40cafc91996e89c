from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import UsageError
from agentgym.outcome import Outcome
from agentgym.trajectory import Segment, Trajectory, Turn

tokens = st.lists(st.integers(0, 150_000), max_size=20)


@given(st.lists(st.tuples(st.booleans(), tokens), max_size=12))
def test_a_segment_is_what_was_read_and_written_in_order(pieces: list[tuple[bool, list[int]]]) -> None:
    segment = Segment()
    spans = []
    for sampled, ids in pieces:
        if sampled:
            spans.append((segment.append_sampled(ids, [-float(i) for i in ids]), ids))
        else:
            segment.append_context(ids)
    assert segment.token_ids == [token for _, ids in pieces for token in ids]
    assert segment.loss_mask == [sampled for sampled, ids in pieces for _ in ids]
    assert len(segment) == len(segment.loss_mask) == len(segment.logp_rollout)
    for (start, end), ids in spans:
        assert segment.token_ids[start:end] == ids
        assert segment.logp_rollout[start:end] == [-float(i) for i in ids]
    assert all(
        mask or logp == 0.0 for mask, logp in zip(segment.loss_mask, segment.logp_rollout, strict=True)
    )


def test_every_sampled_token_has_a_log_prob() -> None:
    segment = Segment()
    with pytest.raises(UsageError, match="2 sampled tokens but 1 log-probs"):
        segment.append_sampled([1, 2], [-0.5])
    assert len(segment) == 0


def turn(index: int, reward: float, span: tuple[int, int] = (0, 0), success: bool = False) -> Turn:
    return Turn(index, 0, span, (), "look", "look", reward, success=success)


def test_reward_and_success_of_a_valid_trajectory() -> None:
    turns = [turn(0, 0.25, (3, 7)), turn(1, 0.5, (9, 10), success=True)]
    trajectory = Trajectory("e", "env", "t", turns=turns, outcome=Outcome.completed())
    assert trajectory.valid
    assert trajectory.reward == 0.75
    assert trajectory.success
    assert trajectory.sampled_tokens == 5


def test_success_is_the_verdict_after_the_last_turn() -> None:
    turns = [turn(0, 1.0, success=True), turn(1, 0.0, success=False)]
    assert not Trajectory("e", "env", "t", turns=turns, outcome=Outcome.truncated("turns")).success
    assert not Trajectory("e", "env", "t", outcome=Outcome.completed()).success


@pytest.mark.parametrize("outcome", [None, Outcome.infra_failed("sandbox"), Outcome.cancelled()])
def test_a_failure_of_infrastructure_has_no_reward(outcome: Outcome | None) -> None:
    trajectory = Trajectory("e7", "env", "t", turns=[turn(0, 1.0, success=True)], outcome=outcome)
    assert not trajectory.valid
    with pytest.raises(UsageError, match="trajectory e7"):
        _ = trajectory.reward
    with pytest.raises(UsageError, match="trajectory e7"):
        _ = trajectory.success
