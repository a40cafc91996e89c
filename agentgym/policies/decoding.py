"""The decode loop: rows enter, take one token a step, and leave, over one key-value cache.

Invariant: a row's tokens are a function of its prompt, its sampling parameters, its seed and the weights; the
rows it shares the cache with change its log-probs by rounding only.

Prompts enter in groups of similar length; identical prompts are read once, and so is what all that enter
together begin with. Only the last position's logits are computed. When rows enter or leave, the cache is
rebuilt without the rows that left and without padding that nobody needs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentgym.policies.base import Completion, FinishReason, Request
from agentgym.policies.kvcache import KeyValues, use_grouped_attention
from agentgym.policies.sampling import draw, uniforms

# A forward pass reads all weights; below this many tokens of padding that costs more than the padding does.
_FREE_PADDING = 64
# A common beginning shorter than this is not worth a pass of its own.
_SHARED = 16

Prompt = tuple[int, ...]


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
        self._cache = KeyValues(0, model.device)
        self._slots: list[Row] = []  # the cache's rows, those that have left included

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> list[Row]:
        """Read the prompts of ``rows`` and sample their first tokens; return the rows that ended."""
        parts = [self._remaining()] if self.rows else []
        entering: list[Row] = []
        prompts = list(dict.fromkeys(row.request.prompt_ids for row in rows))
        shared = _common(prompts)
        beginning = self._prefill([prompts[0][:shared]])[0] if shared else None
        for group in self._groups(prompts, shared):
            cache, logits = self._prefill(group, beginning, shared)
            place = {prompt: i for i, prompt in enumerate(group)}
            members = [row for row in rows if row.request.prompt_ids in place]
            index = [place[row.request.prompt_ids] for row in members]
            self._sample(members, logits[index])
            going_on = [(i, row) for i, row in zip(index, members, strict=True) if row.finish_reason is None]
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
        tokens = torch.tensor([row.token_ids[-1:] for row in self.rows], device=self._model.device)
        self._sample(
            self.rows, self._cache.read(self._model, tokens, torch.ones_like(tokens, dtype=torch.bool))
        )
        ended = [row for row in self.rows if row.finish_reason is not None]
        if ended:
            self.keep(lambda row: row.finish_reason is None)
        return ended

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Let the rows go that are not ``wanted``."""
        self.rows = [row for row in self.rows if wanted(row)]
        if not self.rows:
            self._cache, self._slots = KeyValues(0, self._model.device), []

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

    def _groups(self, prompts: Sequence[Prompt], shared: int) -> list[list[Prompt]]:
        """Prompts in groups of similar length, longest first, that a forward pass can hold."""
        groups: list[list[Prompt]] = []
        longest = real = 0
        for prompt in sorted(prompts, key=len, reverse=True):
            length = len(prompt) - shared
            padded = longest * (len(groups[-1]) + 1) if groups else 0
            real += length
            too_padded = padded - real > max(_FREE_PADDING, real // 8)
            if not groups or padded > self._prefill_tokens or too_padded:
                groups.append([])
                longest = real = length
            groups[-1].append(prompt)
        return groups

    def _prefill(
        self, prompts: Sequence[Prompt], beginning: KeyValues | None = None, skip: int = 0
    ) -> tuple[KeyValues, Tensor]:
        """The cache of ``prompts`` and the logits after each, ``(rows, vocabulary)``.

        ``beginning`` holds the first ``skip`` tokens, which the prompts have in common.
        """
        device, rows = self._model.device, len(prompts)
        cache = KeyValues.join([(beginning, [0] * rows)]) if beginning else KeyValues(rows, device)
        rests = [prompt[skip:] for prompt in prompts]
        width = max(map(len, rests))
        tokens = torch.tensor([(0,) * (width - len(rest)) + rest for rest in rests], device=device)
        lengths = torch.tensor([len(rest) for rest in rests], device=device)
        real = torch.arange(width, device=device) >= (width - lengths)[:, None]
        chunk = max(1, self._prefill_tokens // rows)
        logits = torch.empty(0)
        for start in range(0, width, chunk):
            now = slice(start, start + chunk)
            logits = cache.read(self._model, tokens[:, now], real[:, now])
        return cache, logits

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

    def _remaining(self) -> tuple[KeyValues, list[int]]:
        """The cache and which of its rows are still wanted."""
        place = {id(row): i for i, row in enumerate(self._slots)}
        return self._cache, [place[id(row)] for row in self.rows]

    def _rebuild(self, parts: Sequence[tuple[KeyValues, list[int]]]) -> None:
        """One cache of the ``parts``' rows, which are :attr:`rows` in order."""
        self._cache, self._slots = KeyValues.join(parts), list(self.rows)


def _common(prompts: Sequence[Prompt]) -> int:
    """How many tokens all ``prompts`` begin with, short of a whole prompt; 0 if that is not worth it."""
    first, last = min(prompts), max(prompts)  # the two that differ the earliest
    limit = min(map(len, prompts)) - 1
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    return shared if len(prompts) > 1 and shared >= _SHARED else 0
