"""The keys and values of rows of different lengths, in one block that a model extends.

Invariant: a position is a token's place among its own row's tokens, and only those are attended to; padding
may stand anywhere in a row's columns and changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Columns of room that a buffer has, so that the next tokens are written into it instead of copying it.
_SLACK = 64
_GROUPED = "sdpa_grouped"


class KeyValues:
    """Rows of keys and values.

    Args:
        rows: Number of rows, all empty.
        device: Where the model is.

    Attributes:
        mask: True on a row's tokens and false on padding, shape ``(rows, columns)``.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.mask = torch.empty((rows, 0), dtype=torch.bool, device=device)
        self._cache = Cache(layer_class_to_replicate=_Layer)

    def read(self, model: Any, tokens: Tensor, real: Tensor) -> Tensor:
        """Append ``tokens`` to the rows.

        Args:
            model: A causal language model.
            tokens: Ids, shape ``(rows, columns)``.
            real: False where a token is padding, same shape.

        Returns:
            The logits after the last column, shape ``(rows, vocabulary)``.
        """
        before = self.mask.sum(dim=1, keepdim=True)
        self.mask = torch.cat([self.mask, real], dim=1)
        output = model(
            input_ids=tokens,
            attention_mask=None if bool(self.mask.all()) else self.mask,
            position_ids=(before + real.cumsum(dim=1) - 1).clamp_(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    @classmethod
    def join(cls, parts: Sequence[tuple[KeyValues, Sequence[int]]]) -> KeyValues:
        """The rows of ``parts``, given by index (one may be taken often), without columns that none needs."""
        masks = [block.mask[list(index)] for block, index in parts]
        masks = [mask[:, int(mask.any(dim=0).int().argmax()) :] for mask in masks]
        width = max(mask.shape[1] for mask in masks)
        joined = cls(0, masks[0].device)
        joined.mask = torch.cat([torch.nn.functional.pad(m, (width - m.shape[1], 0)) for m in masks])
        for layers in zip(*(block._cache.layers for block, _ in parts), strict=True):
            layer = _Layer()
            taken = [
                (source, list(index), mask.shape[1])
                for source, (_, index), mask in zip(layers, parts, masks, strict=True)
            ]
            layer.fill(taken, width)
            joined._cache.layers.append(layer)
        return joined


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call, unused-ignore]
    """Keys and values, shape ``(rows, heads, columns, size)``, in buffers with room for more columns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._buffers: list[Tensor] = []
        self._length = 0

    def get_seq_length(self) -> int:
        """Columns in the cache."""
        return self._length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new columns; return all."""
        self.is_initialized = True
        new, past, length = (key_states, value_states), self._length, self._length + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < length:
            grown = [_room(states, len(states), length + _SLACK) for states in new]
            if past:
                for target, source in zip(grown, self.filled(), strict=True):
                    target[:, :, :past] = source
            self._buffers = grown
        for buffer, states in zip(self._buffers, new, strict=True):
            buffer[:, :, past:length] = states
        self._length = length
        self.keys, self.values = self.filled()
        return self.keys, self.values

    def fill(self, parts: Sequence[tuple[_Layer, list[int], int]], width: int) -> None:
        """Take rows from other layers, the last so many columns of each, and align them on the right."""
        self.is_initialized, self._length = True, width
        rows = sum(len(index) for _, index, _ in parts)
        self._buffers = [_room(states, rows, width + _SLACK) for states in parts[0][0].filled()]
        at = 0
        for layer, index, length in parts:
            for buffer, states in zip(self._buffers, layer.filled(), strict=True):
                here = buffer[at : at + len(index)]
                here[:, :, : width - length] = 0  # masked, but 0 times garbage may be NaN
                here[:, :, width - length : width] = states[index, :, layer._length - length :]
            at += len(index)
        self.keys, self.values = self.filled()

    def filled(self) -> tuple[Tensor, Tensor]:
        """Views of the filled part of the buffers."""
        keys, values = self._buffers
        return keys[:, :, : self._length], values[:, :, : self._length]


def _room(like: Tensor, rows: int, columns: int) -> Tensor:
    _, heads, _, size = like.shape
    return like.new_empty((rows, heads, columns, size))


def use_grouped_attention(model: Any) -> None:
    """Let a model that attends by SDPA decode with :func:`grouped_attention`; others stay as they are."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_GROUPED, grouped_attention)
        AttentionMaskInterface.register(_GROUPED, sdpa_mask)
        model.set_attn_implementation(_GROUPED)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA that reads each key and value once for the whole group of query heads that shares it.

    For a single new token on a CPU the heads of a group take the place of query positions, which are all it
    lacks: the kernel then does the work of one head where it would copy keys and values for each. Everything
    else goes the usual way.
    """
    rows, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    usual = queries > 1 or groups == 1 or query.device.type != "cpu"
    if usual or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups, -1),
        key,
        value,
        attn_mask=attention_mask,
        scale=kwargs.get("scaling"),
    )
    return output.reshape(rows, 1, heads, -1), None
