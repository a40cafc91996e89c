"""Aggregation: from token values to one loss, divided by constants known before backward.

Invariant: `aggregate` is a sum over rows divided by global constants (`Denominators`), so the losses of any
split of a batch into micro-batches and ranks add up to the loss of the whole batch, and so do the gradients.

With ``m`` the mask, ``w`` the row's weight (1 unless given) and ``n = sum_j m``:

=======================  =============================================================
token-mean               ``sum w m l / sum w n``
token-sum                ``sum w m l``
seq-mean-token-sum       ``sum_i w sum_j m l / B'``, B' the weight of rows with ``n > 0``
seq-mean-token-sum-norm  the previous, divided by a fixed ``length_norm``
seq-mean-token-mean      ``sum_i w (1/n) sum_j m l / B'``
=======================  =============================================================

A "sequence" is a row, that is a segment. A weight of 2 is the row standing there twice; a weight of 0, or a
row without sampled tokens, is the row not standing there. Where a trajectory has several rows and should
count once, weigh each of its rows by ``n_row / n_trajectory`` for seq-mean-token-mean, or replace
``Denominators.sequences`` by the number of trajectories for the token-sum modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownName, UsageError

AggregationMode = Literal[
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"
]
AGGREGATION_MODES: tuple[AggregationMode, ...] = get_args(AggregationMode)


def check_aggregation(mode: AggregationMode, length_norm: float | None) -> None:
    """Refuse a mode that does not exist or lacks its constant, before anything is computed.

    Raises:
        UnknownName: No such mode.
        ConfigError: ``seq-mean-token-sum-norm`` without a positive ``length_norm``.
    """
    if mode not in AGGREGATION_MODES:
        raise UnknownName("aggregation mode", mode, AGGREGATION_MODES)
    if mode == "seq-mean-token-sum-norm" and (length_norm is None or length_norm <= 0):
        raise ConfigError(
            f"aggregation 'seq-mean-token-sum-norm' needs a positive length_norm, got {length_norm}",
            hint="set length_norm to the longest completion in tokens; a padded width would make the loss "
            "depend on how rows are batched",
        )


@dataclass(frozen=True, slots=True)
class Denominators:
    """The constants one optimiser step divides by, taken over all its micro-batches and ranks.

    Attributes:
        tokens: Weighted number of tokens in the loss.
        sequences: Weighted number of rows with at least one token in the loss.
        length_norm: The fixed factor of ``seq-mean-token-sum-norm``.
        world_size: Number of ranks whose gradients are *averaged* (as DDP does); 1 where they are summed.
    """

    tokens: float
    sequences: float
    length_norm: float | None = None
    world_size: int = 1

    @classmethod
    def of(
        cls,
        lengths: Tensor,
        *,
        row_weight: Tensor | None = None,
        length_norm: float | None = None,
        world_size: int = 1,
    ) -> Denominators:
        """Count a whole batch.

        Args:
            lengths: ``[B]``; tokens in the loss of every row of the step, over all ranks: ``mask.sum(1)``.
            row_weight: ``[B]``; ``None``: every row counts once.
            length_norm: The fixed factor, where the mode needs one.
            world_size: Number of ranks whose gradients are averaged.

        Raises:
            UsageError: ``lengths`` is not a vector (a mask, say).
        """
        if lengths.dim() != 1:
            raise UsageError(
                f"lengths must be a vector, one count a row, got shape {tuple(lengths.shape)}",
                hint="pass mask.sum(1) of all rows of the step",
            )
        weight = torch.ones_like(lengths, dtype=torch.float64) if row_weight is None else row_weight.double()
        return cls(
            tokens=float((weight * lengths).sum()),
            sequences=float((weight * (lengths > 0)).sum()),
            length_norm=length_norm,
            world_size=world_size,
        )


def aggregate(
    values: Tensor,
    mask: Tensor,
    mode: AggregationMode,
    denominators: Denominators,
    *,
    row_weight: Tensor | None = None,
) -> Tensor:
    """This micro-batch's share of the batch's aggregated value.

    Args:
        values: ``[B, T]``; finite where the mask is true, anything elsewhere.
        mask: ``[B, T]`` bool.
        mode: One of `AGGREGATION_MODES`.
        denominators: Of the whole optimiser step.
        row_weight: ``[B]``; the same weights the denominators were counted with.

    Returns:
        A scalar, times ``world_size``. Shares of all micro-batches of a rank are added, ranks averaged. Over
        an empty batch it is 0.

    Raises:
        UnknownName: No such mode.
        ConfigError: ``seq-mean-token-sum-norm`` without a fixed factor.
    """
    check_aggregation(mode, denominators.length_norm)
    rows = torch.where(mask, values, 0.0).sum(1)
    if row_weight is not None:
        rows = rows * row_weight.to(rows.dtype)
    if mode == "seq-mean-token-mean":
        rows = rows / mask.sum(1).clamp(min=1)
    if mode == "token-mean":
        divisor = denominators.tokens
    elif mode == "token-sum":
        divisor = 1.0
    elif mode == "seq-mean-token-sum-norm":
        divisor = denominators.sequences * (denominators.length_norm or 1.0)
    else:
        divisor = denominators.sequences
    # No token anywhere: the sum is 0 whatever it is divided by.
    return rows.sum() * (denominators.world_size / (divisor or 1.0))
