"""The decode loop: rows enter, take one token a step, and leave, over one key-value cache.

Invariant: a row's tokens are a function of its prompt, its sampling parameters, its seed and the weights; the
rows it shares the cache with change its log-probs by rounding only.

Rows are padded on the left to a common length. Prompts enter in groups of similar length, identical prompts
once, and only the last position's logits are computed. When rows enter or leave, the cache is rebuilt
without the rows that left and without padding that nobody needs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agentgym.policies.base import Completion, FinishReason, Request
from agentgym.policies.sampling import draw, uniforms

# A forward pass reads all weights; below this many tokens of padding that costs more than the padding does.
_FREE_PADDING = 64
# Columns of room that a rebuilt cache has, so that a step writes into it instead of copying it.
_SLACK = 64
_GROUPED = "sdpa_grouped"


class Row:
    """One completion on its way.

    Attributes:
        request: What was asked for.
        token_ids: Sampled so far.
        logprobs: One per token.
        finish_reason: ``None`` while it runs.
    """

    __slots__ = ("_uniforms", "finish_reason", "logprobs", "request", "token_ids")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self._uniforms = uniforms(request.seed, request.sampling.max_tokens)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the completion so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the longest completion it may have."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    @property
    def uniform(self) -> float:
        """The random number of the next token."""
        return float(self._uniforms[len(self.token_ids)])


class Decoder:
    """Decodes rows with a causal language model.

    Args:
        model: A Hugging Face causal language model in eval mode, with attention in every layer.
        stop_ids: Tokens that end a completion; they stay in it.
        decode: Token ids to text, special tokens included.
        prefill_tokens: Prompt tokens, padding included, that one forward pass may hold.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
        *,
        prefill_tokens: int = 4096,
    ) -> None:
        self.rows: list[Row] = []
        use_grouped_attention(model)
        self._model, self._stop_ids, self._decode = model, frozenset(stop_ids), decode
        self._prefill_tokens = prefill_tokens
        self._cache = _new_cache()
        self._slots: list[Row] = []  # the cache's rows, those that have left included

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> list[Row]:
        """Read the prompts of ``rows`` and sample their first tokens; return the rows that ended."""
        parts = [self._remaining()] if self.rows else []
        entering: list[Row] = []
        for prompts in self._groups(dict.fromkeys(row.request.prompt_ids for row in rows)):
            cache, logits = self._prefill(prompts)
            place = {prompt: i for i, prompt in enumerate(prompts)}
            group = [row for row in rows if row.request.prompt_ids in place]
            index = [place[row.request.prompt_ids] for row in group]
            self._sample(group, logits[index])
            going_on = [(i, row) for i, row in zip(index, group, strict=True) if row.finish_reason is None]
            if going_on:
                parts.append((cache, [i for i, _ in going_on]))
                entering += [row for _, row in going_on]
        if entering:
            self.rows = [*self.rows, *entering]
            self._rebuild(parts)
        return [row for row in rows if row.finish_reason is not None]

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Sample one token for every row; return the rows that ended, which leave."""
        if self._slots != self.rows:
            self._rebuild([self._remaining()])
        device = self._model.device
        past = self._cache.get_seq_length()
        lengths = torch.tensor([row.length for row in self.rows], device=device)
        tokens = torch.tensor([row.token_ids[-1:] for row in self.rows], device=device)
        mask = _mask(lengths, past + 1)
        logits = self._forward(tokens, mask, lengths[:, None] - 1, self._cache)
        self._sample(self.rows, logits)
        ended = [row for row in self.rows if row.finish_reason is not None]
        if ended:
            self.keep(lambda row: row.finish_reason is None)
        return ended

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Let the rows go that are not ``wanted``."""
        self.rows = [row for row in self.rows if wanted(row)]
        if not self.rows:
            self._cache, self._slots = _new_cache(), []

    def completion(self, row: Row, version: int) -> Completion:
        """The completion of a row that ended; the token that ended it is not in its text."""
        kept = row.token_ids[:-1] if row.token_ids[-1] in self._stop_ids else row.token_ids
        return Completion(
            text=self._decode(kept),
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            finish_reason=row.finish_reason or "abort",
            version=version,
        )

    def _groups(self, prompts: Collection[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Prompts in groups of similar length, longest first, that a forward pass can hold."""
        groups: list[list[tuple[int, ...]]] = []
        longest = real = 0
        for prompt in sorted(prompts, key=len, reverse=True):
            padded = longest * (len(groups[-1]) + 1) if groups else 0
            real += len(prompt)
            too_padded = padded - real > max(_FREE_PADDING, real // 8)
            if not groups or padded > self._prefill_tokens or too_padded:
                groups.append([])
                longest = real = len(prompt)
            groups[-1].append(prompt)
        return groups

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Cache, Tensor]:
        """The cache of ``prompts``, padded on the left, and the logits after each, ``(rows, vocabulary)``."""
        device, width = self._model.device, max(map(len, prompts))
        tokens = torch.tensor([(0,) * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        positions = (torch.arange(width, device=device) - (width - lengths)[:, None]).clamp_(min=0)
        mask, cache = _mask(lengths, width), _new_cache()
        chunk = max(1, self._prefill_tokens // len(prompts))
        logits = torch.empty(0)
        for start in range(0, width, chunk):
            now = slice(start, min(start + chunk, width))
            seen = None if mask is None else mask[:, : now.stop]
            logits = self._forward(tokens[:, now], seen, positions[:, now], cache)
        return cache, logits

    def _forward(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _sample(self, rows: Sequence[Row], logits: Tensor) -> None:
        u = np.array([row.uniform for row in rows])
        drawn, logps = draw(logits, [row.request.sampling for row in rows], u)
        if not bool(logps.isfinite().all()):
            raise ArithmeticError("the model's logits are not finite; its weights have probably diverged")
        for row, token, logp in zip(rows, drawn.tolist(), logps.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logp)
            sampling = row.request.sampling
            if token in self._stop_ids or (sampling.stop and self._stopped(row)):
                row.finish_reason = "stop"
            elif len(row.token_ids) >= sampling.max_tokens:
                row.finish_reason = "length"

    def _stopped(self, row: Row) -> bool:
        # A token holds at least one byte and a character at most four: a stop string lies in this tail.
        tail = 4 * max(map(len, row.request.sampling.stop)) + 4
        text = self._decode(row.token_ids[-tail:])
        return any(stop in text for stop in row.request.sampling.stop)

    def _remaining(self) -> tuple[Cache, list[int]]:
        """The cache and which of its rows are still wanted."""
        place = {id(row): i for i, row in enumerate(self._slots)}
        return self._cache, [place[id(row)] for row in self.rows]

    def _rebuild(self, parts: Sequence[tuple[Cache, list[int]]]) -> None:
        """One cache of the ``parts``' rows, in the order of :attr:`rows`."""
        # The newest token of a row is sampled but not yet read: it is not in the cache.
        width = max(row.length for row in self.rows) - 1
        cache = _new_cache()
        for sources in zip(*(part.layers for part, _ in parts), strict=True):
            layer = _Layer()
            layer.fill([(s, index) for s, (_, index) in zip(sources, parts, strict=True)], width)
            cache.layers.append(layer)
        self._cache, self._slots = cache, list(self.rows)


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


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call, unused-ignore]
    """Keys and values, shape ``(rows, heads, tokens, size)``, in buffers with room for more tokens."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._buffers: list[Tensor] = []
        self._length = 0

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; return all."""
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

    def fill(self, parts: Sequence[tuple[_Layer, list[int]]], width: int) -> None:
        """Take rows, given by index, from other layers, aligned on the right at ``width`` tokens."""
        self.is_initialized, self._length = True, width
        rows = sum(len(index) for _, index in parts)
        self._buffers = [_room(states, rows, width + _SLACK) for states in parts[0][0].filled()]
        at = 0
        for layer, index in parts:
            for buffer, states in zip(self._buffers, layer.filled(), strict=True):
                length = min(layer._length, width)
                here = buffer[at : at + len(index)]
                here[:, :, : width - length] = 0  # masked, but 0 times garbage may be NaN
                here[:, :, width - length : width] = states[index, :, layer._length - length :]
            at += len(index)
        self.keys, self.values = self.filled()

    def filled(self) -> tuple[Tensor, Tensor]:
        """Views of the filled part of the buffers."""
        keys, values = self._buffers
        return keys[:, :, : self._length], values[:, :, : self._length]


def _new_cache() -> Cache:
    return Cache(layer_class_to_replicate=_Layer)


def _room(like: Tensor, rows: int, tokens: int) -> Tensor:
    _, heads, _, size = like.shape
    return like.new_empty((rows, heads, tokens, size))


def _mask(lengths: Tensor, width: int) -> Tensor | None:
    """True on the last ``length`` of ``width`` columns, shape ``(rows, width)``; ``None`` if on all."""
    mask = torch.arange(width, device=lengths.device) >= (width - lengths)[:, None]
    return None if bool(mask.all()) else mask
