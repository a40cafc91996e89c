from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from agentgym.spaces import Text

wild = st.text(st.characters(), max_size=200)  # lone surrogates too


@given(wild)
def test_any_string_is_a_member(text: str) -> None:
    assert text in Text()


@pytest.mark.parametrize("other", [None, 3, b"bytes", ["a"], np.array(["a"])])
def test_nothing_else_is(other: object) -> None:
    assert other not in Text()


def test_length_limits() -> None:
    space = Text(5, min_length=2)
    assert [n for n in range(8) if "ü" * n in space] == [2, 3, 4, 5]


@given(low=st.integers(0, 80), extra=st.integers(0, 80), seed=st.integers(0, 2**31))
def test_samples_are_short_printable_members(low: int, extra: int, seed: int) -> None:
    space = Text(low + extra + 1, min_length=low, seed=seed)
    sample = space.sample()
    assert sample in space
    assert sample.isascii()
    assert sample.isprintable()
    assert len(sample) <= max(64, low)


def test_samples_are_seeded() -> None:
    assert [Text(seed=4).sample() for _ in range(3)] == [Text(seed=4).sample()] * 3
    space = Text(seed=4)
    assert len({space.sample() for _ in range(20)}) > 10


def test_spaces_compare_and_copy_by_their_limits() -> None:
    space = Text(9, min_length=1)
    assert space == copy.deepcopy(space) == pickle.loads(pickle.dumps(space)) == Text(9, min_length=1)
    assert space != Text(9)
    assert space != "text"
    assert repr(space) == "Text(1, 9)"


def test_a_vector_of_it_is_a_tuple() -> None:
    assert ("a", "ü", "") in batch_space(Text(), 3)
