"""Drawing tokens from logits, each row with its own parameters and its own random numbers.

Invariant: a row's token depends on its own logits, parameters and uniform number alone, so what else shares
the batch cannot change it. Log-probs are those of the distribution after the temperature and before
``top_k`` and ``top_p``; a greedy row (temperature 0) reports the untempered ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentgym.policies.base import Sampling

# Most nuclei are this narrow; looking no further spares a sort of the vocabulary.
_USUAL_WIDTH = 1024


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """The random numbers of one completion: element ``t`` in [0, 1) draws its ``t``-th token."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(logits: Tensor, params: Sequence[Sampling], u: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """One token a row, by inversion of the cumulative distribution.

    Args:
        logits: Shape ``(rows, vocabulary)``, any floating dtype; taken to fp32.
        params: The rows' sampling parameters.
        u: The rows' uniform numbers in [0, 1).

    Returns:
        ``(tokens, log-probs)``, int64 and fp32, each of shape ``(rows,)``. A row whose logits hold NaN or
        +inf has the log-prob NaN.
    """
    logits = logits.float()
    device = logits.device
    if any(p.temperature not in (0.0, 1.0) for p in params):
        scale = torch.tensor([p.temperature or 1.0 for p in params], device=device)
        logits = logits / scale[:, None]
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    tokens = logits.argmax(dim=-1)
    rows = [i for i, p in enumerate(params) if p.temperature > 0]
    if rows:
        index = torch.tensor(rows, device=device)
        every = len(rows) == len(params)
        chosen = (logits - normaliser if every else (logits - normaliser)[index]).exp()
        sampled = [params[i] for i in rows]
        if any(p.top_k or p.top_p < 1 for p in sampled):
            chosen = _truncate(chosen, sampled)
        tokens[index] = _invert(chosen, torch.from_numpy(u[rows]).to(device))
    return tokens, (logits.gather(-1, tokens[:, None]) - normaliser).squeeze(-1)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    # An fp32 running sum cannot tell tokens below 1e-7 apart: most of them would never be drawn.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # The factor keeps the target below the total, where rounding might lift it to it.
    target = u[:, None] * (1 - 1e-12) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


def _truncate(probs: Tensor, params: Sequence[Sampling]) -> Tensor:
    """``probs`` with all outside each row's nucleus at 0: first ``top_k``, then ``top_p`` of what is left.

    Both are thresholds on the probability, so tokens that tie with the last one kept are kept too: which of
    them comes first in a sort may depend on the rest of the batch.
    """
    size = probs.shape[-1]
    limits = [min(p.top_k or size, size) for p in params]
    width = max([min(size, _USUAL_WIDTH), *(k for k in limits if k < size)])
    limit = torch.tensor(limits, device=probs.device)[:, None]
    mass = torch.tensor([p.top_p for p in params], device=probs.device, dtype=torch.float64)[:, None]
    while (kept := _nucleus(probs, limit, mass, width)) is None:
        width = size
    return kept


def _nucleus(probs: Tensor, limit: Tensor, mass: Tensor, width: int) -> Tensor | None:
    """The nucleus found among the ``width`` largest entries; ``None`` if a row's is wider than that."""
    size = probs.shape[-1]
    largest = probs.topk(width, dim=-1).values
    floor = largest.gather(-1, limit.clamp(max=width) - 1)
    kept = torch.where((limit < size) & (probs < floor), 0, probs)
    target = mass * kept.sum(dim=-1, keepdim=True, dtype=torch.float64)
    # A token stays while the mass before it is below the target: the smallest set that reaches it.
    inside = (largest.cumsum(dim=-1, dtype=torch.float64) - largest < target).sum(dim=-1, keepdim=True)
    if width < size and bool(((mass < 1) & (limit == size) & (inside == width)).any()):
        return None
    nucleus = largest.gather(-1, (inside - 1).clamp(min=0))
    return torch.where((mass < 1) & (kept < nucleus), 0, kept)
