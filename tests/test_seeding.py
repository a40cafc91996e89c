from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.seeding import EpisodeSeeds, derive

parts = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.integers())


@given(run=st.integers(0, 2**128), path=st.lists(parts, max_size=6))
def test_a_seed_fits_63_bits_and_depends_on_its_path_alone(run: int, path: list[str | int]) -> None:
    seed = derive(run, *path)
    derive(run + 1, *path)
    assert 0 <= seed < 2**63
    assert derive(run, *path) == seed


@given(path=st.lists(parts, max_size=4), more=parts)
def test_a_longer_path_is_another_seed(path: list[str | int], more: str | int) -> None:
    assert derive(0, *path) != derive(0, *path, more)


def test_no_collisions_over_a_large_grid() -> None:
    names = ("sampler", "environment", "", "0")
    grid = list(itertools.product((0, 1), names, range(50), range(16), range(8)))
    assert len({derive(run, *path) for run, *path in grid}) == len(grid) == 51_200


def test_text_and_numbers_are_different_parts() -> None:
    assert derive(0, "1") != derive(0, 1)
    assert derive(0, "ab", "c") != derive(0, "a", "bc")


def test_numpy_integers_name_the_same_leaf() -> None:
    assert derive(np.int64(3), "a", np.int32(5)) == derive(3, "a", 5)


@pytest.mark.parametrize(
    ("run", "path", "seed"),
    [
        (0, (), 3527577169254209511),
        (0, ("a",), 465748361758207918),
        (0, ("a", 0), 8959615225603382471),
        (1, ("a", 0), 5440244269367760712),
        (7, ("environment", "TextWorld-1", 2), 3893871654512823652),
        (1180591620717411303424, ("sampler", "é", -3), 8950680817570535914),
    ],
)
def test_golden_values(run: int, path: tuple[str | int, ...], seed: int) -> None:
    """A change here breaks the reproducibility of every recorded run."""
    assert derive(run, *path) == seed


def test_members_of_a_group_share_the_environment_seed_and_differ_in_the_sampler() -> None:
    group = [EpisodeSeeds(run=3, task="t", group=1, member=m) for m in range(32)]
    assert len({seeds.environment for seeds in group}) == 1
    assert len({seeds.sampler(turn) for seeds in group for turn in range(20)}) == 32 * 20


def test_groups_tasks_and_runs_have_environment_seeds_of_their_own() -> None:
    seeds = {
        EpisodeSeeds(run, f"task-{task}", group).environment
        for run in range(3)
        for task in range(10)
        for group in range(10)
    }
    assert len(seeds) == 300
    assert all(0 <= seed < 2**31 for seed in seeds)
