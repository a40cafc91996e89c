"""Rows that begin alike are read as one sequence, their common beginning once.

Invariant: a token attends to exactly the tokens that stand before it in its own row, at the same positions;
hidden states and gradients are those of reading every row by itself, and only repetition is left out.

A micro-batch becomes one sequence without padding: for each family of rows its prefix, then the rest of each
member. Linear layers see that sequence as it is. Attention is taken apart again: a prefix attends to itself,
the rests of a family, right-padded, to the prefix and to themselves. Autograd adds up what the members say of
their prefix. The layers stay as they are, so adapters and gradient checkpointing work unchanged.

A model packs if its attention can be exchanged (transformers' attention interface), all its layers attend to
everything before, and a small trial agrees with reading row by row. Others are read padded, and so is a model
whose dropout is on: rows that share a prefix would share its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agentgym.trainers.families import Family, families

ATTENTION = "agentgym_packed"


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive tokens of the sequence that attend to one another: a prefix, then its members' rests.

    Attributes:
        shared: Tokens of the prefix.
        lengths: Of the rests.
        place: ``[sum(lengths)]`` where the rests' tokens lie in ``[members * max(lengths)]``; ``None`` if
            they fill it.
        mask: ``[max(lengths), shared + max(lengths)]`` keys that a rest attends to; ``None``: causal.
    """

    shared: int
    lengths: tuple[int, ...]
    place: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch as one sequence of ``N`` tokens.

    Attributes:
        input_ids: ``[1, N]``.
        position_ids: ``[1, N]`` the place of each token in its row.
        where: ``[B, T]`` the place in the sequence of each token of each row; 0 on padding.
        blocks: How attention takes the sequence apart.
    """

    input_ids: Tensor
    position_ids: Tensor
    where: Tensor
    blocks: tuple[_Block, ...]

    def read(self, model: Any, mask: Tensor) -> Tensor:
        """Hidden states of chosen tokens.

        Args:
            model: The trunk, after :func:`prepare`.
            mask: ``[B, T-1]`` bool.

        Returns:
            ``[mask.sum(), H]``, row by row. One state stands for all rows that share its token.
        """
        # A mask of four dimensions reaches the attention as it is: none is made, and this one is not read.
        none = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device)
        hidden = model(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            attention_mask=none,
            use_cache=False,
            packed_blocks=self.blocks,
        ).last_hidden_state[0]
        chosen: Tensor = hidden.index_select(0, self.where[:, :-1][mask])
        return chosen


def pack(input_ids: Tensor, lengths: Sequence[int]) -> Packed:
    """One sequence of a right-padded micro-batch.

    Args:
        input_ids: ``[B, T]``.
        lengths: Tokens of each row.
    """
    copies: dict[tuple[int, ...], list[int]] = {}
    for i, (row, length) in enumerate(zip(input_ids.tolist(), lengths, strict=True)):
        copies.setdefault(tuple(row[:length]), []).append(i)
    rows, device = list(copies), input_ids.device
    grouped = families(rows)
    sharing = [family for family in grouped if family.shared]
    if alone := tuple(i for family in grouped if not family.shared for i in family.members):
        sharing.append(Family(alone, 0))
    sequence: list[int] = []
    positions: list[int] = []
    where = torch.zeros(input_ids.shape, dtype=torch.long)
    for family in sharing:
        start, shared = len(sequence), family.shared
        prefix = torch.arange(start, start + shared)
        sequence += rows[family.members[0]][:shared]
        positions += range(shared)
        for row in (rows[member] for member in family.members):
            rest = torch.arange(len(sequence), len(sequence) + len(row) - shared)
            where[copies[row], : len(row)] = torch.cat((prefix, rest))
            sequence += row[shared:]
            positions += range(shared, len(row))
    blocks = (_block(f.shared, [len(rows[i]) - f.shared for i in f.members], device) for f in sharing)
    ids, places = torch.tensor([sequence, positions], device=device)
    return Packed(ids[None], places[None], where.to(device), tuple(blocks))


def prepare(model: Any) -> bool:
    """Exchange a model's attention for one that also reads packed sequences.

    Args:
        model: A Hugging Face causal language model.

    Returns:
        Whether it packs. If not, the model is as it was.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation not in ("sdpa", ATTENTION) or layers != {"full_attention"}:
        return False
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    before = config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
        if config._attn_implementation == ATTENTION and _agrees(model):
            return True
    except Exception:  # a model's own code, of any kind: whatever it objects to, rows are read padded
        pass
    model.set_attn_implementation(before)
    return False


def has_dropout(model: nn.Module) -> bool:
    """Whether training mode makes the model random."""
    return any(
        isinstance(value, (int, float)) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
    )


def _block(shared: int, lengths: Sequence[int], device: torch.device) -> _Block:
    longest = max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    place = None if real.all() else real.flatten().nonzero().squeeze(1).to(device)
    mask = torch.ones(longest, shared + longest, dtype=torch.bool, device=device).tril(shared)
    return _Block(shared, tuple(lengths), place, mask if shared else None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_blocks: tuple[_Block, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over ``[1, heads, N, D]``, block by block; without blocks, transformers' own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_blocks is None:
        made: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return made, None
    if strange := {name for name, given in options.items() if given is not None} - _UNDERSTOOD:
        raise TypeError(f"attention with {', '.join(sorted(strange))}")
    # Under autocast, rotated queries and keys are fp32 and would be rounded only after they were copied.
    query, key = query.to(value.dtype), key.to(value.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, heads, L, D]`` to ``[B * L, heads, D]``."""
        groups = q.shape[1] // k.shape[1]
        if mask is not None and q.is_cuda:  # its fast kernels take a mask or grouped heads, not both
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        out: Tensor = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=options.get("scaling"), enable_gqa=groups > 1
        )
        return out.transpose(1, 2).flatten(0, 1)

    parts, start = [], 0
    for block in packed_blocks:
        middle = start + block.shared
        end = middle + sum(block.lengths)
        before_q, before_k, before_v = (x[:, :, start:middle] for x in (query, key, value))
        if block.shared:
            parts.append(attend(before_q, before_k, before_v, None))
        if end > middle:
            q, k, v = (_padded(x[0, :, middle:end], block) for x in (query, key, value))
            if block.shared:
                k, v = (
                    torch.cat((before.expand(len(own), -1, -1, -1), own), 2)
                    for before, own in ((before_k, k), (before_v, v))
                )
            out = attend(q, k, v, block.mask)
            parts.append(out if block.place is None else out.index_select(0, block.place))
        start = end
    return torch.cat(parts)[None], None


# What attention may be told and packing does as well: anything else is another kind of attention.
_UNDERSTOOD = {"dropout", "scaling", "position_ids", "position_embeddings", "use_cache", "cache_position"}


def _padded(x: Tensor, block: _Block) -> Tensor:
    """``[heads, sum(lengths), D]`` as ``[members, heads, max(lengths), D]``."""
    heads, _, width = x.shape
    rows = x.transpose(0, 1)
    longest = max(block.lengths)
    if block.place is not None:
        empty = rows.new_zeros(len(block.lengths) * longest, heads, width)
        rows = empty.index_copy(0, block.place, rows)
    return rows.reshape(len(block.lengths), longest, heads, width).transpose(1, 2)


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Whether three short rows give the same hidden states packed and one by one."""
    trunk, training, device = model.model, model.training, next(model.parameters()).device
    last = model.config.get_text_config().vocab_size - 1
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11, 0], [12, 13, 14, 0, 0, 0]], device=device)
    lengths = [6, 5, 3]
    ids, states = ids.clamp(max=last), torch.tensor(lengths, device=device)[:, None] - 1
    model.eval()
    try:
        together = pack(ids, lengths).read(trunk, torch.arange(5, device=device) < states)
        alone = [trunk(input_ids=row[None, :n], use_cache=False) for row, n in zip(ids, lengths, strict=True)]
    finally:
        model.train(training)
    expected = torch.cat([output.last_hidden_state[0, :-1] for output in alone])
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    return bool((together - expected).abs().max() <= tolerance * expected.abs().max())
