"""Spaces for text. Invariant: any ``str`` up to the length limit is a member, whatever its alphabet."""

from __future__ import annotations

from typing import Any

import gymnasium


class Text(gymnasium.spaces.Text):
    """A string of at most ``max_length`` characters of any Unicode.

    ``sample`` draws printable ASCII, so samples are readable; ``contains`` accepts everything.
    Gymnasium's shared memory cannot carry it: pass ``shared_memory=False`` to ``AsyncVectorEnv``
    (``agentgym.make_vec`` does).

    Args:
        max_length: In characters; the default holds any observation that a context window can.
        min_length: In characters.
    """

    def __init__(self, max_length: int = 1_000_000, *, min_length: int = 0, seed: int | None = None) -> None:
        super().__init__(
            max_length, min_length=min_length, charset="".join(map(chr, range(32, 127))), seed=seed
        )

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A random printable string; at most 64 characters unless ``mask`` gives a length."""
        if mask is None and probability is None:
            low = self.min_length
            mask = (int(self.np_random.integers(low, max(low, min(64, self.max_length)) + 1)), None)
        return super().sample(mask=mask, probability=probability)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string within the length limits."""
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length

    def __repr__(self) -> str:
        return f"Text({self.min_length}, {self.max_length})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Text)
            and self.min_length == other.min_length
            and self.max_length == other.max_length
        )

    __hash__ = None  # type: ignore[assignment]
