"""How a trajectory's number reaches its sampled tokens."""

from __future__ import annotations

import torch

from agentgym.trainers.credit import SampledTokens, at_last_token, broadcast, token_index

# Trajectory 1 has two rows (its second turn in a window of its own); trajectory 0 has one.
OWNER = torch.tensor([1, 0, 1])
MASK = torch.tensor([[False, True, True, False], [True, False, False, True], [True, False, False, False]])


def test_every_sampled_token_gets_its_trajectory_s_value_and_nothing_else_does():
    index = token_index(OWNER, MASK)
    assert index.tolist() == [[-1, 1, 1, -1], [0, -1, -1, 0], [1, -1, -1, -1]]
    assert broadcast(torch.tensor([5.0, 7.0]), index).tolist() == [[0, 7, 7, 0], [5, 0, 0, 5], [7, 0, 0, 0]]


def test_turns_are_addressed_like_trajectories():
    turns = torch.tensor([[-1, 0, 0, -1, 1, 1], [-1, -1, 2, -1, -1, -1]])
    assert broadcast(torch.tensor([1.0, 2.0, 3.0]), turns).tolist() == [
        [0, 1, 1, 0, 2, 2],
        [0, 0, 3, 0, 0, 0],
    ]
    assert at_last_token(torch.tensor([1.0, 2.0, 3.0]), turns).tolist() == [
        [0, 0, 1, 0, 0, 2],
        [0, 0, 3, 0, 0, 0],
    ]


def test_a_terminal_reward_lies_on_the_last_token_of_the_last_row():
    placed = at_last_token(torch.tensor([5.0, 7.0]), token_index(OWNER, MASK))
    assert placed.tolist() == [[0, 0, 0, 0], [0, 0, 0, 5], [7, 0, 0, 0]]


def test_a_unit_without_tokens_is_skipped():
    assert at_last_token(torch.tensor([5.0, 7.0]), torch.tensor([[-1, 1]])).tolist() == [[0, 7]]


def test_sampled_tokens_line_up_in_time_across_rows_and_come_back():
    x = torch.tensor([[9.0, 1, 2, 9], [10, 9, 9, 11], [3, 9, 9, 9]])
    tokens = SampledTokens.of(MASK, OWNER)
    assert tokens.gather(x).tolist() == [[10, 11, 0], [1, 2, 3]]
    assert torch.equal(tokens.scatter(tokens.gather(x)), torch.where(MASK, x, 0.0))


def test_no_sampled_token_at_all():
    tokens = SampledTokens.of(torch.zeros(2, 3, dtype=torch.bool))
    assert tokens.gather(torch.ones(2, 3)).shape == (0, 0)
    assert torch.equal(tokens.scatter(torch.zeros(0, 0)), torch.zeros(2, 3))
