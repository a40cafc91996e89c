"""The seed tree: run -> task -> group -> member -> turn -> sampler.

Invariant: a seed depends on its path alone, never on the order in which seeds were drawn, so episodes
may run in any order or on any worker. Members of a group share the environment seed and differ in the
sampler seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


def derive(run: int, *path: str | int) -> int:
    """A 63-bit seed for ``path`` under the run's seed.

    Args:
        run: The run's seed, any non-negative integer.
        path: Names (hashed) and indices from the root to the leaf.

    Returns:
        An integer in ``[0, 2**63)``, equal on every machine and Python version.
    """
    key: list[int] = []
    for part in path:
        data = part.encode() if isinstance(part, str) else b"\x00%d" % part
        digest = hashlib.blake2b(data, digest_size=8).digest()
        key += [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]
    state = np.random.SeedSequence(run, spawn_key=tuple(key)).generate_state(2, np.uint32)
    return (int(state[0]) << 32 | int(state[1])) & (2**63 - 1)


@dataclass(frozen=True, slots=True)
class EpisodeSeeds:
    """The seeds of one episode: one path in the tree.

    Attributes:
        run: The run's seed.
        task: The task's id.
        group: Index of the group; two groups on one task differ here.
        member: Index within the group.
    """

    run: int
    task: str
    group: int = 0
    member: int = 0

    @property
    def environment(self) -> int:
        """Seed of ``env.reset``: shared by all members of the group; fits 31 bits for foreign engines."""
        return derive(self.run, "environment", self.task, self.group) % 2**31

    def sampler(self, turn: int) -> int:
        """Seed of the sampler at ``turn``: differs between members."""
        return derive(self.run, "sampler", self.task, self.group, self.member, turn)
