"""Which rows begin alike, and how many tokens there are to read if a common beginning is read once.

Invariant: every row is in exactly one family, and no other way of cutting the rows, in lexicographic order,
into families leaves fewer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Rows of a family at most, and the share of its tokens that a prefix has to save: below it, the copies of the
# prefix's keys cost more than the tokens that it spares.
MEMBERS = 64
WORTH = 1 / 8


@dataclass(frozen=True, slots=True)
class Family:
    """Rows that share a prefix.

    Attributes:
        members: Their indices.
        shared: Tokens of the prefix; 0 for a row by itself.
    """

    members: tuple[int, ...]
    shared: int


def families(rows: Sequence[tuple[int, ...]]) -> list[Family]:
    """The grouping of different rows that leaves the fewest tokens to read.

    Members of a group share their task, groups the system's words: a row goes where it saves most.

    Args:
        rows: Token ids; no two rows are equal.

    Returns:
        Families in lexicographic order; a row that shares nothing worth it is one by itself.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    common = [_common(rows[i], rows[j]) for i, j in pairwise(order)]
    # best[n]: fewest tokens of the first n rows, where their last family starts, and what it shares.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        shared = total = len(rows[order[end - 1]])
        choice = (best[end - 1][0] + total, end - 1, 0)
        for start in range(end - 2, max(-1, end - 1 - MEMBERS), -1):
            shared = min(shared, common[start])
            if shared == 0:
                break
            total += len(rows[order[start]])
            saved = shared * (end - start - 1)
            if saved >= WORTH * total:
                choice = min(choice, (best[start][0] + total - saved, start, shared))
        best.append(choice)
    made, end = [], len(order)
    while end:
        _, start, shared = best[end]
        made.append(Family(tuple(order[start:end]), shared))
        end = start
    return made[::-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare fast: halve the stretch in which the first difference lies
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
